"""Skips steps whose gradient is not finite, where the gradient is, and counts them when its norm has come to the host.

On a GPU the decision never waits for the host: fused AdamW reads `found_inf` on the device and leaves parameters and
moments as they are. The norms follow through pinned memory and are looked at later, at the same step in every process;
until then the host continues to give the GPU work. On a CPU there is nothing to wait for, and each norm is looked at at
once.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from aullm_dist.errors import UserError
from aullm_dist.log import get_logger, speaks

logger = get_logger(__name__)

STEPS_BEHIND = 8
"""A norm is looked at no later than this many steps after its own."""


@dataclass(frozen=True, slots=True)
class _Norm:
    """The gradient norm of a step, on its way to the host."""

    step: int
    value: Tensor | float
    arrived: torch.cuda.Event | None

    def read(self) -> float:
        if self.arrived is not None:
            self.arrived.synchronize()
        # Through numpy: reading a tensor's item would look like a wait for the device in a profile.
        return float(self.value.numpy()) if isinstance(self.value, Tensor) else self.value


class GradientGuard:
    """Takes optimizer steps whose gradient is finite, and ends a run that has too many others in a row.

    Args:
        optimizer: fused AdamW, or ZeRO's behind Accelerate's wrapper.
        max_bad_steps: skipped steps in a row that end the run.
        fold: number of the fold, for the message.

    Attributes:
        bad_steps: skipped steps in a row, as far as the norms have been looked at.
        last_norm: the gradient norm looked at last, NaN before the first.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, max_bad_steps: int, fold: int) -> None:
        self.optimizer, self.max_bad_steps, self.fold = optimizer, max_bad_steps, fold
        self.bad_steps = 0
        self.last_norm = math.nan
        self._pending: deque[_Norm] = deque()

    def step(self, norm: Tensor | float, step: int) -> None:
        """Update the parameters unless the gradient is not finite, and drop the gradient.

        Args:
            norm: of the whole gradient, the same in every process. A tensor is one on the gradient's device; a number
                is that of an engine which has decided for itself, infinity where it skipped the step.
            step: the step, from 0.

        Raises:
            UserError: too many steps in a row were skipped, as far as is known yet.
        """
        arrived = None
        if isinstance(norm, Tensor):
            optimizer: Any = self.optimizer  # `found_inf` is what torch's own gradient scaler hands over
            optimizer.found_inf = (~torch.isfinite(norm)).float()
            optimizer.step()
            optimizer.found_inf = None
            if norm.is_cuda:
                norm = norm.to("cpu", non_blocking=True)
                arrived = torch.cuda.Event()
                arrived.record()
        elif math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self._pending.append(_Norm(step, norm, arrived))
        self._look(0 if arrived is None else STEPS_BEHIND)

    def wait_for_steps(self) -> None:
        """Look at every norm there is, which waits for the device.

        Raises:
            UserError: too many steps in a row were skipped.
        """
        self._look(0)

    def _look(self, left: int) -> None:
        while len(self._pending) > left:
            norm = self._pending.popleft()
            self.last_norm = norm.read()
            if math.isfinite(self.last_norm):
                self.bad_steps = 0
            else:
                self._count(norm.step)

    def _count(self, step: int) -> None:
        self.bad_steps += 1
        if speaks():
            logger.warning("Step %d: the gradient is not finite; skipped (%d in a row)", step + 1, self.bad_steps)
        if self.bad_steps >= self.max_bad_steps:
            raise UserError(
                f"fold {self.fold}, step {step + 1}: the gradient was not finite in {self.bad_steps} steps "
                "in a row; lower training.lr_new and training.lr_lora or use training.precision=fp32"
            )
