"""Writing files and folders so that a reader never sees half of one."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write `text` as `write_bytes` writes."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` beside `path` and rename it into place; the folder is made if it is missing.

    Raises:
        OSError: If the folder cannot be written; `path` then keeps what it held before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def force_to_disk(path: Path) -> None:
    """Call fsync on a file or folder, so that what it holds (for a folder: its entries) survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def staged_folder(target: Path, publish: Callable[[Path, Path], object] = os.rename) -> Iterator[Path]:
    """Give a fresh hidden folder beside `target`, and move it there when the block ends without an exception.

    After an exception nothing new is left behind; a killed process leaves `.NAME.tmp-PID`.

    Args:
        target: where the folder is to be.
        publish: moves the hidden folder to `target`.

    Yields:
        The hidden folder to write into. The block has to force its files to disk; the folders are done here.

    Raises:
        OSError: If the parent cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = target.parent / f".{target.name}.tmp-{os.getpid()}"
    # Containers reuse process ids, so a killed process may have left one of this name.
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        yield staging
        force_to_disk(staging)
        publish(staging, target)
        force_to_disk(target.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
