"""Lives of a training run: forked from a process that has imported everything, and killed where the suite says.

A life costs a second instead of ten. The driver imports and forks, and does nothing else with the libraries: a process
that has used their threads cannot be forked.
"""

import ctypes
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import deepspeed  # noqa: F401  for the children
import peft  # noqa: F401
import peft.tuners.lora.bnb  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.integrations.bitsandbytes  # noqa: F401
from safetensors.torch import save_file
from training_runs import free_port

from aullm_dist.checkpoint import store as checkpoint
from aullm_dist.commands.train import main
from aullm_dist.runtime.exits import crash, leave
from aullm_dist.training import fold, step

RANKS = 2


@dataclass(frozen=True)
class Kill:
    """Where a life ends: in a phase after some seconds, or before the n-th file operation of its saves."""

    phase: str
    """load, step, evaluation or save."""
    everybody: bool
    """Both ranks, or the victim alone; its launcher then ends the other."""
    seconds: float = 0.0
    operation: int = 0
    victim: int = 0


@dataclass
class Ended:
    """How a life ended."""

    codes: list[int]
    log: str
    killed_in: str | None
    """Phase in which the kill came, None if the life was over before."""
    step: int
    """Steps that the victim had completed of its fold, 0 if none."""
    fold: int = 0
    """Which it was."""


class _Victim:
    """Ends its process, or its whole group, as the plan says; lives in the victim's process alone."""

    def __init__(self, kill: Kill, report: Path) -> None:
        self.kill, self.report = kill, report
        self.phase, self.fold, self.done, self.operations, self.armed = "load", 0, 0, 0, False
        self.seconds = kill.seconds

    def arm(self) -> None:
        self._note_folds()
        self._wrap(step.TrainStep, "run", "step", lambda arguments: setattr(self, "done", arguments[2] + 1))
        self._wrap(fold.FoldTrainer, "_evaluate", "evaluation")
        self._wrap(fold.FoldTrainer, "_save", "save")
        if self.kill.phase == "save":
            for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink")):
                self._guard(module, name)
            self._guard(checkpoint, "save_file", save_file)
            self._guard(shutil, "rmtree")
        elif self.kill.phase == "load":
            self._enter("load")

    def _note_folds(self) -> None:
        original = fold.FoldTrainer.run

        def noted(trainer: fold.FoldTrainer, resume: bool) -> None:
            self.fold, self.done = trainer.fold.index, 0
            original(trainer, resume)

        fold.FoldTrainer.run = noted

    def _wrap(self, owner: object, name: str, phase: str, after: Callable = lambda _: None) -> None:
        original = getattr(owner, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            before, self.phase = self.phase, phase
            self._enter(phase)
            try:
                result = original(*args, **kwargs)
            finally:
                self.phase = before
            after(args)
            return result

        setattr(owner, name, wrapped)

    def _enter(self, phase: str) -> None:
        if phase == self.kill.phase != "save" and not self.armed:
            self.armed = True
            timer = threading.Timer(self.seconds, self._die_inside)
            timer.daemon = True
            timer.start()

    def _die_inside(self) -> None:
        """Die if the phase still goes on, or sooner in it the next time; loading has no next time."""
        if self.phase != self.kill.phase != "load":
            self.seconds, self.armed = self.seconds / 2, False
            return
        self._die()

    def _guard(self, owner: object, name: str, original: Callable | None = None) -> None:
        original = original or getattr(owner, name)

        def guarded(*args: object, **kwargs: object) -> object:
            if self.phase == "save":
                self.operations += 1
                if self.operations == self.kill.operation:
                    self._die()
            return original(*args, **kwargs)

        setattr(owner, name, guarded)

    def _die(self) -> None:
        with open(self.report, "w") as file:
            file.write(f"{self.phase} {self.fold} {self.done}")
        if self.kill.everybody:
            os.killpg(0, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


def live(
    arguments: Sequence[str],
    folder: Path,
    kill: Kill | None = None,
    *,
    limit: int | None = None,
    obedient: bool = False,
) -> Ended:
    """Run the main job on two processes until it ends or is killed.

    Args:
        arguments: of train.py.
        folder: for log and report; made anew.
        kill: where it ends before its time.
        limit: bytes that a file may have: a full disk, as far as a process can tell.
        obedient: whether root, too, keeps to the permissions of files.
    """
    pids = begin(arguments, folder, kill, limit=limit, obedient=obedient)
    return wait(pids, folder)


def begin(
    arguments: Sequence[str],
    folder: Path,
    kill: Kill | None = None,
    *,
    limit: int | None = None,
    obedient: bool = False,
) -> list[int]:
    """Fork the ranks of a life into one process group, and return their process ids."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    port, pids = free_port(), []
    for rank in range(RANKS):
        pid = os.fork()
        if pid == 0:
            _child(rank, port, pids[0] if pids else 0, arguments, folder, kill, limit, obedient)
        pids.append(pid)
        os.setpgid(pid, pids[0])
    return pids


def _child(
    rank: int,
    port: int,
    group: int,
    arguments: Sequence[str],
    folder: Path,
    kill: Kill | None,
    limit: int | None,
    obedient: bool,
) -> None:
    try:
        os.setpgid(0, group)
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
        os.environ.update(
            {name: str(value) for name, value in where.items()}, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        if kill is not None and rank == kill.victim:
            _Victim(kill, folder / "killed").arm()
        if limit is not None and rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if obedient:
            _obey_permissions()
        leave(main(list(arguments)))
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        crash(type(error), error, error.__traceback__)
        traceback.print_exc()
    finally:
        os._exit(70)


def _obey_permissions() -> None:
    """Give up root's right to pass over permissions (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH); for others a no-op."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # from linux/capability.h: version 3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, of 32 capabilities and of the next 32
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.capget(header, sets) == 0:
        sets[0] &= ~0b110
        libc.capset(header, sets)


def wait(pids: list[int], folder: Path, seconds: float = 600.0) -> Ended:
    """Wait for a life to end; when one of its processes has, end the others soon after, as a launcher does."""
    codes: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    wanted = 8.0 if codes[pid] in (0, 1, 2) else 0.0  # who has something to say gets the time
                    deadline = min(deadline, time.monotonic() + wanted)
        if time.monotonic() > deadline:
            for pid in set(pids) - set(codes):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    report = folder / "killed"
    phase, fold, done = report.read_text().split() if report.exists() else (None, "0", "0")
    return Ended([codes[pid] for pid in pids], (folder / "log").read_text(), phase, int(done), int(fold))


def random_kill(phase: str, everybody: bool, draw: random.Random, longest: float) -> Kill:
    """Return a kill at a random moment of a phase that takes about `longest` seconds."""
    return Kill(phase, everybody, seconds=draw.uniform(0.0, longest), victim=draw.randrange(RANKS))


if __name__ == "__main__":
    sys.exit("the suite is tests/faults/suite.py")
