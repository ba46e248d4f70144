"""The main job: `accelerate launch --quiet aullm_dist/train.py [--config FILE] [section.key=value ...]`."""

import os
import sys
import traceback
from types import TracebackType

# `accelerate launch aullm_dist/train.py` puts this file's folder first on the path, where our modules would shadow
# others.
_HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.getcwd()) != _HERE]


def _fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Show a traceback and end a process of a group at once: its clean-up would wait for processes that wait for it.

    To the true stderr: torch puts a buffer in its place while it calls this, to print it behind the rank afterwards.
    """
    who = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
    print(who + "".join(traceback.format_exception(kind, error, trace)), end="", file=sys.__stderr__, flush=True)
    _leave(1)


def _leave(code: int) -> None:
    """End the process with `code`; a process of a group ends without the interpreter's clean-up.

    Gloo's threads outlive `destroy_process_group` while anything refers to a group, as DeepSpeed's modules do for good.
    If the interpreter goes away under such a thread, the process aborts: 1 of 25 runs that had done all their work.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if "WORLD_SIZE" in os.environ:
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    from aullm_dist.train_cli import main

    sys.excepthook = _fail
    _leave(main(sys.argv[1:]))
