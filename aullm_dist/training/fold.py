"""Training of one fold: the explicit loop, its evaluations, its checkpoints and its resume."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from aullm_dist.config import Config, to_dict
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.protocols import Fold
from aullm_dist.files import write_text
from aullm_dist.log import all_loggers, get_logger
from aullm_dist.model.aullm import Ablation
from aullm_dist.signals import stand_apart
from aullm_dist.training.batches import collate, training_loader
from aullm_dist.training.build import BuiltModel, evaluation_recipe, training_recipe
from aullm_dist.training.checkpoint import read_checkpoint, save_checkpoint
from aullm_dist.training.context import on_main, together
from aullm_dist.training.guard import GradientGuard
from aullm_dist.training.heldout import Answers, HeldOut, Score
from aullm_dist.training.life import Life
from aullm_dist.training.monitor import Monitor, Throughput, memory_gib
from aullm_dist.training.objective import Objective
from aullm_dist.training.order import BatchPlan, SampleStream, generator, total_steps
from aullm_dist.training.predictions import Prediction, prediction_path, write_predictions, zeroed_path
from aullm_dist.training.preemption import Preempted
from aullm_dist.training.retention import find_newest_valid, rotate
from aullm_dist.training.step import LossLog, TrainStep
from aullm_dist.training.streaming import StreamedBatches

logger = get_logger(__name__)

SENSITIVITY_WARNING = 0.005


@dataclass(frozen=True, slots=True)
class FoldPaths:
    """Where a fold keeps what it writes."""

    run: Path
    fold: int

    @property
    def folder(self) -> Path:
        """`RUN/fold-00`."""
        return self.run / f"fold-{self.fold:02d}"

    @property
    def checkpoints(self) -> Path:
        """Folder of the fold's checkpoints."""
        return self.folder / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        """Folder of the fold's event files."""
        return self.run / "tensorboard" / f"fold-{self.fold:02d}"


class FoldTrainer:
    """Trains the trainables of one model on one fold.

    Args:
        accelerator: the run's Accelerator.
        config: the run's configuration.
        built: the model, in its initial state, on the accelerator's device.
        model: the same model as the engine wraps it.
        optimizer: the engine's optimizer over the model's trainables, with nothing seen yet.
        store: all clips.
        fold: which clips train, choose thresholds and test.
        aus: AU numbers.
        score: turns labels and logits into metrics (evaluation's business, handed down).
        life: agrees with the other processes when this one is asked to stop.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        config: Config,
        built: BuiltModel,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        store: ClipStore,
        fold: Fold,
        aus: tuple[int, ...],
        score: Score,
        life: Life,
    ) -> None:
        self.accelerator, self.config, self.built, self.life = accelerator, config, built, life
        self.model, self.optimizer = model, optimizer
        self.aus, self.score = aus, score
        self.fold = fold
        self.paths = FoldPaths(Path(config.training.output), fold.index)
        # The loop below only ever sees these views: the training view cannot reach an inner or a test clip.
        self.train_view = store.view(fold.train)
        self.inner_view, self.test_view = store.view(fold.inner), store.view(fold.test)
        self.parquet = store.parquet_of(fold.train) if config.data.streaming else []
        training = config.training
        self.stream = SampleStream(len(self.train_view), training.seed)
        self.plan = BatchPlan(
            training.global_batch, training.micro_batch, accelerator.num_processes, accelerator.process_index
        )
        self.total_steps = total_steps(len(self.train_view), training.epochs, training.global_batch, training.max_steps)
        self.guard = GradientGuard(optimizer, training.max_bad_steps, fold.index)
        self.step = TrainStep(
            accelerator,
            model,
            [p for p in built.model.parameters() if p.requires_grad],
            Objective.from_config(config),
            training,
            self.guard,
            accumulation=self.plan.accumulation,
            tokens=built.tokens,
        )
        self.held_out = HeldOut(accelerator, evaluation_recipe(config, built), aus, training.micro_batch)
        # Which held-out clips are shown while training; only `protocol: all` has no test side.
        self.shown = "test" if len(self.test_view) else "inner"
        self.soft_tokens = built.soft_tokens
        # Optimizer steps that are done, and those that are in the newest checkpoint.
        self.done = self.saved = 0

    def run(self, resume: bool) -> None:
        """Train to the last step, when resuming from the newest valid checkpoint; leaves checkpoint and answers.

        Raises:
            Preempted: all processes were asked to stop; what is done is in a checkpoint.
        """
        logger.info(
            "Fold %d (%s): %d training, %d inner and %d test clips, %d steps of %d clips",
            self.fold.index, self.fold.name, len(self.fold.train), len(self.fold.inner), len(self.fold.test),
            self.total_steps, self.config.training.global_batch,
        )  # fmt: skip
        first_step = self.done = self.saved = self._restore() if resume else 0
        active = self.config.monitor.tensorboard and self.accelerator.is_main_process
        monitor = Monitor(self.paths.tensorboard, active, first_step + 1 if resume else None)
        try:
            if first_step == 0:
                monitor.text("config", f"```\n{json.dumps(to_dict(self.config), indent=2)}\n```")
            # A run that was stopped in an evaluation has its checkpoint, but not its answers.
            if first_step and self._evaluates_at(first_step) and not self._has_answers(first_step):
                self._evaluate(monitor, first_step)
            if first_step < self.total_steps:
                self._train(monitor, first_step)
        except Preempted as stop:
            if self.saved < self.done:
                self.guard.settle()
                self._save(self.done)
            stop.fold, stop.step = self.fold.index, self.done
            raise
        finally:
            monitor.close()

    def _train(self, monitor: Monitor, first_step: int) -> None:
        loader = self._loader(first_step)
        bar = tqdm(
            total=self.total_steps,
            initial=first_step,
            desc=f"Fold {self.fold.index}",
            unit="step",
            disable=not self.accelerator.is_main_process,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            dynamic_ncols=True,
        )
        self.model.train()
        batches = iter(loader)
        log, rate = LossLog(self.accelerator), Throughput()
        with bar, logging_redirect_tqdm(all_loggers()):
            for step in range(first_step, self.total_steps):
                self.step.run(batches, step, self.total_steps, log, rate, self.life.agreement.tick)
                done = self.done = step + 1
                self.life.completed_step()
                if done % self.config.monitor.log_every_steps == 0 or done == self.total_steps:
                    self.guard.settle()
                    losses = log.read()
                    bar.set_postfix_str(_short(losses), refresh=False)
                    monitor.scalars("loss", losses, done)
                    rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
                    monitor.scalars("lr", rates, done)
                    monitor.scalars(
                        "train", {"grad_norm": self.guard.last_norm, "epoch": self._epoch(done), **rate.read()}, done
                    )
                    monitor.scalars("memory", memory_gib(), done)
                bar.update()
                if self._evaluates_at(done) or self._saves_at(done) or self.life.rehearses:
                    self.guard.settle()
                if self._evaluates_at(done):
                    self._evaluate(monitor, done)
                    rate.restart()
                # A job learns with its first step whether a save works and fits into its grace period.
                if self._saves_at(done) or self.life.rehearses:
                    self._save(done)
                    rate.restart()

    def _loader(self, first_step: int) -> DataLoader:
        data, labels = self.config.data, self._training_labels()
        recipe, steps = training_recipe(self.config, self.built), (first_step, self.total_steps)
        pin = self.accelerator.device.type == "cuda"
        if not data.streaming:
            return training_loader(
                self.train_view, labels, recipe, self.stream, self.plan, steps, data.workers, pin=pin
            )
        by_name = {sample.sample_id: row for sample, row in zip(self.train_view.samples, labels, strict=True)}
        batches = StreamedBatches(
            self.parquet, by_name, recipe, self.plan, steps, seed=self.config.training.seed, buffer=data.shuffle_buffer
        )
        workers = min(data.workers, 1)
        return DataLoader(
            batches, batch_size=None, collate_fn=collate, num_workers=workers, pin_memory=pin,
            worker_init_fn=stand_apart,
        )  # fmt: skip

    def _training_labels(self) -> np.ndarray:
        labels = self.train_view.labels(self.aus)
        if self.config.data.shuffle_labels:
            labels = labels[generator(self.config.training.seed, "shuffled labels").permutation(len(labels))]
        return labels

    def _epoch(self, step: int) -> float:
        return step * self.config.training.global_batch / len(self.train_view)

    def _evaluates_at(self, step: int) -> bool:
        if step == self.total_steps:
            return True
        every = self.config.training.evaluate_every_epochs
        return int(self._epoch(step)) // every > int(self._epoch(step - 1)) // every

    def _saves_at(self, step: int) -> bool:
        every = self.config.training.save_every_steps
        return step == self.total_steps or (step % every == 0 if every else self._evaluates_at(step))

    def _evaluate(self, monitor: Monitor, step: int) -> None:
        """Answer inner and test clips, store the logits by sample id, log metrics and sensitivities."""
        views = {"inner": self.inner_view, "test": self.test_view}
        answers = {
            role: self.held_out.answer(
                self.model,
                view,
                self.soft_tokens if role == self.shown else (),
                self.life.agreement.tick,
                name=f"Evaluating on {role} clips",
            )  # fmt: skip
            for role, view in views.items()
            if len(view)
        }
        if not answers:
            return
        epoch = int(self._epoch(step))
        rows = [row for role, given in answers.items() for row in _predictions(given[None], self.fold.index, role)]
        path = prediction_path(self.paths.run, self.fold.index, epoch)
        on_main(self.accelerator, lambda: write_predictions(path, rows, aus=self.aus, epoch=epoch, step=step))
        shown = answers[self.shown]
        summary = self.score((shown[None].labels, shown[None].logits), self.aus)
        monitor.metrics(summary, step)
        message = f"Epoch {epoch}: held-out f1_macro {100 * summary['mean']['f1_macro']:.1f}"
        if self.soft_tokens:
            sensitivity = self.held_out.sensitivity(shown, self.score)
            on_main(self.accelerator, lambda: self._report_sensitivity(sensitivity, monitor, step))
            on_main(self.accelerator, lambda: self._write_zeroed(shown, epoch, step))
            short = {"content": "CT", "instruction": "IT"}
            changes = [f"to {short[token]} {sensitivity[token]['mean_abs_change']:.3f}" for token in self.soft_tokens]
            message += f", sensitivity {', '.join(changes)}"
        logger.info(message)

    def _write_zeroed(self, shown: Mapping[Ablation | None, Answers], epoch: int, step: int) -> None:
        """Keep the answers without each soft token, so that they can be pooled over folds as all others are."""
        for token in self.soft_tokens:
            rows = _predictions(shown[token], self.fold.index, self.shown)
            path = zeroed_path(self.paths.run, self.fold.index, token)
            write_predictions(path, rows, aus=self.aus, epoch=epoch, step=step)

    def _report_sensitivity(self, sensitivity: dict[str, Any], monitor: Monitor, step: int) -> None:
        write_text(self.paths.folder / "sensitivity.json", json.dumps({"step": step, **sensitivity}, indent=2) + "\n")
        changes = {token: sensitivity[token]["mean_abs_change"] for token in self.soft_tokens}
        monitor.scalars("sensitivity", changes, step)
        for token, change in changes.items():
            if step == self.total_steps and change < SENSITIVITY_WARNING:
                logger.warning(
                    "Fold %d: zeroing the %s token changes the answers by %.4f on average: the LLM hardly uses it",
                    self.fold.index, token, change,
                )  # fmt: skip

    def _has_answers(self, step: int) -> bool:
        path = prediction_path(self.paths.run, self.fold.index, int(self._epoch(step)))
        return on_main(self.accelerator, path.exists)

    def _save(self, step: int) -> None:
        """Write a checkpoint and let go of the oldest."""
        with self.life.saves():
            self._write(step)
        self.saved = step
        training = self.config.training
        on_main(
            self.accelerator,
            lambda: rotate(self.paths.checkpoints, training.keep_checkpoints, mode=training.verify),
        )

    def _write(self, step: int) -> None:
        together(
            self.accelerator,
            lambda: save_checkpoint(
                self.paths.checkpoints,
                step,
                model=self.built.model,
                optimizer=self.optimizer,
                state={
                    "step": step,
                    "consumed_samples": step * self.config.training.global_batch,
                    "epoch": self._epoch(step),
                    "fold": self.fold.index,
                    "fold_name": self.fold.name,
                    "seed": self.config.training.seed,
                    "bad_steps": self.guard.bad_steps,
                },
                config=to_dict(self.config),
                model_config=self.built.model_config,
                base=self.built.base,
                quantized_modules=self.built.quantized_modules,
                world_size=self.accelerator.num_processes,
                is_writer=self.accelerator.is_main_process,
            ),
        )

    def _restore(self) -> int:
        """Load the newest valid checkpoint, the same on every process, and return its step; 0 without one."""
        verify = self.config.training.verify
        newest = on_main(self.accelerator, lambda: find_newest_valid(self.paths.checkpoints, logger, verify))
        if newest is None:
            return 0
        # Reading may fail on one process alone; only what all have read is handed to the engine, which may talk.
        saved = together(
            self.accelerator,
            lambda: read_checkpoint(
                newest,
                self.built.model,
                with_optimizer=True,
                model_config=self.built.model_config,
                base=self.built.base,
                mode="size",  # the main process has just verified it as the run file says
            ),
        )
        saved.apply(self.optimizer)
        self.guard.bad_steps = saved.trainer["bad_steps"]
        logger.info("Fold %d: resumed from %s", self.fold.index, newest)
        return min(int(saved.trainer["step"]), self.total_steps)


def _predictions(answers: Answers, fold: int, role: str) -> list[Prediction]:
    return [
        Prediction(sample_id, subject, corpus, fold, role, tuple(map(int, labels)), tuple(map(float, logits)))
        for sample_id, subject, corpus, labels, logits in zip(
            answers.sample_ids, answers.subjects, answers.corpora, answers.labels, answers.logits, strict=True
        )
    ]


def _short(losses: Mapping[str, float]) -> str:
    return " ".join(f"{name} {value:.2g}" for name, value in sorted(losses.items(), key=lambda item: item[0] != "loss"))
