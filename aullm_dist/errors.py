"""Defines errors that a user can cause, kept apart from our own mistakes."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """A mistake in the user's input, reported in one line.

    The message names what is wrong, where (file, row, cell or key) and what is allowed. The command line prints it
    without a traceback and exits with `EXIT_CODE`; every other exception is a defect of ours and keeps its traceback.
    """

    EXIT_CODE = 2
    told_to_all = False
    """Whether every process of the run raises it, so that the main process alone need say it."""

    def __str__(self) -> str:
        """Return the line; a file's name may hold line ends, which are shown as they are written in Python."""
        return super().__str__().replace("\n", "\\n").replace("\r", "\\r")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or would not have been complete; nothing of it is left on disk."""

    EXIT_CODE = 1
    told_to_all = False
    """As in `UserError`."""


def system_error(
    error: OSError, remedy: str = "give a readable and writable place", *, place: str = "a file"
) -> UserError:
    """Return what the system refused as the user's mistake: a file that is missing, in the way, or not ours to read.

    Args:
        error: what the system raised.
        remedy: what to do about it.
        place: named where the system's own message names no file.
    """
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    where, why = " to ".join(names) or place, error.strerror or str(error) or type(error).__name__
    return UserError(f"{where}: {why}; {remedy}")


@contextmanager
def file_errors(place: str, *, writing: bool = False) -> Iterator[None]:
    """Turn what the system refuses inside the block into one line, as `system_error` does.

    Args:
        place: as of `system_error`.
        writing: whether files are written inside the block, and not only read.

    Raises:
        UserError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        need = "free space and the permission to write" if writing else "files and folders that you may read"
        raise system_error(error, f"allowed: {need}", place=place) from error
