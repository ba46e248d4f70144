"""Measures how much memory this process takes at most while it does something."""

import threading
from pathlib import Path
from types import TracebackType

_PERIOD_SECONDS = 0.01


def anonymous_bytes() -> int:
    """Return bytes of this process that are backed by no file: RssAnon + RssShmem."""
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return (kib["RssAnon"] + kib["RssShmem"]) * 1024


class PeakMemory:
    """Samples memory inside a `with` block.

    Attributes:
        bytes: the highest anonymous memory so far, less what there was when the block was entered.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._before = anonymous_bytes()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_PERIOD_SECONDS):
            self.bytes = max(self.bytes, anonymous_bytes() - self._before)
