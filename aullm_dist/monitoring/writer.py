"""Writes for TensorBoard: scalars in named groups, texts, pictures, curves, histograms and hyperparameters.

Only the main process writes. What it writes is measured by every process in the same way, so that none of them is
slower than the others.
"""

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from aullm_dist.evaluation.scores import Metric, Scores
from aullm_dist.monitoring.events import EventFile
from aullm_dist.monitoring.trackers import Tracker

_THRESHOLDS = 64
"""Points of a precision-recall curve."""
LOSS = "Loss"
"""Group of the losses. TensorBoard opens with the first group, and its order puts capitals before small letters: else a
reader's first sight are the single dots of scores and pictures."""
LAYOUT: Mapping[str, Mapping[str, Sequence[str]]] = {
    "Is the run healthy?": {
        "loss and its largest part": ["Loss/loss", "Loss/asl"],
        "held-out scores": ["heldout/f1_macro", "heldout/f1_binary", "heldout/auc"],
        "gradient norm, before clipping": ["train/grad_norm"],
        "milliseconds of a step": [
            "step_ms/data", "step_ms/forward", "step_ms/backward", "step_ms/optimizer", "step_ms/communication_wait",
        ],
        "clips per second": ["train/clips_per_second"],
        "memory, GiB": ["memory/gpu_gib", "memory/gpu_peak_gib", "memory/host_gib", "memory/host_peak_gib"],
        "what the answers owe to each token": ["sensitivity/content", "sensitivity/instruction"],
        "f1_macro stage by stage": [
            "ladder_f1_macro/evidence", "ladder_f1_macro/structure", "ladder_f1_macro/deduction",
        ],
        "learning rates": ["lr/lora", "lr/new", "lr/led"],
    },
    "Counterfactual consistency": {
        "terms": ["Loss/structure", "Loss/appearance", "Loss/neutral", "Loss/contradiction"],
        "losses of single stages": ["Loss/evidence", "Loss/graph"],
    },
}  # fmt: skip
"""TensorBoard's page "Custom scalars": categories of charts, each with its scalars."""


class Monitor:
    """Writes one TensorBoard run; does nothing where it is not active.

    Args:
        folder: event files go here.
        active: whether this process writes.
        purge_step: events at or beyond it are dropped, as a resumed run writes them again; None keeps all.
        trackers: are given the same scalars and pictures.
    """

    def __init__(self, folder: Path, active: bool, purge_step: int | None, trackers: Sequence[Tracker] = ()) -> None:
        self.folder, self._trackers = folder, trackers
        self._file = EventFile(folder, purge_step) if active else None

    @property
    def works(self) -> bool:
        """Whether anything that is drawn here has a chance to be seen."""
        return (self._file is not None and self._file.works) or any(tracker.works for tracker in self._trackers)

    def groups(self, groups: Mapping[str, Mapping[str, float | None]], step: int) -> None:
        """Write `group/name` for each value that is a number, all in one event."""
        if self._file is None and not self._trackers:
            return
        tags = {f"{g}/{name}": v for g, values in groups.items() for name, v in values.items() if v is not None}
        if self._file is not None:
            self._file.scalars(tags, step)
        for tracker in self._trackers:
            tracker.scalars(tags, step)

    def scalars(self, group: str, values: Mapping[str, float | None], step: int) -> None:
        """Write `group/name` for each value that is a number."""
        self.groups({group: values}, step)

    def metrics(self, summary: Scores, step: int) -> None:
        """Write mean and per-AU metrics of an evaluation."""
        names: tuple[Metric, ...] = ("f1_binary", "f1_macro", "auc")
        groups: dict[str, dict[str, float | None]] = {"heldout": {name: summary["mean"][name] for name in names}}
        for name in names:
            groups[f"heldout_{name}"] = {au: row[name] for au, row in summary["per_au"].items()}
        self.groups(groups, step)

    def text(self, name: str, content: str, step: int = 0) -> None:
        """Write a text, such as the resolved configuration; Markdown is rendered."""
        if self._file is not None:
            from torch.utils.tensorboard.summary import text

            self._file.summary(text(name, content), step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Write a picture, `[H, W, 3]` uint8."""
        if self._file is not None:
            from torch.utils.tensorboard.summary import image

            self._file.summary(image(name, pixels, dataformats="HWC"), step)
        for tracker in self._trackers:
            tracker.picture(name, pixels, step)

    def curve(self, name: str, labels: np.ndarray, probabilities: np.ndarray, step: int) -> None:
        """Write a precision-recall curve from labels and probabilities `[n]`."""
        if self._file is not None:
            from torch.utils.tensorboard.summary import pr_curve

            self._file.summary(pr_curve(name, labels, probabilities, _THRESHOLDS), step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Write a histogram of finite values."""
        if self._file is not None and len(values):
            from torch.utils.tensorboard.summary import histogram

            self._file.summary(histogram(name, values, bins="auto"), step)

    def layout(self) -> None:
        """Write the layout of the page that says whether the run is healthy."""
        if self._file is not None:
            from torch.utils.tensorboard.summary import custom_scalars

            layout = {
                category: {title: ["Multiline", list(tags)] for title, tags in charts.items()}
                for category, charts in LAYOUT.items()
            }
            self._file.summary(custom_scalars(layout), 0)

    def hyperparameters(self, settings: Mapping[str, Any], metrics: Mapping[str, float | None], step: int) -> None:
        """Write settings with the metrics that they led to, for TensorBoard's page of hyperparameters."""
        if self._file is not None:
            from torch.utils.tensorboard.summary import hparams

            found = {f"final/{name}": value for name, value in metrics.items() if value is not None}
            for summary in hparams(dict(settings), found):
                self._file.summary(summary, step)
            self._file.scalars(found, step)

    def failed(self, problem: str) -> None:
        """Say once that what is next to the event file could not be written, and write no more."""
        if self._file is not None:
            self._file.failed(problem)

    def close(self) -> bool:
        """Flush and close the event file, and end the trackers; whether the event file holds everything."""
        for tracker in self._trackers:
            tracker.finish()
        return self._file is not None and self._file.close()


class Throughput:
    """Clips and LLM tokens per second since the last reading."""

    def __init__(self) -> None:
        self._since, self._clips, self._tokens = time.perf_counter(), 0, 0

    def add(self, clips: int, tokens: int) -> None:
        """Count work done."""
        self._clips += clips
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Return the rates, nothing if nothing was counted, and restart counting."""
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
