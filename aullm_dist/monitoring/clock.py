"""Measures the time of a step: data, forward, backward, optimizer, and in sampled steps the wait for other processes.

On a GPU the moments are CUDA events: the host records them without waiting, and reads them when they have long passed.
The parts are then those of the GPU's own time line: `data` is how long it stood still until a batch was there.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PARTS = ("data", "forward", "backward", "optimizer")
_Mark = tuple[str | None, Any]
"""What ended, and its moment: seconds on a CPU, a CUDA event on a GPU."""
_MOST_OPEN = 64
"""Steps whose moments are kept until they have passed; older ones are dropped."""


class StepClock:
    """Times the parts of optimizer steps without waiting for the device.

    Args:
        device: where the steps run.
        trainables: trained parameters, whose gradients tell when the backward pass has computed its last.
        sample_every: every so many steps the wait for other processes is measured as well; 0 never does.
    """

    def __init__(self, device: torch.device, trainables: Sequence[nn.Parameter] = (), sample_every: int = 0) -> None:
        self._on_gpu = device.type == "cuda"
        self._trainables, self._sample_every = trainables, sample_every
        self._open: deque[_Step] = deque()
        self._marks: list[_Mark] = []
        self._spare: list[Any] = []
        self._sums: dict[str, float] = {}
        self._steps = self._sampled_steps = 0
        self._sample: _Waits | None = None
        self._in_optimizer = False

    def watch(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """Let an optimizer that an engine steps inside of `backward` tell when it begins; returns what ends that."""

        def begins(*_: Any) -> None:
            if self._marks and not self._in_optimizer:
                self.mark("backward")
                self._in_optimizer = True

        return optimizer.register_step_pre_hook(begins).remove

    def begin(self, step: int) -> None:
        """Begin step `step`."""
        self._marks = []
        self._in_optimizer = False
        if self._sample_every and step % self._sample_every == self._sample_every - 1:
            self._sample = _Waits(self._moment, self._trainables, self._on_gpu)

    def mark(self, part: str | None) -> None:
        """Count the time since the last mark to `part`; None to nothing."""
        if part == "backward" and self._in_optimizer:
            part, self._in_optimizer = "optimizer", False
        self._marks.append((part, self._moment()))

    def backward_ended(self) -> None:
        """Mark the end of a backward pass."""
        if self._sample is not None:
            self._sample.backward_ended()
        self.mark("backward")

    def end(self) -> None:
        """End the step, completed or not."""
        marks, waits = self._marks, None
        self._marks = []
        if self._sample is not None:
            waits = self._sample.close()
            self._sample = None
        if not marks:
            return
        self._open.append(_Step(marks, waits))
        if len(self._open) > _MOST_OPEN:
            self._open.popleft()
        self._collect()

    def read(self) -> dict[str, float]:
        """Return mean milliseconds of each part and in `total`, of the steps since the last reading that have passed.

        `communication_wait` is there where one of them was sampled.
        """
        self._collect()
        sums, steps, sampled = self._sums, self._steps, self._sampled_steps
        self._sums, self._steps, self._sampled_steps = {}, 0, 0
        if not steps:
            return {}
        values = {part: 1e3 * sums.get(part, 0.0) / steps for part in PARTS}
        values["total"] = sum(values.values())
        if sampled:
            values["communication_wait"] = 1e3 * sums["communication_wait"] / sampled
        return values

    def _moment(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _collect(self) -> None:
        while self._open and self._has_passed(self._open[0]):
            step = self._open.popleft()
            for (_, before), (part, moment) in zip(step.marks, step.marks[1:], strict=False):
                if part is not None:
                    self._sums[part] = self._sums.get(part, 0.0) + self._between(before, moment)
            self._steps += 1
            if step.waits is not None:
                waited = sum(self._between(before, after) for before, after in step.waits)
                self._sums["communication_wait"] = self._sums.get("communication_wait", 0.0) + waited
                self._sampled_steps += 1
            if self._on_gpu:
                self._spare += [moment for _, moment in step.marks]

    def _has_passed(self, step: "_Step") -> bool:
        # The last moment of a step is behind all its others, as they are recorded in one stream.
        return not self._on_gpu or step.marks[-1][1].query()

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1e3 if self._on_gpu else after - before


@dataclass(frozen=True, slots=True)
class _Step:
    """Moments of one step, and of its waits for other processes where they were watched."""

    marks: list[_Mark]
    waits: list[tuple[Any, Any]] | None


class _Waits:
    """What one step waits for other processes.

    Seen are what DDP has left to send when the last gradient is there (its reducer waits where Python does not see
    it), every `Work.wait` in Python, which is how DeepSpeed waits for what it gathers and reduces on a CPU, and on a
    GPU every wait of the computing stream for another, as ZeRO-3 gathers and reduces on streams of its own. On a GPU
    only waits of the computing stream count. Sending that hides behind computing counts as nothing.
    """

    def __init__(self, moment: Callable[[], Any], trainables: Sequence[nn.Parameter], on_gpu: bool) -> None:
        self._moment = moment
        self._stream = torch.cuda.current_stream() if on_gpu else None
        self._found: list[tuple[Any, Any]] = []
        self._last_gradient: Any = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._gradient) for p in trainables]
        self._waiting_now = False
        self._restore: list[Callable[[], None]] = []
        if torch.distributed.is_available():
            self._watch(torch.distributed.Work, "wait", lambda work: True)
        if on_gpu:
            for name in ("wait_stream", "wait_event"):
                self._watch(torch.cuda.Stream, name, lambda stream: stream == self._stream)
            # Here the host waits, and the computing stream runs out of work.
            self._watch(torch.cuda.Stream, "synchronize", lambda stream: stream != self._stream)

    def backward_ended(self) -> None:
        """Count what lies between the last gradient and now."""
        if self._last_gradient is not None:
            self._found.append((self._last_gradient, self._moment()))
            self._last_gradient = None

    def close(self) -> list[tuple[Any, Any]]:
        """Stop watching and return (before, after) of every wait."""
        for hook in self._hooks:
            hook.remove()
        for restore in self._restore:
            restore()
        return self._found

    def _gradient(self, _: nn.Parameter) -> None:
        self._last_gradient = self._moment()

    def _watch(self, kind: Any, name: str, counts: Callable[[Any], bool]) -> None:
        """Time a method of all instances of a class, which torch makes, where it `counts`."""
        wait = getattr(kind, name)

        def waiting(waiter: Any, *given: Any, **named: Any) -> Any:
            elsewhere = self._stream is not None and torch.cuda.current_stream() != self._stream
            # A wait inside of a wait is part of it.
            if self._waiting_now or elsewhere or not counts(waiter):
                return wait(waiter, *given, **named)
            before = self._moment()
            self._waiting_now = True
            try:
                return wait(waiter, *given, **named)
            finally:
                self._waiting_now = False
                self._found.append((before, self._moment()))

        own = name in vars(kind)
        setattr(kind, name, waiting)
        self._restore.append(lambda: setattr(kind, name, wait) if own else delattr(kind, name))
