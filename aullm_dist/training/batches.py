"""Makes batches: clips of a view, their counterfactual twins, and the index tables that tie them into branches.

Everything random about a clip is keyed by (seed, epoch, sample id), never by rank or by a global generator, so that a
clip meets the same cut, augmentation and interventions whatever process draws it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from aullm_dist.data.clips import Clip, ClipView, augment
from aullm_dist.data.order import BatchPlan, SampleStream, generator
from aullm_dist.data.views import Stream, frames_for, view_of
from aullm_dist.model.counterfactual import Chances, change_appearance, draw_interventions, remove_movement
from aullm_dist.runtime.signals import stand_apart

if TYPE_CHECKING:
    # At run time it would bring pyarrow along, which training on arrays does without.
    from aullm_dist.data.inputs import InputClips

StructureEdit = Callable[[np.random.Generator], np.ndarray]


@dataclass(frozen=True, slots=True)
class ClipRecipe:
    """How a clip becomes tensors.

    Attributes:
        num_frames: T.
        cut_fraction: largest share cut off either end in training.
        augment: whether training clips are moved and scaled.
        neutral_share: share of training clips that are seen without their movement, with no AU as their label.
        chances: interventions to draw; none are drawn for evaluation.
        prior_mask: `[E]` edges of the factual structure; None without a graph.
        edit_structure: draws the edge mask of one structure intervention.
        contradiction: whether a neutral twin is also crossed with its clip.
        seed: key of every draw.
        visual: what a view holds.
    """

    num_frames: int
    cut_fraction: float = 0.0
    augment: bool = False
    neutral_share: float = 0.0
    chances: Chances = Chances(0, {})
    prior_mask: np.ndarray | None = None
    edit_structure: StructureEdit | None = None
    contradiction: bool = False
    seed: int = 0
    visual: Stream = "led"


@dataclass(slots=True)
class Sample:
    """One clip with its drawn twins; item 0 of each list is factual and `branches` index this sample's own lists."""

    sample_id: str
    label: np.ndarray
    views: list[np.ndarray]
    masks: list[np.ndarray | None]
    mask_views: list[int]
    branches: list[tuple[int, int]]
    kinds: list[str]


@dataclass(slots=True)
class Batch:
    """A micro-batch.

    Attributes:
        sample_ids: B ids.
        labels: `[B, A]`.
        views: `[V, C, H, W]` float32, what `data.views.view_of` makes of clips and twins.
        view_index: `[G]` view of each structure.
        edge_mask: `[G, E]` bool, or None without a graph.
        branches: `[K, 2]` (view, structure).
        rows: kind of branch -> (`[n]` rows of `branches`, `[n]` clips they belong to); `factual` has one row per clip.
        factual_structures: `[B]` structure of each clip's factual branch.
    """

    sample_ids: list[str]
    labels: Tensor
    views: Tensor
    view_index: Tensor
    edge_mask: Tensor | None
    branches: Tensor
    rows: dict[str, tuple[Tensor, Tensor]]
    factual_structures: Tensor
    _tensors: tuple[str, ...] = field(
        default=("labels", "views", "view_index", "edge_mask", "branches", "factual_structures"), repr=False
    )

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor to `device`, asynchronously from pinned memory."""
        for name in self._tensors:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.to(device, non_blocking=True))
        self.rows = {
            kind: (r.to(device, non_blocking=True), c.to(device, non_blocking=True))
            for kind, (r, c) in self.rows.items()
        }
        return self

    def pin_memory(self) -> "Batch":
        """Pin every tensor; called by the loader on CUDA machines."""
        for name in self._tensors:
            value = getattr(self, name)
            if value is not None:
                setattr(self, name, value.pin_memory())
        self.rows = {kind: (r.pin_memory(), c.pin_memory()) for kind, (r, c) in self.rows.items()}
        return self


def make_sample(view: "ClipView | InputClips", index: int, label: np.ndarray, recipe: ClipRecipe, epoch: int) -> Sample:
    """Decode clip `index`, augment it and draw its interventions for `epoch`."""
    return sample_of_clip(view.clip(index), label, recipe, epoch)


def sample_of_clip(clip: Clip, label: np.ndarray, recipe: ClipRecipe, epoch: int) -> Sample:
    """Augment a decoded clip and draw its interventions for `epoch`."""
    rng = generator(recipe.seed, "clip", epoch, clip.sample_id)
    cut = tuple(rng.uniform(0.0, recipe.cut_fraction, size=2)) if recipe.cut_fraction else (0.0, 0.0)
    frames = frames_for(clip, recipe.num_frames, recipe.visual, cut)
    if recipe.augment:
        # The onset frame passes through the same augmentation, as the neutral twin is made from it.
        onset = clip.frames[:1].astype(np.float32) / 255.0
        moved = augment(np.concatenate([frames, onset]), rng)
        frames, onset = moved[:-1], moved[-1]
    else:
        onset = clip.frames[0].astype(np.float32) / 255.0
    if recipe.neutral_share and rng.random() < recipe.neutral_share:
        frames, label = remove_movement(frames, onset, rng), np.zeros_like(label)
    sample = Sample(clip.sample_id, label, [frames], [recipe.prior_mask], [0], [(0, 0)], ["factual"])
    for kind in draw_interventions(recipe.chances, rng):
        _intervene(sample, kind, frames, onset, recipe, rng)
    # Last: flow is that of the changed frames.
    sample.views = [view_of(view, recipe.visual) for view in sample.views]
    return sample


def _intervene(
    sample: Sample, kind: str, frames: np.ndarray, onset: np.ndarray, recipe: ClipRecipe, rng: np.random.Generator
) -> None:
    if kind == "structure":
        assert recipe.edit_structure is not None
        _add(sample, kind, None, recipe.edit_structure(rng))
    elif kind == "appearance":
        _add(sample, kind, change_appearance(frames, rng), recipe.prior_mask)
    else:
        assert kind == "neutral", f"no twin is made for the intervention {kind}"
        view, structure = _add(sample, kind, remove_movement(frames, onset, rng), recipe.prior_mask)
        if recipe.contradiction:
            sample.branches += [(0, structure), (view, 0)]
            sample.kinds += ["evidence_only", "structure_only"]


def _add(sample: Sample, kind: str, frames: np.ndarray | None, mask: np.ndarray | None) -> tuple[int, int]:
    """Append a branch with a new view (or the factual one) and its structure; return both indices."""
    view = 0
    if frames is not None:
        view = len(sample.views)
        sample.views.append(frames)
    structure = len(sample.masks)
    sample.masks.append(mask)
    sample.mask_views.append(view)
    sample.branches.append((view, structure))
    sample.kinds.append(kind)
    return view, structure


def collate(samples: Sequence[Sample]) -> Batch:
    """Join samples into one batch; branches of a kind keep the order of their clips."""
    views: list[np.ndarray] = []
    view_index: list[int] = []
    masks: list[np.ndarray | None] = []
    branches: list[tuple[int, int]] = []
    rows: dict[str, tuple[list[int], list[int]]] = {}
    factual = []
    for clip, sample in enumerate(samples):
        first_view, first_structure = len(views), len(masks)
        factual.append(first_structure)
        views += sample.views
        masks += sample.masks
        view_index += [first_view + v for v in sample.mask_views]
        for (view, structure), kind in zip(sample.branches, sample.kinds, strict=True):
            row, owner = rows.setdefault(kind, ([], []))
            row.append(len(branches))
            owner.append(clip)
            branches.append((first_view + view, first_structure + structure))
    present = [mask for mask in masks if mask is not None]
    assert len(present) in (0, len(masks)), "either every structure has a mask, or the model has no graph"
    return Batch(
        sample_ids=[sample.sample_id for sample in samples],
        labels=torch.from_numpy(np.stack([sample.label for sample in samples])),
        views=torch.from_numpy(np.stack(views)),
        view_index=torch.tensor(view_index),
        edge_mask=torch.from_numpy(np.stack(present)) if present else None,
        branches=torch.tensor(branches),
        rows={kind: (torch.tensor(row), torch.tensor(owner)) for kind, (row, owner) in rows.items()},
        factual_structures=torch.tensor(factual),
    )


class _StreamDataset(Dataset):
    """Samples addressed by their position in the stream."""

    def __init__(self, view: ClipView, labels: np.ndarray, recipe: ClipRecipe, stream: SampleStream) -> None:
        self.view, self.labels, self.recipe, self.stream = view, labels, recipe, stream

    def __getitem__(self, position: int) -> Sample:
        epoch, index = self.stream.at(position)
        return make_sample(self.view, index, self.labels[index], self.recipe, epoch)


class _StepSampler:
    """Yields the micro-batches of this process from `first_step` to `last_step`."""

    def __init__(self, plan: BatchPlan, first_step: int, last_step: int) -> None:
        self.plan, self.first_step, self.last_step = plan, first_step, last_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.last_step):
            yield from self.plan.positions(step)

    def __len__(self) -> int:
        return (self.last_step - self.first_step) * self.plan.accumulation


def training_loader(
    view: ClipView,
    labels: np.ndarray,
    recipe: ClipRecipe,
    stream: SampleStream,
    plan: BatchPlan,
    steps: tuple[int, int],
    workers: int,
    pin: bool,
) -> DataLoader:
    """Return a loader of micro-batches for optimizer steps `steps[0]` (included) to `steps[1]` (excluded)."""
    return DataLoader(
        _StreamDataset(view, labels, recipe, stream),
        batch_sampler=_StepSampler(plan, *steps),
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
        worker_init_fn=stand_apart,
    )


def evaluation_batches(
    view: "ClipView | InputClips", labels: np.ndarray, recipe: ClipRecipe, micro_batch: int, processes: int, rank: int
) -> Iterator[tuple[Batch, int]]:
    """Yield this process's share of a view without any random draw, each batch with how many of its clips count.

    Over all processes every clip counts once. All processes get the same number of batches, because an engine that
    shards the parameters gathers them in every forward pass; who has run out repeats a clip that does not count.
    """
    mine = range(rank, len(view), processes)
    passes = math.ceil(math.ceil(len(view) / processes) / micro_batch)
    for start in range(0, passes * micro_batch, micro_batch):
        chosen = mine[start : start + micro_batch]
        clips = [make_sample(view, i, labels[i], recipe, epoch=0) for i in chosen or [0]]
        yield collate(clips), len(chosen)
