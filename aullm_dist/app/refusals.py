"""Turns refusals of a request into their HTTP status, and the warnings of our own loggers as notes for the page."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus

from aullm_dist.errors import UserError
from aullm_dist.log import get_logger

__all__ = ["Refused", "collect_warnings"]


class Refused(UserError):
    """A request that is answered with one sentence and this HTTP status."""

    def __init__(self, message: str, status: HTTPStatus) -> None:
        super().__init__(message)
        self.status = status


class _Collector(logging.Handler):
    """Keeps the warnings of one thread: requests run side by side."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self._thread = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self._thread:
            self.lines.append(record.getMessage())


@contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Collect what this thread warns of inside the block; it is still written to stderr as well."""
    collector, logger = _Collector(), get_logger()
    logger.addHandler(collector)
    try:
        yield collector.lines
    finally:
        logger.removeHandler(collector)
