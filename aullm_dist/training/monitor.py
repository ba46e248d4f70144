"""TensorBoard scalars of one fold, logged by the main process; a resumed run purges what lies beyond its step."""

import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch


class Monitor:
    """Writes scalars in named groups below `RUN/tensorboard/<fold>`; does nothing where it is not active.

    Args:
        folder: event files go here.
        active: whether this process writes.
        purge_step: events at or beyond it are dropped, as a resumed run writes them anew; None keeps all.
    """

    def __init__(self, folder: Path, active: bool, purge_step: int | None) -> None:
        self._writer = None
        if active:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, group: str, values: dict[str, float | None], step: int) -> None:
        """Write `group/name` for each value that is a number."""
        if self._writer is not None:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(f"{group}/{name}", value, step)

    def metrics(self, summary: dict[str, Any], step: int) -> None:
        """Write mean and per-AU metrics of an evaluation."""
        self.scalars("heldout", summary["mean"], step)
        for name in ("f1_binary", "f1_macro", "auc"):
            self.scalars(f"heldout_{name}", {au: row[name] for au, row in summary["per_au"].items()}, step)

    def text(self, name: str, content: str) -> None:
        """Write a text, such as the resolved configuration."""
        if self._writer is not None:
            self._writer.add_text(name, content)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()


class Throughput:
    """Clips and LLM tokens per second since the last reading."""

    def __init__(self) -> None:
        self._since, self._clips, self._tokens = time.perf_counter(), 0, 0

    def add(self, clips: int, tokens: int) -> None:
        """Count work done."""
        self._clips += clips
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Return the rates, nothing if nothing was counted, and start counting anew."""
        if not self._clips:
            return {}
        seconds = max(time.perf_counter() - self._since, 1e-9)
        rates = {"clips_per_second": self._clips / seconds, "tokens_per_second": self._tokens / seconds}
        self.restart()
        return rates

    def restart(self) -> None:
        """Forget what was counted, after time that was spent on something else than training."""
        self._since, self._clips, self._tokens = time.perf_counter(), 0, 0


def memory_gib() -> dict[str, float]:
    """Return resident and peak memory of this process, and allocated and peak GPU memory where there is one, in GiB."""
    # ru_maxrss is in KiB on Linux and in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    values = {"host_gib": psutil.Process().memory_info().rss / 2**30, "host_peak_gib": peak / 2**30}
    if torch.cuda.is_available():
        values["gpu_gib"] = torch.cuda.memory_allocated() / 2**30
        values["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return values
