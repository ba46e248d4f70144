"""Models that train, how their engine holds them, and the clips that they train on."""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aullm_dist.checkpoint.tensor_plan import plan_tensors
from aullm_dist.config import Config
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.protocols import Fold
from aullm_dist.distributed import engine
from aullm_dist.distributed.rounds import Rounds
from aullm_dist.distributed.shared_base import SharedBase
from aullm_dist.distributed.team import Team
from aullm_dist.llm.lora import lora_values
from aullm_dist.model.assembly import BuiltModel
from aullm_dist.model.aullm import AULLM
from aullm_dist.runtime.signals import StopSignals, interrupted_later
from aullm_dist.training.optimizer import build_optimizer


@dataclass(frozen=True, slots=True)
class Learner:
    """A model as it was built and as the engine wraps it, with the optimizer of its trainables."""

    built: BuiltModel
    """On the accelerator's device."""
    model: nn.Module
    """The same model as the engine wraps it."""
    optimizer: torch.optim.Optimizer
    """The engine's."""
    initial: Mapping[str, Tensor] = field(default_factory=dict)
    """What training changes, as every fold begins with it; on the CPU."""

    @property
    def trainables(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return [parameter for parameter in self.built.model.parameters() if parameter.requires_grad]


@dataclass(frozen=True, slots=True)
class FoldData:
    """The clips of a run, and what one fold makes of them."""

    store: ClipStore
    """All clips."""
    fold: Fold
    """Which clips train, choose thresholds and test."""
    aus: tuple[int, ...]
    """AU numbers of the labels."""


class Learners:
    """The models of runs that take turns on one LLM, of which this process has one at a time; or of the one run.

    What is trained of a model is made again where a run is taken up: all of it, with the optimizer's state, would not
    fit for many. LoRA is part of the LLM, and begins with the run's own first values.

    Args:
        team: of this process.
        configs: of the runs.
        build: builds the model of a run, given its number.
        base: the DeepSpeed configuration of an LLM that teams share (`shared_base.base_section`), else None.
    """

    def __init__(
        self,
        team: Team,
        configs: Sequence[Config],
        build: Callable[[int], BuiltModel],
        base: Mapping[str, Any] | None,
    ) -> None:
        self._team, self._configs, self._build = team, configs, build
        self._number, built = 0, self._built(0)
        self._shared: SharedBase | None = None
        if base is not None:
            assert isinstance(built.model, AULLM)
            self._shared = SharedBase(built.model.reasoner.llm, base)
        self._rounds: Rounds | None = None
        self._learner: Learner | None = self._prepared(built)

    def of(self, number: int) -> Learner:
        """Return the learner of a run, in whatever state it was left; another run's is gone with that.

        Raises:
            UserError: its model cannot be built.
        """
        if number != self._number or self._learner is None:
            self._let_go()
            self._number = number
            self._learner = self._prepared(self._built(number))
            self._attach()
        return self._learner

    @contextmanager
    def in_step(self, signals: StopSignals) -> Iterator[Rounds | None]:
        """A region in which passes of a shared LLM are those of all processes; gives None without one."""
        if self._shared is None:
            yield None
            return
        self._rounds = Rounds(lambda: signals.received is not None, self._shared)
        self._attach()
        try:
            yield self._rounds
        finally:
            self._rounds.close()
            self._rounds = None

    def release(self) -> None:
        """Release everything: a second run in this process must not find the LLM in memory."""
        if self._shared is not None:
            self._shared.release()
        if self._learner is not None:
            engine.release(self._team.accelerator, self._learner.model)

    def _attach(self) -> None:
        if self._rounds is not None and self._learner is not None:
            model = self._learner.built.model
            assert isinstance(model, AULLM)
            self._rounds.attach(model)

    def _let_go(self) -> None:
        if self._rounds is not None:
            self._rounds.detach()
        if self._learner is not None:
            for parameter in self._learner.trainables:
                parameter.grad = None
        with interrupted_later():
            self._learner = None
            # DistributedDataParallel records gradients of LoRA, which the next model has as well, as long as it lives.
            gc.collect()

    def _built(self, number: int) -> BuiltModel:
        built = self._build(number)
        built.model.to(self._team.device)
        return built

    def _prepared(self, built: BuiltModel) -> Learner:
        """Hand a model to the engine."""
        team, config = self._team, self._configs[self._number]
        initial = _snapshot(built.model)
        alone = len(self._configs) == 1
        if not alone:
            initial |= _first_lora(built.model, config.training.seed)
        optimizer: torch.optim.Optimizer = build_optimizer(built.model, config.training)
        if alone and self._shared is None and team.count == 1:
            model, optimizer = engine.prepare(team.accelerator, built.model, optimizer)
        else:
            model = engine.prepare_for_team(team, built.model, divided=self._shared is not None)
        return Learner(built, model, optimizer, initial)


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Copy what training changes to the CPU, so that each fold starts from the same state.

    Running statistics of a BatchNorm are no parameters: left as they are, they would tell a fold of the clips that the
    fold before it trained on, its own test clips among them.
    """
    tensors = {item.name: item.tensor for item in plan_tensors(model) if item.trainable or not item.is_parameter}
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _first_lora(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return the values that LoRA begins with, frozen ones among them, by their names in the model."""
    assert isinstance(model, AULLM), "a network without an LLM shares none"
    return {f"{model.adapter_prefix}.{name}": value for name, value in lora_values(model.peft_model(), seed).items()}
