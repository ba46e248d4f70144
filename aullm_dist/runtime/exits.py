"""Ends a process: a line for a mistake of the user's, a traceback for one of ours, and no group left hanging.

A launcher starts several processes and ends all of them when one of them ends; whoever ends first decides what is seen.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

from aullm_dist import log
from aullm_dist.errors import CheckpointError, UserError

# How long a process leaves the last word to the main process, and more for each process that is before it on its
# machine: the launcher ends all of them when the first has ended.
_GRACE_SECONDS, _MORE_SECONDS = 5.0, 1.0
_LOST_SECONDS = 10.0
"""A process that has lost another leaves it to the other's launcher to say so first."""
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL communicator was aborted")


def report(error: UserError | CheckpointError, program: str, *, ended: bool = False) -> None:
    """Write the line that ends the run; the main process does, unless this process alone knows of the error.

    The others wait for the launcher to end them, or an early one would take the main process down before it has spoken.
    What one of them has said on this machine, no other repeats.

    Args:
        error: what the user can fix.
        program: name in front of the line.
        ended: the launcher has asked this process to end before it came to its error: another one has spoken.
    """
    who = ""
    if not log.is_main_process():
        if ended:
            return
        time.sleep(_GRACE_SECONDS + _MORE_SECONDS * log.launcher_number("LOCAL_RANK"))
        if error.told_to_all:
            return
        who = f"process {os.environ['RANK']}: "
    if not _is_first_to_say(str(error)):
        return
    line = f"{program}: error: {who}{error}"
    sys.stderr.write(f"{line}\n")
    _tell_launcher(line)


def _is_first_to_say(text: str) -> bool:
    """Whether no other process that the same launcher has started on this machine has said `text`.

    On a busy machine the main process may come to a mistake that all of them find after the others have stopped waiting
    for it. torchrun gives each process a folder in one that they share; whoever creates the file there has the word.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    folder = Path(file).parent if file else None
    if folder is None or folder.name != os.environ.get("LOCAL_RANK"):
        return True
    said = folder.parent / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    try:
        said.touch(exist_ok=False)
    except FileExistsError:
        return False
    except OSError:
        # A folder that is gone or full is no reason to stay silent.
        return True
    return True


def _tell_launcher(line: str) -> None:
    """Leave a line for torch's launcher, whose own last words then repeat it instead of naming an exit code alone.

    Its traceback above them cannot be kept away from here: it is raised in the launcher for any exit code but 0.
    """
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file:
        # A stale variable is no reason to end otherwise.
        with contextlib.suppress(OSError):
            Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}), encoding="utf-8")


def refuse_unreadable_names(arguments: Sequence[str]) -> None:
    """Refuse an argument that is no UTF-8: libraries and records take no such name, and most say so in a traceback.

    Raises:
        UserError: naming the first.
    """
    for argument in arguments:
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"argument {argument!r}: is not UTF-8; rename the file or folder") from None


def show_any_name() -> None:
    """Have stdout write what its encoding has no letters for as `\\xff`, as stderr does, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show a traceback and end a process of a group at once: its clean-up would wait for processes that wait for it.

    It is a `sys.excepthook`. It writes to the true stderr: torch puts a buffer in its place while it calls the hook, to
    print it behind the rank afterwards.
    """
    who = f"[rank {os.environ['RANK']}{_on_node()}] " if "RANK" in os.environ else ""
    if "RANK" in os.environ and any(phrase in str(error) for phrase in _LOST):
        # Its own traceback would say where it waited, and its own end would look like the cause.
        print(f"{who}lost another process of the run: {error}", file=sys.__stderr__, flush=True)
        time.sleep(_LOST_SECONDS)
        leave(1)
    print(who + "".join(traceback.format_exception(kind, error, trace)), end="", file=sys.__stderr__, flush=True)
    _tell_launcher(f"{who}{kind.__name__}: {error}")
    leave(1)


def _on_node() -> str:
    node = os.environ.get("SLURMD_NODENAME")
    return f" on {node}" if node else ""


def leave(code: int) -> NoReturn:
    """End the process with `code`; a process of a group ends without the interpreter's clean-up.

    Gloo's threads outlive `destroy_process_group` while anything refers to a group, as DeepSpeed's modules do for good.
    If the interpreter goes away under such a thread, the process aborts: 1 of 25 runs that had done all their work.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "WORLD_SIZE" in os.environ:
        os._exit(code)
    sys.exit(code)
