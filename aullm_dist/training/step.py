"""Runs one optimizer step: the part of the loop that runs thousands of times, and the sums of its losses.

Nothing in here waits for the device. What the host wants to know of a step (losses, the gradient's norm) stays on the
device until somebody reads it; the loop does so at logged steps. Under DeepSpeed the engine itself looks at the norm in
every step, inside `backward`.
"""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from aullm_dist.config import TrainingConfig
from aullm_dist.data.order import generator
from aullm_dist.distributed.engine import clip_gradients
from aullm_dist.distributed.team import Processes, gather_objects, sum_over
from aullm_dist.monitoring.clock import StepClock
from aullm_dist.monitoring.writer import Throughput
from aullm_dist.training.batches import Batch
from aullm_dist.training.guard import GradientGuard
from aullm_dist.training.learner import Learner
from aullm_dist.training.objective import Objective
from aullm_dist.training.optimizer import schedule, set_learning_rates


class LossLog:
    """Sums of loss components since the last reading, reduced over processes only when read."""

    def __init__(self, accelerator: Processes) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}

    def add(self, components: Mapping[str, Tensor]) -> None:
        """Count components, each `[2]` = (sum over clips, number of clips)."""
        for name, value in components.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self) -> dict[str, float]:
        """Return the mean of each component over the clips that drew it; waits for the device."""
        # A rank may not have drawn a component the others drew, so all agree on the names first.
        names = sorted(set(gather_objects(self._accelerator, sorted(self._sums))))
        if not names:
            return {}
        zero = torch.zeros(2, device=self._accelerator.device)
        table = torch.stack([self._sums.get(name, zero).float() for name in names])
        table = sum_over(self._accelerator, table).cpu()
        self._sums = {}
        return {name: (row[0] / row[1]).item() for name, row in zip(names, table, strict=True) if row[1] > 0}


class TrainStep:
    """Runs optimizer steps, each over its micro-batches.

    Args:
        accelerator: processes that train the fold together.
        learner: the model that trains.
        objective: the loss.
        training: learning rates, schedule, clipping.
        guard: takes or skips the update, with the optimizer.
        accumulation: micro-batches of this process in a step.
        clock: is given the parts of each step; None makes one that never looks at other processes.
    """

    def __init__(
        self,
        accelerator: Processes,
        learner: Learner,
        objective: Objective,
        training: TrainingConfig,
        guard: GradientGuard,
        *,
        accumulation: int,
        clock: StepClock | None = None,
    ) -> None:
        self.accelerator, self.model, self.trainables = accelerator, learner.model, learner.trainables
        self.objective, self.training, self.guard = objective, training, guard
        self.accumulation, self.tokens = accumulation, learner.built.tokens
        self.clock = clock or StepClock(accelerator.device)

    def run(
        self,
        batches: Iterator[Batch],
        step: int,
        total_steps: int,
        log: LossLog,
        rate: Throughput,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Take step `step` (from 0) of `total_steps`, and count its losses and its work.

        Args:
            batches: micro-batches of this process.
            step: the step.
            total_steps: of the fold.
            log: sums of losses.
            rate: clips and tokens.
            tick: called before each micro-batch; what it raises leaves parameters and optimizer as the last completed
                step left them, and the engine unfit for another.

        Raises:
            UserError: too many steps in a row had a gradient that is not finite.
        """
        training = self.training
        factor = schedule(step, total_steps, training.warmup_fraction, training.min_lr_fraction)
        set_learning_rates(self.guard.optimizer, factor)
        self.clock.begin(step)
        try:
            for micro in range(self.accumulation):
                tick()
                self._run_micro(batches, step, micro, log, rate)
        finally:
            self.clock.end()

    def _run_micro(self, batches: Iterator[Batch], step: int, micro: int, log: LossLog, rate: Throughput) -> None:
        clock, processes = self.clock, self.accelerator.num_processes
        clock.mark(None)
        batch = self.fetch(batches)
        clock.mark("data")
        # Dropout depends on (seed, step, micro-step, rank) alone, so there is no generator state to save.
        key = generator(self.training.seed, "dropout", step, micro, self.accelerator.process_index)
        torch.manual_seed(int(key.integers(2**62)))
        with self.accelerator.accumulate(self.model):
            loss, components = self.forward(batch)
            clock.mark("forward")
            self.backward(loss)
            clock.backward_ended()
            log.add(components)
            rate.add(len(batch.sample_ids) * processes, self.tokens(len(batch.branches)) * processes)
            if self.accelerator.sync_gradients:
                self.update(step)
        clock.mark("optimizer")

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next micro-batch, its copy to the device queued."""
        return next(batches).to(self.accelerator.device)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch and its components."""
        output = self.model(batch.views, batch.view_index, batch.edge_mask, batch.branches)
        return self.objective(output, batch)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch; under ZeRO the last one also clips and steps."""
        self.accelerator.backward(loss)

    def update(self, step: int) -> None:
        """Clip the gradient of the global batch and update the parameters."""
        self.guard.step(clip_gradients(self.accelerator, self.trainables, self.training.clip_norm), step)
