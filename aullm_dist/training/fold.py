"""Trains one fold: the explicit loop, its evaluations, its checkpoints and its resume."""

import json
import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader

from aullm_dist.checkpoint.retention import find_newest_valid, rotate
from aullm_dist.checkpoint.store import RunFacts, read_checkpoint, save_checkpoint
from aullm_dist.config import Config, to_dict, to_record
from aullm_dist.data.clips import ClipView
from aullm_dist.data.order import BatchPlan, SampleStream, generator, total_steps
from aullm_dist.distributed import engine_state
from aullm_dist.distributed.context import on_main, together
from aullm_dist.distributed.engine import is_zero
from aullm_dist.distributed.team import Processes
from aullm_dist.log import get_logger
from aullm_dist.monitoring.clock import StepClock
from aullm_dist.monitoring.overview import flat_settings
from aullm_dist.monitoring.trackers import Tracker, open_trackers
from aullm_dist.monitoring.writer import Monitor
from aullm_dist.runs.lifecycle import Life
from aullm_dist.runs.paths import FoldPaths
from aullm_dist.runs.predictions import Role
from aullm_dist.runs.workspace import environment
from aullm_dist.runtime.preemption import Preempted
from aullm_dist.runtime.signals import stand_apart
from aullm_dist.training.batches import collate, training_loader
from aullm_dist.training.build import training_recipe
from aullm_dist.training.fold_evaluation import FoldEvaluation
from aullm_dist.training.guard import GradientGuard
from aullm_dist.training.learner import FoldData, Learner
from aullm_dist.training.objective import Objective
from aullm_dist.training.progress import LoopMonitor
from aullm_dist.training.step import TrainStep
from aullm_dist.training.streaming import StreamedBatches

logger = get_logger(__name__)


class FoldTrainer:
    """Trains the trainables of one model on one fold.

    Args:
        accelerator: processes that train the fold together.
        config: the run's configuration.
        learner: the model in its initial state, and an optimizer that has seen nothing yet.
        data: the clips of the run, and which of them this fold trains on.
        life: agrees with the other processes when this one is asked to stop.
        place: which of how many folds this is in the run, from 1.
    """

    def __init__(
        self,
        accelerator: Processes,
        config: Config,
        learner: Learner,
        data: FoldData,
        life: Life,
        place: tuple[int, int] = (1, 1),
    ) -> None:
        self.accelerator, self.config, self.life = accelerator, config, life
        self.built, self.model, self.optimizer = learner.built, learner.model, learner.optimizer
        store, fold = data.store, data.fold
        self.aus, self.fold = data.aus, fold
        self.name = f"Fold {fold.index}" + (f" ({place[0]} of {place[1]})" if place[1] > 1 else "")
        self.paths = FoldPaths(Path(config.training.output), fold.index)
        # The loop below only ever sees these views: the training view cannot reach an inner or a test clip.
        self.train_view = store.view(fold.train)
        self.parquet = store.parquet_of(fold.train) if config.data.streaming else []
        training = config.training
        self.stream = SampleStream(len(self.train_view), training.seed)
        self.plan = BatchPlan(
            training.global_batch, training.micro_batch, accelerator.num_processes, accelerator.process_index
        )
        self.total_steps = total_steps(len(self.train_view), training.epochs, training.global_batch, training.max_steps)
        self.guard = GradientGuard(self.optimizer, training.max_bad_steps, fold.index)
        several = accelerator.num_processes > 1
        self.clock = StepClock(
            accelerator.device,
            # Under ZeRO the update itself follows the last gradient, inside of `backward`.
            () if is_zero(accelerator) else learner.trainables,
            config.monitor.communication_every_steps if several else 0,
        )
        objective = Objective.from_config(config)
        self.step = TrainStep(
            accelerator, learner, objective, training, self.guard, accumulation=self.plan.accumulation,
            clock=self.clock,
        )  # fmt: skip
        held_out: dict[Role, ClipView] = {"inner": store.view(fold.inner), "test": store.view(fold.test)}
        self.evaluation = FoldEvaluation(
            accelerator, config, self.built, fold.index, held_out, self.aus, life.agreement.tick
        )
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
        monitor = Monitor(self.paths.tensorboard, active, first_step + 1 if resume else None, self._trackers())
        try:
            if active:
                self._describe(monitor, first_step)
            # A run that was stopped in an evaluation has its checkpoint, but not its answers.
            if first_step and self._evaluates_at(first_step) and not self._has_answers(first_step):
                self._evaluate(monitor, first_step)
            if first_step < self.total_steps:
                self._train(monitor, first_step)
        except Preempted as stop:
            if self.saved < self.done:
                self.guard.wait_for_steps()
                self._save(self.done)
            stop.fold, stop.step = self.fold.index, self.done
            raise
        finally:
            monitor.close()

    def _trackers(self) -> list[Tracker]:
        names = self.config.monitor.trackers if self.accelerator.is_main_process else ()
        fold = self.paths.tensorboard.name
        return open_trackers(names, Path(self.config.training.output), fold, flat_settings(self.config))

    def _describe(self, monitor: Monitor, first_step: int) -> None:
        """Write what the run is, once in each of its lives."""
        facts = {**environment(), "fold": self.fold.index, "fold_name": self.fold.name, "first_step": first_step}
        facts |= {side: len(getattr(self.fold, side)) for side in ("train", "inner", "test")}
        for name, content in (("config", to_dict(self.config)), ("run", facts)):
            monitor.text(name, f"```\n{json.dumps(content, indent=2)}\n```", first_step)
        monitor.layout()

    def _train(self, monitor: Monitor, first_step: int) -> None:
        loader = self._loader(first_step)
        self.model.train()
        batches = iter(loader)
        told = engine_state.updating_optimizer(self.optimizer) if is_zero(self.accelerator) else None
        unwatch = self.clock.watch(told) if told is not None else lambda: None
        watch = LoopMonitor(
            self.accelerator, self.config, self.built, self.step, monitor, name=self.name, fold=self.fold.index,
            span=(first_step, self.total_steps),
        )  # fmt: skip
        watch.health.labels(self.aus, self._training_labels())
        try:
            with watch:
                for step in range(first_step, self.total_steps):
                    self.step.run(
                        batches, step, self.total_steps, watch.losses, watch.rate, self.life.agreement.tick
                    )  # fmt: skip
                    self.done = step + 1
                    self.life.completed_step()
                    self._after_step(watch, monitor, step + 1)
        finally:
            unwatch()
        logger.info(watch.summary(self.total_steps))

    def _after_step(self, watch: LoopMonitor, monitor: Monitor, done: int) -> None:
        """Log, evaluate and save where it is time to."""
        if done % self.config.monitor.log_every_steps == 0 or done == self.total_steps:
            self.guard.wait_for_steps()
            watch.logged(done, self._epoch(done))
        watch.console.step(done)
        # A job learns with its first step whether a save works and fits into its grace period.
        evaluates, saves = self._evaluates_at(done), self._saves_at(done) or self.life.rehearses
        if not evaluates and not saves:
            return
        self.guard.wait_for_steps()
        begun = time.monotonic()
        if evaluates:
            watch.look_at_parts()
            self._evaluate(monitor, done)
        if saves:
            self._save(done)
        watch.away(time.monotonic() - begun)

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
        # The last step takes what is left of a global batch from the next epoch, which is not trained.
        done = step * self.config.training.global_batch / len(self.train_view)
        return min(done, float(self.config.training.epochs))

    def _evaluates_at(self, step: int) -> bool:
        if step == self.total_steps:
            return True
        every = self.config.training.evaluate_every_epochs
        return int(self._epoch(step)) // every > int(self._epoch(step - 1)) // every

    def _saves_at(self, step: int) -> bool:
        every = self.config.training.save_every_steps
        return step == self.total_steps or (step % every == 0 if every else self._evaluates_at(step))

    def _evaluate(self, monitor: Monitor, step: int) -> None:
        last = step == self.total_steps
        self.evaluation.evaluate(self.model, monitor, step, int(self._epoch(step)), last=last)

    def _has_answers(self, step: int) -> bool:
        path = self.paths.predictions(int(self._epoch(step)))
        return on_main(self.accelerator, path.exists)

    def _save(self, step: int) -> None:
        """Write a checkpoint and release the oldest."""
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
                run=RunFacts(
                    config=to_record(self.config),
                    model_config=self.built.model_config,
                    base=self.built.base,
                    quantized_modules=self.built.quantized_modules,
                    world_size=self.accelerator.num_processes,
                ),
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
