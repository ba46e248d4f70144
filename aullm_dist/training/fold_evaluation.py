"""Evaluates one fold: answers stored by sample id, scores, sensitivities, and what is shown of them."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from aullm_dist.config import Config
from aullm_dist.data.clips import ClipView
from aullm_dist.distributed.context import on_main
from aullm_dist.distributed.team import Processes
from aullm_dist.evaluation.answers import Answers
from aullm_dist.evaluation.metrics import summarise
from aullm_dist.evaluation.scores import Metric, MetricScores
from aullm_dist.files import write_text
from aullm_dist.log import get_logger
from aullm_dist.model.assembly import BuiltModel
from aullm_dist.model.aullm import Ablation, Stage
from aullm_dist.monitoring.pictures import Pictures
from aullm_dist.monitoring.writer import Monitor
from aullm_dist.runs.paths import FoldPaths
from aullm_dist.runs.predictions import Role, StoredPrediction, write_predictions
from aullm_dist.training.build import evaluation_recipe
from aullm_dist.training.heldout import HeldOut

logger = get_logger(__name__)

SENSITIVITY_WARNING = 0.005


class FoldEvaluation:
    """Answers the held-out clips of one fold and reports the scores.

    Args:
        accelerator: processes that train the fold together.
        config: the run's configuration.
        built: the model, as it was built.
        fold: number of the fold.
        views: held-out clips by role, `inner` and `test`.
        aus: AU numbers.
        tick: called after each micro-batch, may raise `Preempted`.
    """

    def __init__(
        self,
        accelerator: Processes,
        config: Config,
        built: BuiltModel,
        fold: int,
        views: Mapping[Role, ClipView],
        aus: tuple[int, ...],
        tick: Callable[[], None],
    ) -> None:
        self._accelerator, self._config, self._fold = accelerator, config, fold
        self._paths, self._aus, self._tick = FoldPaths(Path(config.training.output), fold), aus, tick
        self._views = {role: view for role, view in views.items() if len(view)}
        # Which held-out clips are shown while training; only `protocol: all` has no test side.
        self._shown: Role = "test" if "test" in self._views else "inner"
        self._soft_tokens, self._stages = built.soft_tokens, built.stages
        self._held_out = HeldOut(accelerator, evaluation_recipe(config, built), aus, config.training.micro_batch)
        self._pictures = None
        if config.monitor.watched and self._views:
            self._pictures = Pictures(accelerator, config, built, self._views[self._shown], aus)

    def evaluate(self, model: nn.Module, monitor: Monitor, step: int, epoch: int, *, last: bool) -> None:
        """Answer inner and test clips, store the logits by sample id, log metrics, sensitivities and pictures.

        Args:
            model: as the engine wraps it.
            monitor: of the fold.
            step: optimizer steps that are done.
            epoch: epochs that are done; names the file of the answers.
            last: whether no other evaluation follows.
        """
        answers = {
            role: self._held_out.answer(
                model,
                view,
                (*self._soft_tokens, *self._stages) if role == self._shown else (),
                self._tick,
                name=f"Evaluating on {role} clips",
            )
            for role, view in self._views.items()
        }
        if not answers:
            return
        rows = [row for role, given in answers.items() for row in _predictions(given[None], self._fold, role)]
        path = self._paths.predictions(epoch)
        on_main(self._accelerator, lambda: write_predictions(path, rows, aus=self._aus, epoch=epoch, step=step))
        shown = answers[self._shown]
        summary = summarise((shown[None].labels, shown[None].logits), self._aus)
        monitor.metrics(summary, step)
        message = f"Epoch {epoch}: held-out f1_macro {100 * summary['mean']['f1_macro']:.1f}"
        if self._soft_tokens:
            sensitivity = self._held_out.sensitivity(shown)
            on_main(self._accelerator, lambda: self._report_sensitivity(sensitivity, monitor, step, last))
            on_main(self._accelerator, lambda: self._write_others(shown, epoch, step))
            short = {"content": "CT", "instruction": "IT"}
            changes = [f"to {short[token]} {sensitivity[token]['mean_abs_change']:.3f}" for token in self._soft_tokens]
            message += f", sensitivity {', '.join(changes)}"
        if self._stages:
            message += f"; {self._report_ladder(shown, summary, monitor, step)}"
        logger.info(message)
        if self._pictures is not None:
            self._pictures.show(model, shown[None], monitor, step, self._tick)

    def _write_others(self, shown: Mapping[Ablation | Stage | None, Answers], epoch: int, step: int) -> None:
        """Keep the answers without each soft token and those of earlier stages, to be pooled over folds as others."""
        paths: dict[Ablation | Stage, Path] = {token: self._paths.zeroed(token) for token in self._soft_tokens}
        paths |= {stage: self._paths.stage(stage) for stage in self._stages}
        for variant, path in paths.items():
            rows = _predictions(shown[variant], self._fold, self._shown)
            write_predictions(path, rows, aus=self._aus, epoch=epoch, step=step)

    def _report_ladder(
        self, shown: Mapping[Ablation | Stage | None, Answers], summary: Mapping[str, Any], monitor: Monitor, step: int
    ) -> str:
        """Log the scores of every stage, the last being the answer, and return them in words."""
        means: dict[str, MetricScores] = {
            stage: summarise((shown[stage].labels, shown[stage].logits), self._aus)["mean"] for stage in self._stages
        }
        means["deduction"] = summary["mean"]
        scores: tuple[Metric, ...] = ("f1_macro", "auc")
        monitor.groups({f"ladder_{s}": {stage: mean[s] for stage, mean in means.items()} for s in scores}, step)
        return "ladder " + ", ".join(f"{stage} {100 * mean['f1_macro']:.1f}" for stage, mean in means.items())

    def _report_sensitivity(self, sensitivity: dict[str, Any], monitor: Monitor, step: int, last: bool) -> None:
        path = self._paths.sensitivity
        write_text(path, json.dumps({"step": step, **sensitivity}, indent=2) + "\n")
        changes: dict[str, float] = {token: sensitivity[token]["mean_abs_change"] for token in self._soft_tokens}
        monitor.scalars("sensitivity", changes, step)
        for token, change in changes.items():
            if last and change < SENSITIVITY_WARNING:
                logger.warning(
                    "Fold %d: zeroing the %s token changes the answers by %.4f on average: the LLM hardly uses it",
                    self._fold, token, change,
                )  # fmt: skip


def _predictions(answers: Answers, fold: int, role: Role) -> list[StoredPrediction]:
    return [
        StoredPrediction(sample_id, subject, corpus, fold, role, tuple(map(int, labels)), tuple(map(float, logits)))
        for sample_id, subject, corpus, labels, logits in zip(
            answers.sample_ids, answers.subjects, answers.corpora, answers.labels, answers.logits, strict=True
        )
    ]
