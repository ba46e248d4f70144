"""Stops a run that is asked to (SIGUSR1 or SIGTERM): all processes agree on one moment, save, and leave with 0.

A signal sets a flag and nothing else. The flags are exchanged every few seconds, not in every step: all processes send
theirs at the same micro-batch, and read the answer at a later one, the same everywhere. Nothing waits for it in
between, on a GPU no host does either. The exchange carries the time of a micro-batch as well, so that all processes
draw the same conclusion about when to send and to read next.

Micro-batches count, of training as of evaluations, so a long accumulation or evaluation is left as well: what a step
has accumulated is dropped, and the step is repeated by the run that resumes.
"""

import math
import time
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from aullm_dist.runtime.signals import StopSignals

EXCHANGE_SECONDS = 2.0
"""The flags are exchanged about this often, but not more than once per micro-batch."""
_READ_SECONDS, _MOST_BEHIND = 1.0, 8
"""An answer is read about this long after it was asked for, at the latest this many micro-batches later."""


class Preempted(Exception):
    """All processes have agreed to stop here; raised by every one of them at the same micro-batch."""

    step: int | None = None
    """Optimizer steps of the fold that are in a checkpoint; None before the first fold."""
    fold: int | None = None
    run: str = ""
    """Name of the run in a sweep; empty where there is one run."""
    others: tuple[tuple[str, int, int], ...] = ()
    """Run, fold and step of the other teams that were training at the same time."""


class Processes(Protocol):
    """Those that agree: of a run, or of a team that trains a fold."""

    @property
    def num_processes(self) -> int:
        """How many they are."""

    @property
    def device(self) -> torch.device:
        """Where this process computes."""


class AgreesToStop(Protocol):
    """Tells this process at the same micro-batch as others that one of them was signalled: see `Agreement`."""

    def tick(self) -> None:
        """Count a micro-batch."""

    def now(self) -> None:
        """Agree between the parts of a run."""

    def drain(self) -> None:
        """Wait for what is under way."""

    @property
    def seconds_per_tick(self) -> float:
        """Seconds of a micro-batch."""


class SharedFlag(Protocol):
    """Something that any process of a run may set and every one sees, without waiting for another."""

    def set(self) -> None:
        """Set it, for good."""

    def is_set(self) -> bool:
        """Whether it was set, by whomever."""


class Agreement:
    """Tells all processes at the same micro-batch that one of them was signalled.

    Args:
        processes: of the run, or of a team.
        signals: of this process.
        group: that a team speaks in; None for that of the run.
        elsewhere: set where another team is to stop; looked at as seldom as flags are exchanged.
    """

    def __init__(
        self, processes: Processes, signals: StopSignals, group: Any = None, elsewhere: SharedFlag | None = None
    ) -> None:
        self.signals = signals
        self._group, self._elsewhere, self._looked_at = group, elsewhere, -math.inf
        self._alone = processes.num_processes == 1
        self._device = processes.device
        on_gpu = self._device.type == "cuda"
        self._mine = torch.zeros(2, dtype=torch.float64, pin_memory=on_gpu)
        self._answer = torch.zeros(2, dtype=torch.float64, pin_memory=on_gpu)
        self._open: _Exchange | None = None
        self._ticks, self._next, self._due = 0, 1, 0
        self._since, self._since_ticks = time.monotonic(), 0

    def tick(self) -> None:
        """Count a micro-batch; every process calls it at the same places.

        Raises:
            Preempted: all processes stop here.
        """
        self.signals.alive()
        self._ticks += 1
        if self._alone:
            self._stop_if(self._is_asked())
        elif self._open is not None:
            if self._ticks >= self._due:
                self._read()
        elif self._ticks >= self._next:
            self._send()

    def now(self) -> None:
        """Agree at once, and wait for it: between the parts of a run, where nothing is in flight.

        Raises:
            Preempted: all processes stop here.
        """
        self.signals.alive()
        if self._alone:
            self._stop_if(self._is_asked())
            return
        if self._open is None:
            self._send()
        self._read()

    def drain(self) -> None:
        """Wait for an exchange that is under way, so that nothing is in flight when the group ends."""
        if self._open is not None:
            self._open.wait()
            self._open = None

    def _send(self) -> None:
        now = time.monotonic()
        ticks = max(self._ticks - self._since_ticks, 1)
        values = self._mine.numpy()  # filled through numpy: on a GPU nothing here may become a blocking copy
        values[0], values[1] = self._is_asked(), (now - self._since) / ticks
        self._since, self._since_ticks = now, self._ticks
        seconds = self.seconds_per_tick or math.inf
        self._due = self._ticks + min(_MOST_BEHIND, max(1, math.ceil(_READ_SECONDS / seconds)))
        self._open = _Exchange(self._mine, self._answer, self._device, self._group)

    def _read(self) -> None:
        assert self._open is not None, "only an exchange that was sent is read"
        self._open.wait()
        self._open = None
        self._next = self._ticks + max(1, int(EXCHANGE_SECONDS / max(self.seconds_per_tick, 1e-6)))
        self._stop_if(bool(self._answer.numpy()[0]))

    @property
    def seconds_per_tick(self) -> float:
        """Seconds of a micro-batch as all processes last agreed, the same for all; 0 before the first answer."""
        return float(self._answer.numpy()[1])

    def _is_asked(self) -> bool:
        if self.signals.received is not None:
            return True
        now = time.monotonic()
        if self._elsewhere is None or now - self._looked_at < EXCHANGE_SECONDS:
            return False
        self._looked_at = now
        return self._elsewhere.is_set()

    def _stop_if(self, asked: bool) -> None:
        if asked:
            if self._elsewhere is not None:
                self._elsewhere.set()
            raise Preempted


class _Exchange:
    """The largest of everybody's values, on its way."""

    def __init__(self, mine: Tensor, answer: Tensor, device: torch.device, group: Any = None) -> None:
        # The run's own group needs no name.
        of_team = {} if group is None else {"group": group}
        self._answer, self._arrived, self._work = answer, None, None
        if device.type != "cuda":
            self._sent = mine.clone()
            self._work = dist.all_reduce(self._sent, op=dist.ReduceOp.MAX, async_op=True, **of_team)
            return
        self._sent = mine.to(device, non_blocking=True)
        dist.all_reduce(self._sent, op=dist.ReduceOp.MAX, **of_team)  # the stream waits for it, the host does not
        answer.copy_(self._sent, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def wait(self) -> None:
        """Wait until the answer is there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        if self._work is not None:
            self._work.wait()
            self._answer.copy_(self._sent)
