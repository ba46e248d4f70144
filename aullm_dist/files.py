"""Writes files and folders so that a reader never sees half of one, and refuses damaged ones in one line."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aullm_dist.errors import UserError


def user_path(text: str | os.PathLike[str]) -> Path:
    """Return the path that a user wrote, with `~` for a home folder.

    Raises:
        UserError: It names the home of a user whom the system does not know, or holds a NUL character.
    """
    if "\0" in str(text):
        raise UserError(f"{str(text)!r}: no path holds a NUL character")
    try:
        # `./~x` is a file of that name, and `Path` drops the `./`.
        return Path(text).expanduser() if str(text).startswith("~") else Path(text)
    except RuntimeError as error:
        raise UserError(f"{text}: there is no such home folder; write the path in full") from error


def is_taken(path: Path) -> bool:
    """Whether there is anything of that name, if only a link to nothing.

    Raises:
        OSError: It cannot be looked at, or one of the folders above it is a file.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def is_new_or_empty(folder: Path) -> bool:
    """Whether a folder can be written without touching anything that is there.

    Raises:
        OSError: As of `is_taken`.
    """
    return not is_taken(folder) or (folder.is_dir() and not any(folder.iterdir()))


def read_regular(path: Path) -> bytes:
    """Return the content of a file that can be read to its end: of a pipe or a device, reading might never return.

    Raises:
        OSError: It cannot be read, or is none.
    """
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "a pipe or a device, and no regular file", str(path))
    return path.read_bytes()


def read_text(path: Path, remedy: str = "") -> str:
    """Return the text of a file that a user has given, or a program has written for them.

    Args:
        path: of the file.
        remedy: what to do where it cannot be read, such as `give the path of a YAML run file`.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    what = f"; {remedy}" if remedy else ""
    try:
        return read_regular(path).decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}){what}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}){what}") from error


def read_json(path: Path, remedy: str = "", *, keys: tuple[str, ...] = (), **options: Any) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        path: of the file.
        remedy: what to do where it cannot be used.
        keys: entries that it must have.
        options: of `json.loads`.

    Raises:
        UserError: it cannot be read, is empty, was written to half, holds no object, or lacks an entry.
    """
    what = f"; {remedy}" if remedy else ""
    text = read_text(path, remedy)
    if not text.strip():
        raise UserError(f"{path}: is empty; a JSON object is expected{what}")
    try:
        content = json.loads(text, **options)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}){what}") from error
    except UserError:  # of a hook among the options
        raise
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not usable JSON ({error}){what}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}; a JSON object is expected{what}")
    missing = [key for key in keys if key not in content]
    if missing:
        raise UserError(f"{path}: lacks the entry {missing[0]!r}; it is damaged, or of another program{what}")
    return content


def write_text(path: Path, text: str) -> None:
    """Write `text` as `write_bytes` writes; bytes of a file's name that are no UTF-8 become `\\udcb8`."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` next to `path` and rename it into place; the folder is made if it is missing.

    Raises:
        OSError: If the folder cannot be written; `path` then keeps what it held before.
    """
    if not path.name:
        raise UserError(f"{path}: is a folder; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        # A full disk names no file, and nobody knows the temporary one.
        error.filename, error.filename2 = str(path), None
        raise
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
    """Give a fresh hidden folder next to `target`, and move it there when the block ends without an exception.

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
