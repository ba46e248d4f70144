"""Explains a few held-out clips, always the same, at each evaluation."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from aullm_dist.config import Config
from aullm_dist.data.clips import ClipView, apex_index, sample_frames
from aullm_dist.data.order import generator
from aullm_dist.data.views import Stream, frames_for, view_of
from aullm_dist.distributed.engine import serving
from aullm_dist.distributed.team import Processes, gather_objects
from aullm_dist.model.counterfactual import remove_movement
from aullm_dist.model.relations import AURelations, sample_structure_edit

_KEPT = ("logits", "high", "content", "hidden", "evidence", "strengths", "influence")


@dataclass(frozen=True, slots=True)
class ExplainedTwins:
    """What the model made of the clips; arrays of the fields of `Explanation`, None where it has no such part.

    Attributes:
        factual: by field, of each shown clip.
        neutral: the same, of the neutral twins of the clips that are drawn.
        edited: the same, of those clips under an edited structure.
        mask: `[E]` the edited structure; None without a graph.
    """

    factual: dict[str, np.ndarray]
    neutral: dict[str, np.ndarray]
    edited: dict[str, np.ndarray]
    mask: np.ndarray | None


def choose_clips(labels: np.ndarray, first: int, total: int) -> list[int]:
    """Choose clips to show, the same for the same labels `[n, A]`.

    The `first` ones have as many different AUs among them as can be; the others, up to `total`, lie evenly among the
    rest.
    """
    chosen: list[int] = []
    missing = labels.any(axis=0)
    while len(chosen) < min(first, len(labels)):
        gain = (labels[:, missing] != 0).sum(axis=1).astype(float)
        gain[chosen] = -1.0
        best = int(gain.argmax())
        chosen.append(best)
        missing = missing & (labels[best] == 0)
        if not missing.any():
            missing = labels.any(axis=0)
    rest = np.setdiff1d(np.arange(len(labels)), chosen)
    wanted = min(max(total - len(chosen), 0), len(rest))
    return chosen + rest[np.linspace(0, len(rest) - 1, wanted).round().astype(int)].tolist() if wanted else chosen


class Explainer:
    """Explains fixed clips on all processes together.

    Args:
        accelerator: processes that train the fold together.
        config: the run's configuration.
        relations: of the AU graph; None without one.
        view: held-out clips.
        chosen: indices of the clips that are explained.
        drawn: how many of them, from the first, get counterfactual twins.
        stream: what the model is given of a clip.
    """

    def __init__(
        self,
        accelerator: Processes,
        config: Config,
        relations: AURelations | None,
        view: ClipView,
        chosen: Sequence[int],
        drawn: int,
        stream: Stream,
    ) -> None:
        self._accelerator, self._view, self._chosen = accelerator, view, list(chosen)
        self._num_frames, self._micro_batch = config.data.num_frames, config.training.micro_batch
        self._stream = stream
        self._seed, self._drawn = config.training.seed, min(drawn, len(self._chosen))
        self._prior: np.ndarray | None = None
        self._edit: np.ndarray | None = None
        if relations is not None:
            rng = generator(self._seed, "monitor", "structure")
            self._prior = relations.prior_mask
            self._edit = sample_structure_edit(relations, config.counterfactual.structure_edges, rng)

    def frames(self, place: int) -> np.ndarray:
        """Return the frames `[T, H, W]` of the chosen clip at `place`, in 0..1."""
        return sample_frames(self._view.clip(self._chosen[place]), self._num_frames)

    def late_frame(self, place: int) -> tuple[np.ndarray, str]:
        """Return the annotated apex frame `[H, W]` of the chosen clip at `place`, in 0..1, and what it is.

        Where there is no annotation it is the frame of the largest change (`most_changed`).
        """
        clip = self._view.clip(self._chosen[place])
        index, annotated = apex_index(clip)
        return clip.frames[index].astype(np.float32) / 255.0, "apex" if annotated else "largest change"

    def explain(self, model: nn.Module, tick: Callable[[], None] = lambda: None) -> ExplainedTwins | None:
        """Explain the clips; every process calls it, the main one gets the result.

        As in `HeldOut.answer` the plain model runs, every process as often, and `tick` may raise `Preempted`.
        """
        accelerator = self._accelerator
        total = len(self._chosen) + self._drawn * (1 + (self._prior is not None))
        found: list[tuple[int, dict[str, np.ndarray]]] = []
        with serving(accelerator, model) as plain:
            for places, counted in self._passes(total):
                found += self._of(plain, places)[:counted]
                tick()
        rows = dict(gather_objects(accelerator, found))
        if not accelerator.is_main_process:
            return None
        ends = (0, len(self._chosen), len(self._chosen) + self._drawn, total)
        parts = [[rows[i] for i in range(*span)] for span in zip(ends, ends[1:], strict=False)]
        factual, neutral, edited = (
            {k: np.stack([row[k] for row in part]) for k in (part or [{}])[0]} for part in parts
        )
        return ExplainedTwins(factual, neutral, edited, self._edit)

    def _passes(self, total: int) -> Iterator[tuple[list[int], int]]:
        """Yield the items of each forward pass of this process; who has run out repeats one that does not count."""
        processes, rank = self._accelerator.num_processes, self._accelerator.process_index
        mine = range(rank, total, processes)
        passes = math.ceil(math.ceil(total / processes) / self._micro_batch)
        for start in range(0, passes * self._micro_batch, self._micro_batch):
            chosen = list(mine[start : start + self._micro_batch])
            yield chosen or [0], len(chosen)

    def _of(self, plain: nn.Module, items: Sequence[int]) -> list[tuple[int, dict[str, np.ndarray]]]:
        device = self._accelerator.device
        views = torch.from_numpy(np.stack([self._item(i) for i in items])).to(device)
        masks = None
        if self._prior is not None:
            masks = torch.from_numpy(np.stack([self._item_mask(i) for i in items])).to(device)
        network: Any = plain  # the engine's wrapper is off: this is the AULLM
        given = network.explain(views, masks)
        kept = {}
        for name in _KEPT:
            value = getattr(given, name)
            if value is not None and value.numel():
                # Heads are shown together.
                kept[name] = (value.mean(dim=1) if name == "evidence" else value).cpu().numpy()
        return [(item, {name: value[row] for name, value in kept.items()}) for row, item in enumerate(items)]

    def _item(self, item: int) -> np.ndarray:
        """Return the view of an item: factual clips, then neutral twins, then clips with an edited structure."""
        first, drawn = len(self._chosen), self._drawn
        place = item if item < first else (item - first) % drawn
        frames = frames_for(self._view.clip(self._chosen[place]), self._num_frames, self._stream)
        if first <= item < first + drawn:
            frames = remove_movement(frames, frames[0], generator(self._seed, "monitor", "neutral", place))
        return view_of(frames, self._stream)

    def _item_mask(self, item: int) -> np.ndarray:
        mask = self._edit if item >= len(self._chosen) + self._drawn else self._prior
        assert mask is not None, "only a model with a graph has masks"
        return mask
