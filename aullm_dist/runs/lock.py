"""Keeps a second run out of the folds of a run that is in progress.

A lock is a POSIX lock on a small file in the run folder: the system releases it when the process ends, however it
ends, and network file systems carry it from node to node. Loader processes do not inherit it.
"""

import errno
import fcntl
import json
import os
import resource
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from aullm_dist.errors import UserError
from aullm_dist.files import read_json
from aullm_dist.log import get_logger
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runtime.slurm import job_of, node_of

logger = get_logger(__name__)

SAME_JOB_SECONDS = 120.0
"""How long a job waits for its own former life: a file server keeps the lock of a lost node for a while."""
_FEW_FILES, _MANY_FILES = 64, 512
"""Open files that everything else takes at least, and those that are enough for it: sockets, event files, workers."""
_NOT_OFFERED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def refuse_running(run: Path, fold: int | None) -> None:
    """Refuse a run folder in which another process trains, without touching it.

    Args:
        run: the run folder, which need not exist.
        fold: the one fold that is wanted, None for any.

    Raises:
        UserError: naming the other process.
    """
    for path in RunPaths(run).locks() if fold is None else [RunPaths(run).fold(fold).lock]:
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


def allow_locks(folds: int) -> None:
    """Let this process hold as many locks, each an open file; a soft limit is raised where the system lets it.

    Raises:
        UserError: the limit is too low.
    """
    soft, hard = (limit if limit != resource.RLIM_INFINITY else sys.maxsize for limit in _limits())
    if hard < folds + _FEW_FILES:
        raise UserError(
            f"{folds} folds are to be trained and locked, but a process may open {hard} files here (ulimit -Hn); "
            "train fewer runs at a time"
        )
    wanted = min(folds + _MANY_FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, _limits()[1]))


def _limits() -> tuple[int, int]:
    return resource.getrlimit(resource.RLIMIT_NOFILE)


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
            self._take(RunPaths(self._run).fold(fold).lock)

    def release(self) -> None:
        """Give all locks back."""
        for descriptor in self._held:
            os.close(descriptor)
        self._held = []

    def _take(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        until, said = time.monotonic() + SAME_JOB_SECONDS, False
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
                if not said:
                    logger.warning(
                        "Waiting up to %.0f s for %s, which this job's former life still locks (%s)",
                        SAME_JOB_SECONDS, path, _who(path),
                    )  # fmt: skip
                    said = True
                time.sleep(1.0)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(_ourselves()).encode(), 0)
        self._held.append(descriptor)


def _ourselves() -> dict[str, str | int | None]:
    job = job_of(os.environ)
    node = node_of(os.environ) or socket.gethostname()
    return {"pid": os.getpid(), "node": node, "job_id": job.job_id if job else None}


def _holder(path: Path) -> dict[str, str | int | None]:
    try:
        return read_json(path)
    except UserError:
        return {}


def _of_this_job(path: Path) -> bool:
    job = job_of(os.environ)
    return job is not None and _holder(path).get("job_id") == job.job_id


def _who(path: Path) -> str:
    holder = _holder(path)
    job = f", job {holder['job_id']}" if holder.get("job_id") else ""
    return f"process {holder.get('pid', '?')} on {holder.get('node', 'another machine')}{job}"


def _taken(run: Path, path: Path) -> UserError:
    fold = path.name.removeprefix(".").removesuffix(".lock")
    return UserError(
        f"{run}: {fold} is being trained by another run ({_who(path)}); wait for it, or choose another folder with "
        "training.output="
    )
