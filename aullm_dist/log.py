"""Logging for one process of many: below a warning, only the main process speaks."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TextIO

_ROOT = "aullm_dist"
_KERNELS = "aullm_kernels"


class _StderrHandler(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is now, so that a progress bar or a test may redirect it."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def is_main_process() -> bool:
    """Whether this process has rank 0, read from the launcher's environment (true outside any launcher)."""
    return int(os.environ.get("RANK", "0")) == 0


def get_logger(name: str = _ROOT) -> logging.Logger:
    """Return a logger below `aullm_dist`; nothing is printed before `set_up` has run."""
    return logging.getLogger(name if name.startswith(_ROOT) else f"{_ROOT}.{name}")


def all_loggers() -> list[logging.Logger]:
    """Return the loggers whose messages a user sees: ours and that of the kernels."""
    return [logging.getLogger(_ROOT), logging.getLogger(_KERNELS)]


@contextlib.contextmanager
def kernels_silent() -> Iterator[None]:
    """Leave unsaid which implementation an op chooses: what is computed here without values is not the run."""
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
            handler.setFormatter(logging.Formatter("%(message)s"))
            logger.addHandler(handler)
            logger.propagate = False
        logger.setLevel(level if is_main_process() else logging.WARNING)
