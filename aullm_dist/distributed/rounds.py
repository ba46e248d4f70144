"""Aligns passes of a frozen LLM that several teams share: every process makes the same passes at the same time.

Gathering a layer takes all processes. So before each pass they agree on its kind: one with a backward pass if any team
is about to train, else one without. A team that wants the other kind, or has no fold left, makes an empty pass: one
branch of zeros, of which nothing is kept. Training goes first: a team that comes to an evaluation waits for the others,
which come to theirs soon, instead of holding all of them up.

A team that trains is never made to wait between the micro-batches of a step, so an empty pass finds no gradient that it
could spoil.
"""

import time
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from aullm_dist.distributed.shared_base import SharedBase
from aullm_dist.distributed.team import TIMEOUT
from aullm_dist.errors import CheckpointError, UserError
from aullm_dist.model.aullm import AULLM
from aullm_dist.runtime.preemption import Preempted
from aullm_dist.runtime.signals import StopSignals


class Kind(IntEnum):
    """What a process wants of the next pass; the greatest wish of all is done."""

    NOTHING = 0
    ANSWER = 1
    TRAIN = 2


class Rounds:
    """Holds the passes of this process's LLM in step with those of all others, from `attach` to `detach`.

    Args:
        asked: whether this process was asked to stop.
        base: what gathers the LLM.

    Attributes:
        has_failed: whether the processes have raised an error together.
        stops: whether the processes have agreed to stop, as of the last pass.
        passes: passes that were made, empty ones included, and `empty` ones among them.
    """

    def __init__(self, asked: Callable[[], bool], base: SharedBase) -> None:
        self._asked, self._base = asked, base
        # The host speaks to hosts: on a GPU nothing here waits for the device.
        self._hosts = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._model: AULLM | None = None
        self._hooks: list[Any] = []
        self._is_empty = False
        self.stops = self.has_failed = False
        self.passes = self.empty = 0

    def attach(self, model: AULLM) -> None:
        """Begin: from here on a pass of the model, and of no other, waits for those of the others."""
        self.detach()
        self._model = model
        # Before DeepSpeed learns that a pass begins.
        waits = model.reasoner.register_forward_pre_hook(self._before_pass, prepend=True)
        self._hooks = [waits, self._base.begins_with(model.reasoner)]

    def detach(self) -> None:
        """End for the model: its passes are this process's own affair again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._model = [], None

    def close(self) -> None:
        """End for all models."""
        self.detach()
        dist.destroy_process_group(self._hosts)

    def finish(self) -> None:
        """Make empty passes until no process wants another one.

        Raises:
            Preempted: all processes stop here.
        """
        self._join(Kind.NOTHING)
        self._base.partition()

    def fail(self, error: UserError | CheckpointError) -> None:
        """Have every process raise this process's error, or that of a lower rank, in the place of its next pass."""
        self._agree(Kind.NOTHING, error)

    def _before_pass(self, _module: nn.Module, _inputs: Any) -> None:
        if not self._is_empty:
            self._join(Kind.TRAIN if torch.is_grad_enabled() else Kind.ANSWER)

    def _join(self, wanted: Kind) -> None:
        """Return when the pass that is wanted is everybody's next one."""
        while True:
            if self.stops:
                raise Preempted
            self._base.pass_ended()
            kind = self._agree(wanted)
            if kind == wanted:
                self.passes += kind != Kind.NOTHING
                return
            self._make_empty_pass(kind)

    def _agree(self, wanted: Kind, error: UserError | CheckpointError | None = None) -> Kind:
        values = torch.tensor([wanted, self._asked(), error is not None], dtype=torch.int64)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._hosts)
        kind, stops, fails = values.tolist()
        if fails:
            self.has_failed = True
            errors: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(errors, error, group=self._hosts)
            rank, found = next((rank, other) for rank, other in enumerate(errors) if other is not None)
            told = found if rank == 0 else type(found)(f"process {rank}: {found}")
            told.told_to_all = True
            raise told
        self.stops = bool(stops)
        return Kind(kind)

    def _make_empty_pass(self, kind: Kind) -> None:
        model = self._model
        assert model is not None
        reasoner, trains = model.reasoner, kind == Kind.TRAIN
        self.passes, self.empty = self.passes + 1, self.empty + 1
        trainables = [parameter for parameter in reasoner.parameters() if parameter.requires_grad]
        assert all(parameter.grad is None for parameter in trainables), "an empty pass within a step"
        was_training = reasoner.training
        # As the others: recomputed activations pass through the layers once more.
        reasoner.train(trains)
        self._is_empty = True
        device, dtype = reasoner.static_ids.device.type, model.autocast
        # Not cached: a team that waits does so inside of its own pass, which would find what this one has cast.
        region = torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False)
        try:
            with torch.set_grad_enabled(trains):
                with region:
                    logits = reasoner(*_zeros(reasoner, trains))
                if trains:
                    logits.sum().backward()
        finally:
            self._is_empty = False
            reasoner.train(was_training)
        for parameter in trainables:
            parameter.grad = None


def _zeros(reasoner: Any, trains: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return the inputs of one branch of zeros."""
    device = reasoner.static_ids.device
    soft = torch.zeros(2, 1, reasoner.au_head.in_features, device=device, requires_grad=trains)
    branch = torch.zeros(1, 2, dtype=torch.int64, device=device)
    return soft[0], soft[1] if reasoner.prompt.use_structure else None, branch


class AgreementOfRounds:
    """Tells all teams to stop as the passes that they share have it (`runtime.preemption.Agreement`).

    Args:
        rounds: of this process.
        signals: of this process.
    """

    def __init__(self, rounds: Rounds, signals: StopSignals) -> None:
        self._rounds, self._signals = rounds, signals
        self._begun, self._ticks = time.monotonic(), 0

    def tick(self) -> None:
        """Count a micro-batch.

        Raises:
            Preempted: all processes stop here.
        """
        self._signals.alive()
        self._ticks += 1
        if self._rounds.stops:
            raise Preempted

    def now(self) -> None:
        """As `tick`: what was agreed with the last pass holds until the next one."""
        self.tick()

    def drain(self) -> None:
        """Nothing is ever under way."""

    @property
    def seconds_per_tick(self) -> float:
        """Mean seconds of a micro-batch of this process; 0 before the first."""
        return (time.monotonic() - self._begun) / self._ticks if self._ticks else 0.0
