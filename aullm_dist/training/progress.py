"""Reports from the loop of a fold: numbers of logged steps for TensorBoard and console, warnings, and a last line."""

import math
import time
from types import TracebackType

from torch import nn

from aullm_dist.config import Config
from aullm_dist.distributed import engine_state
from aullm_dist.distributed.team import Processes, is_alone
from aullm_dist.log import get_logger
from aullm_dist.model.assembly import BuiltModel
from aullm_dist.model.counterfactual import branching
from aullm_dist.monitoring.console import Console, duration
from aullm_dist.monitoring.device import Power, flops_per_token, peak_flops
from aullm_dist.monitoring.health import Health
from aullm_dist.monitoring.writer import LOSS, Monitor, Throughput, memory_gib
from aullm_dist.training.step import LossLog, TrainStep

logger = get_logger(__name__)


class LoopMonitor:
    """Reads what the steps of a fold left behind and says it, in TensorBoard and on the console.

    Every process reads the same numbers at the same steps, so that none waits for another; the main one speaks.

    Args:
        accelerator: processes that train the fold together.
        config: the run's configuration.
        built: the model, as it was built.
        step: the step, whose clock is read.
        monitor: of the fold.
        name: of the fold, on the console.
        fold: its number.
        span: steps that were done before, and of the fold.
    """

    def __init__(
        self,
        accelerator: Processes,
        config: Config,
        built: BuiltModel,
        step: TrainStep,
        monitor: Monitor,
        *,
        name: str,
        fold: int,
        span: tuple[int, int],
    ) -> None:
        self._accelerator, self._config, self._step, self._monitor = accelerator, config, step, monitor
        self._name, self._first, self._logged = name, span[0], span[0]
        main = accelerator.is_main_process
        self.losses, self.rate = LossLog(accelerator), Throughput()
        self.console = Console(name, *span, active=main, live=is_alone(accelerator))
        chances, _ = branching(config, has_graph=built.relations is not None)
        self.health = Health(fold, chances.names if chances.branches else (), active=main)
        self._model = built.model
        self._asked: set[str] = set()
        self._flops_per_token = flops_per_token(built.model)
        self._peak_flops = peak_flops(accelerator.device, config.training.precision)
        self._power = Power(accelerator.device)
        self._begun = time.monotonic()
        self._first_loss: float | None = None
        self._last_loss: float | None = None
        self._away = 0.0

    def __enter__(self) -> "LoopMonitor":
        """Begin to speak."""
        self.console.__enter__()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """End the line of the console."""
        self.console.__exit__(kind, error, trace)

    def logged(self, done: int, epoch: float) -> None:
        """Read and report what the steps up to `done` left behind; the device has just been waited for."""
        losses, rates, parts = self.losses.read(), self.rate.read(), self._step.clock.read()
        memory, guard = memory_gib(), self._step.guard
        clips = (done - self._logged) * self._config.training.global_batch
        self._logged = done
        self._monitor.groups(
            {
                LOSS: losses,
                "lr": {group["name"]: group["lr"] for group in guard.optimizer.param_groups},
                "train": {"grad_norm": guard.last_norm, "epoch": epoch, **rates, **self._arithmetic(rates)},
                "step_ms": parts,
                "memory": memory,
                "hardware": self._power.watts(),
            },
            done,
        )
        self.health.losses(losses, clips, done)
        self.health.times(parts, self._config.data.workers)
        self._last_loss = losses.get("loss")
        self._first_loss = self._last_loss if self._first_loss is None else self._first_loss
        used = memory.get("gpu_peak_gib", memory["host_gib"])
        self.console.facts(self._last_loss, rates.get("clips_per_second"), used)

    def look_at_parts(self) -> None:
        """Look for parts of the model that no gradient has ever reached; every process calls it."""
        silent = []
        for part, module in self._model.named_children():
            if part in self._asked or part == "reasoner":
                continue
            reached = self._is_reached(module)
            if reached:
                self._asked.add(part)
            elif reached is False:
                silent.append(part)
        self.health.parts(silent)

    def _is_reached(self, module: nn.Module) -> bool | None:
        """Return whether a gradient has reached a module, None before the first step."""
        stepped = False
        # One at a time and the small ones first: an engine may have to gather each.
        for parameter in sorted(module.parameters(), key=lambda p: math.prod(engine_state.full_shape(p))):
            state = engine_state.optimizer_state(self._step.guard.optimizer, parameter)
            if "exp_avg_sq" in state:
                stepped = True
                if bool(state["exp_avg_sq"].any()):
                    return True
        return False if stepped else None

    def away(self, seconds: float) -> None:
        """Record time that went into something else than training, such as an evaluation."""
        self._away += seconds
        self.rate.restart()

    def summary(self, done: int) -> str:
        """Return what the loop did, in one line."""
        training = max(time.monotonic() - self._begun - self._away, 1e-9)
        steps = done - self._first
        clips = steps * self._config.training.global_batch / training
        line = f"{self._name}: {steps} step{'s' * (steps != 1)} in {duration(training)}, {clips:.3g} clips/s"
        if self._away >= 1:
            line += f"; evaluations and checkpoints {duration(self._away)}"
        if self._first_loss is not None and self._last_loss is not None:
            line += f"; loss {self._first_loss:.3g} -> {self._last_loss:.3g}"
        memory = memory_gib()
        line += f"; memory at most {memory.get('gpu_peak_gib', memory['host_peak_gib']):.2g} GiB"
        if self.health.said:
            line += f"; {self.health.said} thing{'s' * (self.health.said > 1)} to look at, see above"
        return line

    def _arithmetic(self, rates: dict[str, float]) -> dict[str, float]:
        if not rates or not self._flops_per_token:
            return {}
        flops = self._flops_per_token * rates["tokens_per_second"] / self._accelerator.num_processes
        values = {"tflops_per_device": flops / 1e12}
        if self._peak_flops is not None:
            values["mfu"] = flops / self._peak_flops
        return values
