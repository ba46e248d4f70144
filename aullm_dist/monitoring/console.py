"""Prints one line that says how far a run is: live on a terminal, plain lines in the log of a job."""

import sys
import time
from types import TracebackType

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aullm_dist.log import all_loggers, get_logger

logger = get_logger(__name__)

_PLAIN_SECONDS = 15.0
"""A plain line is written about this often, and at the first and the last step."""


class Console:
    """Progress of one fold: step, time left, loss, clips per second, memory.

    Args:
        name: `Fold 3`, or `Fold 3 (4 of 26)`.
        first_step: steps that were done before.
        total_steps: of the fold.
        active: whether this process speaks.
        live: whether it may have the last line of a terminal to itself.
    """

    def __init__(self, name: str, first_step: int, total_steps: int, active: bool, live: bool = True) -> None:
        self._name, self._first, self._total, self._active = name, first_step, total_steps, active
        self._done = first_step
        self._facts = ""
        self._begun = time.monotonic()
        self._spoken = -_PLAIN_SECONDS
        self._live = active and live and sys.stderr.isatty()
        self._bar = tqdm(
            total=total_steps, initial=first_step, desc=name, unit="step", disable=not self._live, mininterval=0.5,
            dynamic_ncols=True,
        )  # fmt: skip
        # Messages of the log must not tear the line apart.
        self._redirected = logging_redirect_tqdm(all_loggers()) if self._live else None

    def __enter__(self) -> "Console":
        """Begin to speak."""
        if self._redirected is not None:
            self._redirected.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Leave the last line behind."""
        self._bar.close()
        if self._redirected is not None:
            self._redirected.__exit__(kind, error, trace)

    def facts(self, loss: float | None, clips_per_second: float | None, memory_gib: float) -> None:
        """Renew what stands behind the progress."""
        parts = [] if loss is None else [f"loss {loss:.3g}"]
        parts += [] if clips_per_second is None else [f"{clips_per_second:.3g} clips/s"]
        self._facts = ", ".join([*parts, f"{memory_gib:.2g} GiB"])
        self._bar.set_postfix_str(self._facts, refresh=False)

    def step(self, done: int) -> None:
        """Say that `done` steps are done."""
        self._bar.update(done - self._done)
        self._done = done
        if not self._active or self._live:
            return
        now = time.monotonic()
        if now - self._spoken >= _PLAIN_SECONDS or done == self._total:
            self._spoken = now
            logger.info("%s", self.line())

    def line(self) -> str:
        """Return the progress as one plain line."""
        share = self._done / max(self._total, 1)
        line = f"{self._name}: {share:.0%} {self._done}/{self._total} steps"
        if self._facts:
            line += f", {self._facts}"
        here = self._done - self._first
        if here > 0 and self._done < self._total:
            left = (time.monotonic() - self._begun) / here * (self._total - self._done)
            line += f", {duration(left)} left"
        return line


def duration(seconds: float) -> str:
    """Return `45 s`, `3 min 5 s` or `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
