"""Answers on held-out clips, every clip once over all processes, and what the answers owe to CT and IT."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from aullm_dist.data.clips import ClipView
from aullm_dist.distributed.engine import serving
from aullm_dist.distributed.team import Processes, gather_objects, is_alone
from aullm_dist.evaluation.answers import Answers, sigmoid
from aullm_dist.evaluation.metrics import summarise
from aullm_dist.model.aullm import Ablation, Stage
from aullm_dist.training.batches import Batch, ClipRecipe, evaluation_batches

if TYPE_CHECKING:
    # At run time it would bring pyarrow along, which training on arrays does without.
    from aullm_dist.data.inputs import InputClips

_SHOWN_AFTER_SECONDS = 3.0


class HeldOut:
    """Runs a model over views of held-out clips.

    Args:
        accelerator: processes that train the fold together.
        recipe: how held-out clips become tensors.
        aus: AU numbers of the columns.
        micro_batch: clips per forward pass.
    """

    def __init__(self, accelerator: Processes, recipe: ClipRecipe, aus: Sequence[int], micro_batch: int) -> None:
        self.accelerator, self.recipe, self.aus, self.micro_batch = accelerator, recipe, tuple(aus), micro_batch

    def answer(
        self,
        model: nn.Module,
        view: "ClipView | InputClips",
        others: Sequence[Ablation | Stage] = (),
        tick: Callable[[], None] = lambda: None,
        *,
        name: str = "Held-out clips",
    ) -> dict[Ablation | Stage | None, Answers]:
        """Return the logits of every clip of `view`, on every process: under None the answer, and each of `others`.

        Those are the answers without a kind of soft tokens, and the answers of earlier stages.

        The plain model runs, not its distributed wrapper: there is nothing to synchronise, and the processes may have
        different numbers of clips. Each clip is decoded once, whatever the number of others. If it takes longer
        than a moment, a progress bar called `name` counts the clips. `tick` is called after each micro-batch, as often
        on every process, and may raise `Preempted` to leave.
        """
        accelerator = self.accelerator
        labels = view.labels(self.aus)
        variants = (None, *others)
        mine: list[tuple[str, list[list[float]]]] = []
        batches = evaluation_batches(
            view, labels, self.recipe, self.micro_batch, accelerator.num_processes, accelerator.process_index
        )
        bar = tqdm(
            total=len(view),
            desc=name,
            unit="clip",
            disable=not is_alone(accelerator) or not accelerator.is_main_process,
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
        by_id = dict(gather_objects(accelerator, mine))
        assert len(by_id) == len(view), f"{len(by_id)} answers for {len(view)} clips"
        samples = view.samples
        table = np.array([by_id[s.sample_id] for s in samples], dtype=np.float64)
        ids, subjects, corpora = zip(*((s.sample_id, s.subject, s.corpus) for s in samples), strict=True)
        return {
            ablate: Answers(ids, subjects, corpora, labels, table[:, column]) for column, ablate in enumerate(variants)
        }

    def _logits(
        self, plain: nn.Module, batch: Batch, variants: Sequence[Ablation | Stage | None]
    ) -> list[tuple[str, list[list[float]]]]:
        batch = batch.to(self.accelerator.device)
        factual = batch.rows["factual"][0]
        inputs = (batch.views, batch.view_index, batch.edge_mask, batch.branches)
        whole = plain(*inputs)
        rows = []
        for variant in variants:
            if variant is None:
                rows.append(whole.logits[factual])
            elif variant in get_args(Stage):
                rows.append(whole.stage(variant, *batch.branches[factual].unbind(1)))
            else:
                rows.append(plain(*inputs, variant).logits[factual])
        return list(zip(batch.sample_ids, torch.stack(rows, dim=1).float().cpu().tolist(), strict=True))

    def sensitivity(self, answers: Mapping[Ablation | Stage | None, Answers]) -> dict[str, Any]:
        """Measure what the answers owe to each soft token, from the answers with all tokens of that kind zeroed.

        Returns:
            `f1_macro` of the model as it is and, per ablation, `mean_abs_change` of the probabilities and `f1_macro`.
        """
        full = answers[None]
        result: dict[str, Any] = {"f1_macro": self._f1_macro(full)}
        for token, without in answers.items():
            if token is not None and token in get_args(Ablation):
                change = np.abs(sigmoid(full.logits) - sigmoid(without.logits)).mean()
                result[token] = {"mean_abs_change": float(change), "f1_macro": self._f1_macro(without)}
        return result

    def _f1_macro(self, answers: Answers) -> float:
        return summarise((answers.labels, answers.logits), self.aus)["mean"]["f1_macro"]
