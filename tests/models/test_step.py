"""The hot loop: nothing in it waits for the device, and a step whose gradient is not finite changes nothing."""

import logging
import math

import pytest
import torch
from accelerate import Accelerator
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

from aullm_dist.config import load
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.order import BatchPlan, SampleStream
from aullm_dist.errors import UserError
from aullm_dist.monitoring.clock import PARTS
from aullm_dist.monitoring.writer import Throughput
from aullm_dist.training import guard as guard_module
from aullm_dist.training.batches import training_loader
from aullm_dist.training.build import build_model, training_recipe
from aullm_dist.training.guard import GradientGuard
from aullm_dist.training.learner import Learner
from aullm_dist.training.objective import Objective
from aullm_dist.training.optimizer import build_optimizer
from aullm_dist.training.step import LossLog, TrainStep

AUS = (1, 2, 4, 7, 12)
STEPS = 4
# What reads a value on the host, or makes a shape depend on one: on a GPU the host waits there.
WAITING = {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}


class HostTensors(TorchFunctionMode):
    """Notes tensors made of numbers or lists on the host: on a GPU each is a copy that the host waits for."""

    MAKERS = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor, torch.Tensor.tolist)

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        index = args[1] if function is torch.Tensor.__getitem__ else None
        if (
            function in self.MAKERS
            or isinstance(index, list)
            or (isinstance(index, tuple) and any(isinstance(part, list) for part in index))
        ):
            self.found.add(function.__name__)
        return function(*args, **(kwargs or {}))


def waiting(trace):
    """Return the operations in a trace for which the host waits on a GPU."""
    found = set()
    for event in trace.events():
        if event.name in WAITING:
            above = event
            # The CPU's fused AdamW reads its step counters in here, the GPU's does so on the device.
            while above is not None and above.name != "aten::_fused_adamw_":
                above = above.cpu_parent
            if above is None:
                found.add(event.name)
    return found


class Loop:
    """The pieces of a fold's loop, without evaluations and checkpoints."""

    def __init__(self, dataset, llm, *settings):
        self.accelerator = Accelerator(cpu=True)
        config = load(None, [f"model.llm={llm}", "training.global_batch=4", "training.micro_batch=2", *settings])
        store = ClipStore([dataset], 64)
        view = store.view([sample.sample_id for sample in store.samples])
        self.built = build_model(config, AUS, llm)
        self.model = self.built.model.train()
        self.optimizer = build_optimizer(self.model, config.training)
        self.guard = GradientGuard(self.optimizer, config.training.max_bad_steps, fold=0)
        self.accelerator.gradient_accumulation_steps = 2
        self.step = TrainStep(
            self.accelerator, Learner(self.built, self.model, self.optimizer), Objective.from_config(config),
            config.training, self.guard, accumulation=2,
        )  # fmt: skip
        recipe = training_recipe(config, self.built)
        plan, stream = BatchPlan(4, 2, 1, 0), SampleStream(len(view), 0)
        loader = training_loader(view, view.labels(AUS), recipe, stream, plan, (0, STEPS), workers=0, pin=False)
        self.batches = iter(loader)
        self.log, self.rate = LossLog(self.accelerator), Throughput()

    def run(self, first, last):
        for step in range(first, last):
            self.step.run(self.batches, step, STEPS, self.log, self.rate)

    def state(self):
        return [p.detach().clone() for p in self.step.trainables]


@pytest.mark.parametrize(
    "settings",
    [(), ("model.attention=sdpa",), ("model.readout=per_au", "model.suffixes_per_row=3"), ("model.quantization=nf4",)],
    ids=lambda settings: settings[0].partition("=")[2] if settings else "prefix",
)
def test_between_logged_steps_nothing_waits_for_the_device(tiny_dataset, tiny_llm, settings):
    loop = Loop(tiny_dataset, tiny_llm, *settings)
    loop.run(0, 1)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        loop.run(1, 2)
    assert "aten::_fused_adamw_" in {event.name for event in trace.events()}
    assert waiting(trace) == set()
    loop.batches = iter([next(loop.batches) for _ in range(2)])
    with HostTensors() as mode:
        loop.run(2, 3)
    assert mode.found == set()
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        loop.guard.wait_for_steps()
        losses = loop.log.read()
    assert "aten::item" in waiting(trace), "the trace would show a host that waits"
    assert all(math.isfinite(value) for value in losses.values())
    times = loop.step.clock.read()
    assert min(times.values()) > 0
    assert times["total"] == pytest.approx(sum(times[part] for part in PARTS))
    assert math.isfinite(loop.guard.last_norm)


def test_a_step_that_is_not_finite_leaves_no_trace(tiny_dataset, tiny_llm, caplog, monkeypatch):
    logger = logging.getLogger("aullm_dist")
    monkeypatch.setattr(logger, "propagate", True)
    loop = Loop(tiny_dataset, tiny_llm, "training.max_bad_steps=2")
    loop.run(0, 1)
    before = loop.state()
    moments = {p: {k: v.clone() for k, v in s.items()} for p, s in loop.optimizer.state.items()}
    poisoned = loop.step.trainables[0].register_hook(lambda gradient: gradient * math.nan)
    loop.run(1, 2)
    assert loop.guard.bad_steps == 1
    assert math.isnan(loop.guard.last_norm)
    assert "Step 2: the gradient is not finite; skipped (1 in a row)" in caplog.text
    assert all(torch.equal(p, was) for p, was in zip(loop.step.trainables, before, strict=True))
    for parameter, state in loop.optimizer.state.items():
        assert all(torch.equal(value, moments[parameter][key]) for key, value in state.items())
    assert all(p.grad is None for p in loop.step.trainables)
    with pytest.raises(UserError, match="step 3: the gradient was not finite in 2 steps in a row"):
        loop.run(2, 3)
    poisoned.remove()
    loop.run(3, 4)
    assert loop.guard.bad_steps == 0
    assert not all(torch.equal(p, was) for p, was in zip(loop.step.trainables, before, strict=True))


class Arrival:
    """Stands for a CUDA event, and notes who waited for it."""

    def __init__(self, waited, step):
        self.waited, self.step = waited, step

    def synchronize(self):
        self.waited.append(self.step)


def test_norms_on_their_way_are_looked_at_late_and_in_order(monkeypatch):
    """As on a GPU, where a norm has an event: at most 8 steps are open, and `wait_for_steps` waits for all of them."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    guard = GradientGuard(torch.optim.AdamW([parameter], fused=True), max_bad_steps=3, fold=0)
    waited: list[int] = []
    norms = [1.0] * 10 + [math.nan] * 2
    for step, norm in enumerate(norms):
        guard._pending.append(guard_module._Norm(step, torch.tensor(norm), Arrival(waited, step)))
        guard._look(guard_module.STEPS_BEHIND)
    assert waited == [0, 1, 2, 3]
    assert guard.bad_steps == 0
    guard.wait_for_steps()
    assert waited == list(range(12))
    assert guard.bad_steps == 2


def test_an_engine_that_decided_for_itself_is_believed():
    parameter = torch.nn.Parameter(torch.zeros(2))
    guard = GradientGuard(torch.optim.AdamW([parameter], fused=True), max_bad_steps=2, fold=3)
    parameter.grad = torch.ones(2)
    guard.step(math.inf, 0)
    assert not parameter.any()
    assert guard.bad_steps == 1
    with pytest.raises(UserError, match="fold 3, step 2"):
        guard.step(math.inf, 1)


def test_the_optimizer_is_the_fused_one():
    model = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(model, load(None, []).training)
    assert optimizer.defaults["fused"] is True
    plain = torch.nn.Linear(3, 2)
    plain.load_state_dict(model.state_dict())
    reference = torch.optim.AdamW(
        [{"params": [plain.weight], "weight_decay": 0.01}, {"params": [plain.bias], "weight_decay": 0.0}],
        lr=1e-3, foreach=False,
    )  # fmt: skip
    for _ in range(3):
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=torch.Generator().manual_seed(0))
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
