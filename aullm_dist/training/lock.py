"""Keeps a second run out of the folds of a run that is going on.

A lock is a POSIX lock on a small file in the run folder: the system gives it back when the process ends, however it
ends, and network file systems carry it from node to node. Loader processes do not inherit it.
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from aullm_dist.errors import UserError
from aullm_dist.log import get_logger
from aullm_dist.slurm import job_of, node_of

logger = get_logger(__name__)

SAME_JOB_SECONDS = 120.0
"""How long a job waits for its own former life: a file server keeps the lock of a lost node for a while."""
_NOT_OFFERED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def refuse_running(run: Path, fold: int | None) -> None:
    """Refuse a run folder in which another process trains, without touching it.

    Args:
        run: the run folder, which need not exist.
        fold: the one fold that is wanted, None for any.

    Raises:
        UserError: naming the other process.
    """
    for path in sorted(run.glob(".fold-*.lock")) if fold is None else [_lock_file(run, fold)]:
        try:
            descriptor = os.open(path, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NOT_OFFERED and not _of_this_job(path):
                raise _taken(run, path) from None
        finally:
            os.close(descriptor)


class RunLock:
    """The locks of a process on folds of one run folder."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._held: list[int] = []

    def take(self, folds: Iterable[int]) -> None:
        """Lock folds until `release`, or until the process ends.

        Raises:
            UserError: another process trains one of them.
            OSError: the folder cannot be written.
        """
        self._run.mkdir(parents=True, exist_ok=True)
        for fold in folds:
            self._take(_lock_file(self._run, fold))

    def release(self) -> None:
        """Give all locks back."""
        for descriptor in self._held:
            os.close(descriptor)
        self._held = []

    def _take(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        until = time.monotonic() + SAME_JOB_SECONDS
        while True:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in _NOT_OFFERED:
                    logger.warning("%s: this file system has no locks (%s); nothing keeps a second run out of this "
                                   "folder", path, error.strerror)  # fmt: skip
                    break
                if not _of_this_job(path) or time.monotonic() > until:
                    os.close(descriptor)
                    raise _taken(self._run, path) from None
                time.sleep(1.0)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_ourselves()).encode(), 0)
        self._held.append(descriptor)


def _lock_file(run: Path, fold: int) -> Path:
    return run / f".fold-{fold:02d}.lock"


def _ourselves() -> dict[str, str | int | None]:
    job = job_of(os.environ)
    node = node_of(os.environ) or socket.gethostname()
    return {"pid": os.getpid(), "node": node, "job_id": job.job_id if job else None}


def _holder(path: Path) -> dict[str, str | int | None]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _of_this_job(path: Path) -> bool:
    job = job_of(os.environ)
    return job is not None and _holder(path).get("job_id") == job.job_id


def _taken(run: Path, path: Path) -> UserError:
    holder = _holder(path)
    who = f"process {holder.get('pid', '?')} on {holder.get('node', 'another machine')}"
    if holder.get("job_id"):
        who += f", job {holder['job_id']}"
    fold = path.name.removeprefix(".").removesuffix(".lock")
    return UserError(
        f"{run}: {fold} is being trained by another run ({who}); wait for it, or choose another folder with "
        "training.output="
    )
