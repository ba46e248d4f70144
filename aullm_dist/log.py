"""Sets up logging for one process of many: below a warning, only the main process logs."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TextIO

_ROOT = "aullm_dist"
_KERNELS = "aullm_kernels"
_speaking_of: list[str] = []
"""What this process speaks of, where several do at once, or one of several runs; the widest topic first."""


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is now, so that a progress bar or a test may redirect it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def launcher_number(name: str, default: int = 0) -> int:
    """Return a number that a launcher has put into the environment, `default` where it is none or no number.

    `runtime.launch` refuses what cannot be; a message must get out before that.
    """
    given = os.environ.get(name, "")
    return int(given) if given.isascii() and given.isdigit() and len(given) < 10 else default


def is_main_process() -> bool:
    """Whether this process has rank 0, read from the launcher's environment (true outside any launcher)."""
    # A rank without a world is what another program has left in the shell.
    return launcher_number("RANK") == 0 or launcher_number("WORLD_SIZE", 1) <= 1


def is_first_of_machine() -> bool:
    """Whether this process is the first on its machine, read from the launcher's environment."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def speaks() -> bool:
    """Whether this process says what all processes of its fold find."""
    return bool(_speaking_of) or is_main_process()


@contextlib.contextmanager
def speaking(topic: str) -> Iterator[None]:
    """Let this process speak as the main one does, each line beginning with `topic`."""
    logger = logging.getLogger(_ROOT)
    before = logger.level
    logger.setLevel(min(before, logging.INFO))
    _speaking_of.append(topic)
    try:
        yield
    finally:
        _speaking_of.pop()
        logger.setLevel(before)


class _Lines(logging.Formatter):
    """The message alone, behind what this process speaks of, such as `full-0: Fold 3: `."""

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        for topic in reversed(_speaking_of):
            line = line if line.startswith(topic) else f"{topic}: {line}"
        return line


def get_logger(name: str = _ROOT) -> logging.Logger:
    """Return a logger below `aullm_dist`; nothing is printed before `set_up` has run."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def all_loggers() -> list[logging.Logger]:
    """Return the loggers whose messages a user sees: ours and that of the kernels."""
    return [logging.getLogger(_ROOT), logging.getLogger(_KERNELS)]


@contextlib.contextmanager
def kernels_silent() -> Iterator[None]:
    """Leave unsaid which implementation an op chooses: what is computed here on the meta device is not the run."""
    logger = logging.getLogger(_KERNELS)
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)


def set_up(level: int = logging.INFO) -> None:
    """Send our messages to stderr, at `level` on the main process and from WARNING up on the others."""
    for logger in all_loggers():
        if not logger.handlers:
            handler = _StderrHandler()
            handler.setFormatter(_Lines("%(message)s"))
            logger.addHandler(handler)
            logger.propagate = False
        logger.setLevel(level if is_main_process() else logging.WARNING)
