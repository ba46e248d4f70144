"""How benchmarks/train_step.py measures: times, memory, the device's own rates, host waits, time per part."""

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from aullm_dist.training.step import TrainStep

PERIOD_SECONDS = 0.005
READS = ("_local_scalar_dense", "nonzero", "masked_select")


@dataclass(frozen=True)
class Measured:
    """Seconds of each timed step, tokens of one, and the peak of memory."""

    seconds: list[float]
    tokens: int
    peak_bytes: int


def wait(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed_steps(device: torch.device, run: Callable[[], object], count: int) -> list[float]:
    """Return the seconds of `count` steps; on a GPU between their ends there, with no wait in between."""
    if device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(count):
            run()
            marks.append(time.perf_counter())
        return [after - before for before, after in zip(marks, marks[1:], strict=False)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    wait(device)
    ends[0].record()
    for end in ends[1:]:
        run()
        end.record()
    wait(device)
    return [before.elapsed_time(after) / 1e3 for before, after in zip(ends, ends[1:], strict=False)]


def device_rates(device: torch.device, dtype: torch.dtype, side: int | None = None) -> tuple[float, float]:
    """Return the floating-point operations per second of a large matrix product, and the bytes per second of a copy.

    Args:
        device: the device.
        dtype: of the matrices.
        side: rows and columns of the matrices; None takes what fills the device.
    """
    side = side or (8192 if device.type == "cuda" else 1024)
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    flops = 2 * side**3 / _best(device, lambda: left @ right)
    source = torch.empty((2**30 if side >= 8192 else 2**26) // 4, device=device).zero_()
    target = torch.empty_like(source)
    return flops, 2 * source.nbytes / _best(device, lambda: target.copy_(source))


def _best(device: torch.device, work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(3):
        work()
    for _ in range(10):
        wait(device)
        started = time.perf_counter()
        for _ in range(3):
            work()
        wait(device)
        seconds.append((time.perf_counter() - started) / 3)
    return min(seconds)


@dataclass
class Peak:
    """The highest value seen."""

    value: int = 0


@contextlib.contextmanager
def peak_bytes(device: torch.device) -> Iterator[Peak]:
    """Find the peak of memory in the block: of the CUDA allocator, or of this process's anonymous pages."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.value = torch.cuda.max_memory_allocated(device)
        return
    done = threading.Event()

    def sample() -> None:
        while not done.wait(PERIOD_SECONDS):
            peak.value = max(peak.value, _anonymous_bytes())

    sampler = threading.Thread(target=sample, daemon=True)
    peak.value = _anonymous_bytes()
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


def _anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class _Reads(TorchDispatchMode):
    """Counts operations that bring a value to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in READS)
        return function(*args, **(kwargs or {}))


def host_waits(device: torch.device, run: Callable[[], object]) -> int:
    """Return how often the host waits for the device in one step.

    On a GPU torch itself says so; elsewhere this counts the operations for which the host would wait on a GPU.
    """
    if device.type != "cuda":
        with _Reads() as reads:
            run()
        return reads.count
    wait(device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    for place in sorted({f"{warning.filename}:{warning.lineno}" for warning in said}):
        print(f"the host waits at {place}")
    return len(said)


class PartTimes:
    """Splits the time of steps by part, waiting for the device between parts; for steps of their own.

    Args:
        device: where the step runs.
        step: the trainer's step, whose methods are watched inside the block.
        model: AULLM; what comes before its reasoner makes the soft tokens.
    """

    def __init__(self, device: torch.device, step: TrainStep, model: nn.Module) -> None:
        self.device, self.step, self.model = device, step, model
        self.seconds = dict.fromkeys(("data", "evidence", "LLM forward", "loss", "backward", "optimizer"), 0.0)
        self._since = 0.0
        self._hooks: list = []

    def __enter__(self) -> "PartTimes":
        parts = {"fetch": "data", "backward": "backward", "update": "optimizer"}
        for name, part in parts.items():
            setattr(self.step, name, self._watched(getattr(self.step, name), part))
        reasoner = self.model.reasoner
        self._hooks = [
            self.model.register_forward_pre_hook(lambda *_: self._mark(None)),
            reasoner.register_forward_pre_hook(lambda *_: self._mark("evidence")),
            reasoner.register_forward_hook(lambda *_: self._mark("LLM forward")),
        ]
        forward = self.step.forward

        def with_loss(batch):
            result = forward(batch)
            self._mark("loss")
            return result

        self.step.forward = with_loss
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for name in ("fetch", "forward", "backward", "update"):
            delattr(self.step, name)
        for hook in self._hooks:
            hook.remove()

    def shares(self) -> dict[str, float]:
        """Return each part's share of the time of all parts."""
        total = sum(self.seconds.values())
        return {name: seconds / total for name, seconds in self.seconds.items()}

    def _mark(self, part: str | None) -> None:
        """Count the time since the last mark to `part`; None counts it to nothing."""
        wait(self.device)
        now = time.perf_counter()
        if part is not None:
            self.seconds[part] += now - self._since
        self._since = now

    def _watched(self, method: Callable, part: str) -> Callable:
        def watched(*given):
            self._mark(None)
            result = method(*given)
            self._mark(part)
            return result

        return watched


def profile_to(path: Path, run: Callable[[], object]) -> None:
    """Write a trace of `run` that chrome://tracing and Perfetto read."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile(activities=activities) as trace:
        run()
    trace.export_chrome_trace(str(path))
