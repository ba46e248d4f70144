"""Answers on held-out clips, every clip once over all processes, and what the answers owe to CT and IT."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from aullm_dist.data.clips import ClipView
from aullm_dist.model.aullm import Ablation
from aullm_dist.training.batches import ClipRecipe, evaluation_batches

Score = Callable[[tuple[np.ndarray, np.ndarray], Sequence[int]], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Answers:
    """Labels and logits `[n, A]` of a view's clips, in the view's own order."""

    sample_ids: tuple[str, ...]
    subjects: tuple[str, ...]
    corpora: tuple[str, ...]
    labels: np.ndarray
    logits: np.ndarray


class HeldOut:
    """Runs a model over views of held-out clips.

    Args:
        accelerator: the run's Accelerator.
        recipe: how held-out clips become tensors.
        aus: AU numbers of the columns.
        micro_batch: clips per forward pass.
    """

    def __init__(self, accelerator: Accelerator, recipe: ClipRecipe, aus: Sequence[int], micro_batch: int) -> None:
        self.accelerator, self.recipe, self.aus, self.micro_batch = accelerator, recipe, tuple(aus), micro_batch

    def answer(self, model: nn.Module, view: ClipView, ablate: Ablation | None = None) -> Answers:
        """Return the logits of every clip of `view`, on every process.

        The plain model runs, not its distributed wrapper: there is nothing to synchronise, and the processes may have
        different numbers of clips.
        """
        accelerator = self.accelerator
        labels = view.labels(self.aus)
        plain = accelerator.unwrap_model(model)
        was_training = plain.training
        plain.eval()
        mine: list[tuple[str, list[float]]] = []
        batches = evaluation_batches(
            view, labels, self.recipe, self.micro_batch, accelerator.num_processes, accelerator.process_index
        )
        with torch.no_grad(), accelerator.autocast():
            for batch in batches:
                batch = batch.to(accelerator.device)
                output = plain(batch.views, batch.view_index, batch.edge_mask, batch.branches, ablate)
                rows = output.logits[batch.rows["factual"][0]].float().cpu().tolist()
                mine += list(zip(batch.sample_ids, rows, strict=True))
        plain.train(was_training)
        by_id = dict(gather_object(mine))
        assert len(by_id) == len(view), f"{len(by_id)} answers for {len(view)} clips"
        samples = view.samples
        return Answers(
            tuple(s.sample_id for s in samples),
            tuple(s.subject for s in samples),
            tuple(s.corpus for s in samples),
            labels,
            np.array([by_id[s.sample_id] for s in samples], dtype=np.float64),
        )

    def sensitivity(self, model: nn.Module, view: ClipView, full: Answers, score: Score) -> dict[str, Any]:
        """Measure what the answers owe to the soft tokens, by zeroing all of one kind.

        Returns:
            For `content` and `instruction`: `mean_abs_change` of the probabilities and `f1_macro` without that token.
        """
        result: dict[str, Any] = {"f1_macro": score((full.labels, full.logits), self.aus)["mean"]["f1_macro"]}
        for token in ("content", "instruction"):
            without = self.answer(model, view, ablate=token)
            change = np.abs(_sigmoid(full.logits) - _sigmoid(without.logits)).mean()
            mean = score((without.labels, without.logits), self.aus)["mean"]
            result[token] = {"mean_abs_change": float(change), "f1_macro": mean["f1_macro"]}
        return result


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logits))
