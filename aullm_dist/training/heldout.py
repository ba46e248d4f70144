"""Answers on held-out clips, every clip once over all processes, and what the answers owe to CT and IT."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn
from tqdm import tqdm

from aullm_dist.data.clips import ClipView
from aullm_dist.model.aullm import Ablation
from aullm_dist.training.batches import Batch, ClipRecipe, evaluation_batches
from aullm_dist.training.engine import settle
from aullm_dist.training.preemption import Preempted

_SHOWN_AFTER_SECONDS = 3.0
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

    def answer(
        self,
        model: nn.Module,
        view: ClipView,
        ablations: Sequence[Ablation] = (),
        tick: Callable[[], None] = lambda: None,
        *,
        name: str = "Held-out clips",
    ) -> dict[Ablation | None, Answers]:
        """Return the logits of every clip of `view`, on every process: under None as the model is, and per ablation.

        The plain model runs, not its distributed wrapper: there is nothing to synchronise, and the processes may have
        different numbers of clips. Each clip is decoded once, whatever the number of ablations. If it takes longer
        than a moment, a progress bar called `name` counts the clips. `tick` is called after each micro-batch, as often
        on every process, and may raise `Preempted` to leave.
        """
        accelerator = self.accelerator
        labels = view.labels(self.aus)
        variants = (None, *ablations)
        mine: list[tuple[str, list[list[float]]]] = []
        batches = evaluation_batches(
            view, labels, self.recipe, self.micro_batch, accelerator.num_processes, accelerator.process_index
        )
        bar = tqdm(
            total=len(view),
            desc=name,
            unit="clip",
            disable=not accelerator.is_main_process,
            delay=_SHOWN_AFTER_SECONDS,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            dynamic_ncols=True,
            leave=False,
        )
        with serving(accelerator, model) as plain, torch.no_grad(), bar:
            for batch, counted in batches:
                mine += self._logits(plain, batch, variants)[:counted]
                # The clips of the others are as far.
                bar.update(min(counted * accelerator.num_processes, len(view) - bar.n))
                tick()
        by_id = dict(gather_object(mine))
        assert len(by_id) == len(view), f"{len(by_id)} answers for {len(view)} clips"
        samples = view.samples
        table = np.array([by_id[s.sample_id] for s in samples], dtype=np.float64)
        ids, subjects, corpora = zip(*((s.sample_id, s.subject, s.corpus) for s in samples), strict=True)
        return {
            ablate: Answers(ids, subjects, corpora, labels, table[:, column]) for column, ablate in enumerate(variants)
        }

    def _logits(
        self, plain: nn.Module, batch: Batch, variants: Sequence[Ablation | None]
    ) -> list[tuple[str, list[list[float]]]]:
        batch = batch.to(self.accelerator.device)
        factual = batch.rows["factual"][0]
        rows = [
            plain(batch.views, batch.view_index, batch.edge_mask, batch.branches, ablate).logits[factual]
            for ablate in variants
        ]
        return list(zip(batch.sample_ids, torch.stack(rows, dim=1).float().cpu().tolist(), strict=True))

    def sensitivity(self, answers: Mapping[Ablation | None, Answers], score: Score) -> dict[str, Any]:
        """Measure what the answers owe to each soft token, from the answers with all tokens of that kind zeroed.

        Returns:
            `f1_macro` of the model as it is and, per ablation, `mean_abs_change` of the probabilities and `f1_macro`.
        """
        full = answers[None]
        result: dict[str, Any] = {"f1_macro": self._f1_macro(full, score)}
        for token, without in answers.items():
            if token is not None:
                change = np.abs(sigmoid(full.logits) - sigmoid(without.logits)).mean()
                result[token] = {"mean_abs_change": float(change), "f1_macro": self._f1_macro(without, score)}
        return result

    def _f1_macro(self, answers: Answers, score: Score) -> float:
        return score((answers.labels, answers.logits), self.aus)["mean"]["f1_macro"]


@contextmanager
def serving(accelerator: Accelerator, model: nn.Module) -> Iterator[nn.Module]:
    """Give the plain model in evaluation mode, and leave the engine with nothing on its way, also when `Preempted`."""
    plain = accelerator.unwrap_model(model)
    was_training = plain.training
    plain.eval()
    try:
        yield plain
    except Preempted:
        settle(model)  # what follows is a save
        raise
    settle(model)
    plain.train(was_training)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits."""
    return 1.0 / (1.0 + np.exp(-logits))
