"""Errors that a user can cause, kept apart from our own mistakes."""


class UserError(ValueError):
    """A mistake in the user's input, told in one line.

    The message names what is wrong, where (file, row, cell or key) and what is allowed. The command line prints it
    without a traceback and exits with `EXIT_CODE`; every other exception is a defect of ours and keeps its traceback.
    """

    EXIT_CODE = 2
    told_to_all = False
    """Whether every process of the run raises it, so that the main process alone need say it."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or would not have been complete; nothing of it is left on disk."""

    EXIT_CODE = 1
    told_to_all = False
    """As in `UserError`."""
