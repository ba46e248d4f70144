"""Reports that a process waits for others: for whom, where, and what to do."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aullm_dist.log import get_logger

logger = get_logger(__name__)

PATIENCE_SECONDS = 10.0
"""How long a process waits before it says so."""
_AGAIN_SECONDS, _LONGER = 60.0, 2.0


@contextmanager
def announced(what: Callable[[], str], *, speaks: bool = True) -> Iterator[None]:
    """Log a warning while the block takes longer than `PATIENCE_SECONDS`, and again from time to time.

    Args:
        what: returns the message; asked when it is due.
        speaks: whether this process is to say it; of many that wait alike one is enough.
    """
    if not speaks:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        waited, pause = 0.0, PATIENCE_SECONDS
        while not over.wait(pause):
            waited += pause
            logger.warning("Waiting for %.0f s now: %s", waited, what())
            pause = max(_AGAIN_SECONDS, _LONGER * waited)

    threading.Thread(target=watch, name="waiting", daemon=True).start()
    try:
        yield
    finally:
        over.set()
