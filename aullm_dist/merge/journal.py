"""Keeps the folder in which a merge is written, so that a killed one resumes where it was.

    DIR.partial/
        files/          what will be DIR: renamed as a whole when it is complete
        journal.jsonl   which merge this is; then, line by line, how much of which file is on disk, and its SHA-256
        finished.json   which merge this was and its receipt: there once `files` is on the way to its place

A line of the journal is written after the bytes that it speaks of were forced to disk. What stands behind them is
written again, and so are bytes that do not have their hash any more.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aullm_dist.errors import UserError
from aullm_dist.files import force_to_disk, read_json, write_text

_JOURNAL, _FINISHED = "journal.jsonl", "finished.json"
_READ_BYTES = 2**22


class Journal:
    """The unfinished work of one merge; made by `open_journal`.

    Attributes:
        files: the folder to write into.
    """

    def __init__(self, folder: Path, descriptor: int, done: dict[str, dict[str, Any]]) -> None:
        self.folder, self.files = folder, folder / "files"
        self._descriptor, self._done = descriptor, done

    def kept(self, name: str) -> tuple[int, Any]:
        """Return how many bytes of a file are there and still what they were, and their SHA-256 to resume with."""
        digest = hashlib.sha256()
        entry, path = self._done.get(name), self.files / name
        if entry is None or not path.is_file():
            return 0, digest
        left = entry["bytes"]
        with path.open("rb") as file:
            while left and (part := file.read(min(left, _READ_BYTES))):
                digest.update(part)
                left -= len(part)
        return (entry["bytes"], digest) if digest.hexdigest() == entry["sha256"] else (0, hashlib.sha256())

    def note(self, name: str, size: int, sha256: str) -> None:
        """Say that the first `size` bytes of a file are on disk."""
        os.write(self._descriptor, _line({"file": name, "bytes": size, "sha256": sha256}))
        os.fdatasync(self._descriptor)

    def publish(self, out: Path, job: Mapping[str, Any], receipt: Mapping[str, Any]) -> None:
        """Rename the finished files to `out` (absent, or an empty folder), and remove the rest."""
        for path in self.files.iterdir():
            force_to_disk(path)
        force_to_disk(self.files)
        write_text(self.folder / _FINISHED, json.dumps({"job": dict(job), "receipt": dict(receipt)}))
        out.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.files, out)
        force_to_disk(out.parent)
        self.remove()

    def remove(self) -> None:
        """Delete the unfinished work."""
        remove_leftovers(self.folder)


def remove_leftovers(folder: Path) -> None:
    """Delete what a merge wrote into `DIR.partial`; what says that it was finished goes last."""
    shutil.rmtree(folder / "files", ignore_errors=True)
    for name in (_JOURNAL, _FINISHED):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def finished_receipt(folder: Path, job: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the receipt of a merge that was killed when all but its leftovers was in place, else None."""
    path = folder / _FINISHED
    if not path.is_file() or (folder / "files").exists():
        return None
    content = read_json(path, "remove its folder", keys=("job", "receipt"))
    return content["receipt"] if content["job"] == dict(job) else None


@contextmanager
def open_journal(folder: Path, job: Mapping[str, Any]) -> Iterator[Journal]:
    """Start or resume a merge in `folder`, and keep other processes out of it.

    Args:
        folder: `DIR.partial`; made if it is not there.
        job: what the bytes depend on; equal for a merge that may resume.

    Raises:
        UserError: the folder holds something else, or another merge, or one that is running.
    """
    path = folder / _JOURNAL
    inside = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    if folder.exists() and _JOURNAL not in inside and (not folder.is_dir() or inside not in ([], [_FINISHED])):
        raise UserError(f"{folder}: holds something else than an unfinished merge; remove it, or give another --out")
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another merge is writing it; wait for it, or give another --out") from None
        first, entries = _entries(path)
        if first is not None and first != dict(job):
            what = next(key for key in sorted({*first, *job}) if first.get(key) != job.get(key))
            raise UserError(
                f"{folder}: holds another unfinished merge ({what} differs); remove it, or give another --out"
            )
        done = {entry["file"]: entry for entry in entries}
        # Rewritten: a line that was cut by a kill must not swallow the next one.
        os.ftruncate(descriptor, 0)
        os.write(descriptor, b"".join(map(_line, [dict(job), *done.values()])))
        os.fsync(descriptor)
        (folder / "files").mkdir(exist_ok=True)
        force_to_disk(folder)
        force_to_disk(folder.parent)
        yield Journal(folder, descriptor, done)
    finally:
        os.close(descriptor)


def _entries(path: Path) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Return the job and the entries of a journal; the job is None in a new one, and a line cut by a kill ends it."""
    entries: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return (entries[0], entries[1:]) if entries else (None, [])


def _line(entry: Mapping[str, Any]) -> bytes:
    return (json.dumps(entry, sort_keys=True) + "\n").encode()
