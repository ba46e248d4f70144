"""Computes what a trained checkpoint makes of prepared clips on the way to its answers, as numpy arrays for figures.

Shapes: n clips, A action units, F visual features, D LLM width, H evidence heads, N cells, E edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from tqdm import tqdm

from aullm_dist.data.clips import ClipStore, sample_frames
from aullm_dist.distributed import engine
from aullm_dist.errors import UserError
from aullm_dist.model.aullm import Explanation
from aullm_dist.model.relations import AURelations
from aullm_dist.model.visual import cell_grid_of
from aullm_dist.training.batches import evaluation_batches
from aullm_dist.training.build import evaluation_recipe
from aullm_dist.training.trained import Trained, load_trained


@dataclass(frozen=True, slots=True)
class ExplainedClips:
    """The clips of some datasets and what one checkpoint makes of them.

    Attributes:
        checkpoint: its folder.
        aus: AU numbers.
        sample_ids, subjects, corpora: of the n clips.
        labels: `[n, A]`, 0 or 1.
        steps: name of a field of `Explanation` -> its values `[n, ...]`; fields that the model has not are left out.
        relations: the graph's edges; None without a graph.
        cell_grid: texture cells (time, rows, columns).
        num_frames: frames T that the model is given of a clip.
    """

    checkpoint: Path
    aus: tuple[int, ...]
    sample_ids: tuple[str, ...]
    subjects: tuple[str, ...]
    corpora: tuple[str, ...]
    labels: np.ndarray
    steps: dict[str, np.ndarray]
    relations: AURelations | None
    cell_grid: tuple[int, int, int]
    num_frames: int


def explain_clips(accelerator: Accelerator, trained: Trained, store: ClipStore) -> ExplainedClips:
    """Answer every clip of `store` and keep what led to the answers; for one process.

    Args:
        accelerator: from `context.start`.
        trained: from `find_trained`.
        store: prepared clips of the image size that the checkpoint takes.

    Raises:
        UserError: the checkpoint or its LLM cannot be used, or its features are not finite.
    """
    assert accelerator.num_processes == 1
    config = trained.config
    built, model = load_trained(accelerator, trained)
    view = store.view([sample.sample_id for sample in store.samples])
    labels = view.labels(trained.aus)
    batches = evaluation_batches(view, labels, evaluation_recipe(config, built), config.training.micro_batch, 1, 0)
    parts: list[Explanation] = []
    with tqdm(total=len(view), desc="Explaining", unit="clip", delay=3.0, leave=False, disable=None) as bar:
        for batch, counted in batches:
            batch = batch.to(accelerator.device)
            network: Any = built.model
            said: Explanation = network.explain(batch.views, batch.edge_mask)
            parts.append(Explanation._make(None if value is None else value[:counted].cpu() for value in said))
            bar.update(counted)
    engine.release(accelerator, model)
    steps = {
        name: np.concatenate([getattr(part, name).numpy() for part in parts])
        for name in Explanation._fields
        if getattr(parts[0], name) is not None
    }
    if not all(np.isfinite(values).all() for values in steps.values()):
        raise UserError(f"{trained.folder}: features are not finite; the training has diverged, or the LLM is damaged")
    samples = view.samples
    return ExplainedClips(
        trained.folder, trained.aus, tuple(s.sample_id for s in samples), tuple(s.subject for s in samples),
        tuple(s.corpus for s in samples), labels, steps, built.relations,
        cell_grid_of(config.data.num_frames, config.data.size), config.data.num_frames,
    )  # fmt: skip


def frames_of(store: ClipStore, sample_ids: Sequence[str], num_frames: int) -> np.ndarray:
    """Return the frames that a model is given of some clips, `[n, T, H, W]` float32 in 0..1."""
    view = store.view(sample_ids)
    return np.stack([sample_frames(view.clip(index), num_frames) for index in range(len(view))])
