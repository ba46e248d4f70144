"""Warns about the health of a run: each warning once, in words, with what to do about it."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from aullm_dist.log import get_logger

logger = get_logger(__name__)

_DIVERGED, _SMOOTHING, _READINGS_BEFORE = 3.0, 0.3, 5
"""The smoothed loss this many times above its lowest has diverged, if so many readings were made before."""
_CLIPS_BEFORE = 200
"""Clips in which an intervention that can be drawn should have come at least once."""
_DATA_SHARE, _DATA_READINGS = 0.3, 3
"""A loop is bound by its data where so much of the step waits for them, so many readings in a row."""


class Health:
    """Watches the numbers of one fold, and speaks on the main process.

    Args:
        fold: number of the fold.
        expected: loss components that must come up: interventions with a chance, and `contradiction`.
        active: whether this process speaks.
    """

    def __init__(self, fold: int, expected: Sequence[str], active: bool) -> None:
        self._fold, self._active = fold, active
        self._silent = dict.fromkeys(expected)
        self._void = dict(self._silent)
        self._clips = 0
        self._loss = self._lowest = math.inf
        self._readings = self._data_bound = 0
        self._said: set[str] = set()

    @property
    def said(self) -> int:
        """How many warnings were logged."""
        return len(self._said)

    def labels(self, aus: Sequence[int], labels: np.ndarray) -> None:
        """Look at the labels `[n, A]` of the training side."""
        positives = (np.asarray(labels) != 0).sum(axis=0)
        for what, chosen in (("positive", positives == 0), ("negative", positives == len(labels))):
            names = ", ".join(f"AU{au}" for au, is_one in zip(aus, chosen, strict=True) if is_one)
            if names and len(labels):
                self._say(
                    f"no {what}",
                    f"no {what} among the {len(labels)} training clips for {names}: nothing can be learnt of it here, "
                    "and its scores say nothing; leave it out with data.aus, or train on more subjects",
                )

    def losses(self, losses: Mapping[str, float], clips: int, step: int) -> None:
        """Look at mean loss components of the last `clips` clips."""
        self._clips += clips
        for name, value in losses.items():
            self._silent.pop(name, None)
            if value != 0.0:
                self._void.pop(name, None)
        if self._clips >= _CLIPS_BEFORE:
            self._interventions()
        loss = losses.get("loss", math.nan)
        if not math.isfinite(loss):
            if losses:
                self._say(
                    "not finite",
                    f"the loss is {loss} at step {step}: steps whose gradient is not finite are skipped; if it stays, "
                    "lower training.lr_new and training.lr_lora, or use training.precision=fp32",
                )
            return
        self._readings += 1
        self._loss = loss if self._readings == 1 else self._loss + _SMOOTHING * (loss - self._loss)
        if self._readings > _READINGS_BEFORE and self._loss > _DIVERGED * self._lowest:
            self._say(
                "diverged",
                f"the loss has risen to {self._loss:.3g} at step {step}, from {self._lowest:.3g}: it diverges; lower "
                "training.lr_new and training.lr_lora, or lengthen training.warmup_fraction",
            )
        self._lowest = min(self._lowest, self._loss)

    def times(self, parts: Mapping[str, float], workers: int) -> None:
        """Look at where the time of a step goes: milliseconds of its parts, and in `total`."""
        if not parts:
            return
        share = parts["data"] / max(parts["total"], 1e-9)
        self._data_bound = self._data_bound + 1 if share > _DATA_SHARE else 0
        if self._data_bound >= _DATA_READINGS:
            self._say(
                "data",
                f"{share:.0%} of a step waits for clips: the run is bound by its data; raise data.workers (now "
                f"{workers}, at most the cores of a process), or put the prepared clips on a faster disk",
            )

    def parts(self, silent: Sequence[str]) -> None:
        """Warn about parts of the model that have never received a gradient."""
        for part in silent:
            self._say(
                f"gradient of {part}",
                f"no gradient has reached the {part} so far: it does not learn"
                + (
                    "; see training.graph_weight, and whether the answers move without the instruction token "
                    "(sensitivity/instruction)"
                    if part == "graph"
                    else "; nothing in the loss depends on it"
                ),
            )

    def _interventions(self) -> None:
        for name in self._silent:
            self._say(
                f"{name} never",
                f"the intervention {name} has not come up in {self._clips} clips, although it has a chance: it trains "
                f"nothing; raise counterfactual.{name}_probability or counterfactual.branches",
            )
        for name in self._void.keys() - self._silent.keys():
            self._say(
                f"{name} void",
                f"the term {name} was 0 in all of {self._clips} clips: it trains nothing; "
                + (
                    "AUs without relations to each other leave nothing to edit (model.structure, data.aus)"
                    if name == "structure"
                    else "the answers do not depend on what it changes"
                ),
            )

    def _say(self, key: str, message: str) -> None:
        if key in self._said:
            return
        self._said.add(key)
        if self._active:
            logger.warning("Fold %d: %s", self._fold, message)
