"""Records SIGUSR1 and SIGTERM from the first moment of a run to its end, also while a library holds the process up."""

import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from aullm_dist.log import get_logger, is_main_process

logger = get_logger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
LOAD_PATIENCE_SECONDS = 15.0
"""A signalled process that loads leaves after so long."""
_PATIENCE_SECONDS, _FIRST_PATIENCE_SECONDS, _PATIENCE_FACTOR = 30.0, 120.0, 4.0

_Handler = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None
"""What `signal.signal` takes and returns."""


class StopSignals:
    """Notes SIGUSR1 and SIGTERM from `install` to `close`, also while this process loads or waits in a collective.

    A thread is woken by the signal itself, so it speaks even where the interpreter is held up in a library. It ends a
    signalled process that gets no further: while the run loads there is nothing to save, and later a process that waits
    for a lost one would never come to the exchange.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the first signal, None as long as there was none."""
        self.received_at = math.nan
        """`time.monotonic()` of it."""
        self.leave_loading: Callable[[], None] = lambda: None
        """Called before a signalled process leaves while it loads."""
        self._loading = True
        self._busy = 0
        self._alive_at, self._longest = time.monotonic(), 0.0
        self._before: dict[signal.Signals, _Handler] = {}
        self._wakeup = -1
        self._reader, self._writer = socket.socketpair()
        self._closed = threading.Event()

    def install(self) -> None:
        """Begin; only the main thread may."""
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            self._before[number] = signal.signal(number, _ignore)
        threading.Thread(target=self._watch, name="stop signals", daemon=True).start()

    def close(self) -> None:
        """Let the signals do again what they did before."""
        self._end(self._before)

    def deafen(self) -> None:
        """Ignore further signals: the process is leaving, and a late one must not end it with another exit code."""
        self._end(dict.fromkeys(SIGNALS, signal.SIG_IGN))

    def _end(self, handlers: Mapping[signal.Signals, _Handler]) -> None:
        self._closed.set()
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.close()

    def alive(self) -> None:
        """Say that the run gets on."""
        now = time.monotonic()
        if not self._loading:
            self._longest = max(self._longest, now - self._alive_at)
        self._alive_at = now

    def loading(self) -> None:
        """Say that the run loads: there is nothing to save."""
        self._loading = True

    def loaded(self) -> None:
        """Say that loading is over: from here on a signal waits for the processes to agree."""
        self._loading, self._alive_at = False, time.monotonic()

    @contextmanager
    def busy(self) -> Iterator[None]:
        """A region that may take as long as it takes, such as a save."""
        self._busy += 1
        try:
            yield
        finally:
            self._busy -= 1
            self._alive_at = time.monotonic()

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                numbers = self._reader.recv(64)
            except OSError:
                return
            names = [signal.Signals(number).name for number in numbers if number in SIGNALS]
            if self._closed.is_set() or not numbers:
                return
            if names and self.received is None:
                self.received, self.received_at = names[0], time.monotonic()
                if is_main_process():
                    logger.info("%s: stopping at the next micro-batch that all processes agree on", names[0])
                threading.Thread(target=self._end_if_stuck, name="patience", daemon=True).start()

    def _end_if_stuck(self) -> None:
        while not self._closed.wait(0.5):
            if self._busy:
                continue
            now = time.monotonic()
            if self._loading:
                if now - self.received_at > LOAD_PATIENCE_SECONDS:
                    self.leave_loading()
                    self._leave(0, "asked to stop while the run was loading, with nothing to save")
                continue
            patience = max(_PATIENCE_SECONDS, _PATIENCE_FACTOR * self._longest) if self._longest else 0.0
            if now - max(self._alive_at, self.received_at) > (patience or _FIRST_PATIENCE_SECONDS):
                self._leave(1, "asked to stop, but waits for another process; the newest checkpoint is what is left")

    def _leave(self, code: int, why: str) -> None:
        who = f"[rank {os.environ['RANK']}] " if "RANK" in os.environ else ""
        print(f"{who}{self.received}: {why}", file=sys.__stderr__, flush=True)
        os._exit(code)


@contextmanager
def interrupted_later() -> Iterator[None]:
    """A region behind which an interrupt (Ctrl-C) takes effect: what Python calls in passing swallows its exception.

    That is what destroys objects, so a collection of garbage is no place for it. Only the main thread may.
    """
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(came[0], None)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Stand in for the signal's default action; the thread behind the wake-up socket does what there is to do."""


def stand_apart(_worker: int) -> None:
    """Put a loader process into a group of its own: a launcher signals all of a process's group at once."""
    os.setpgid(0, 0)
