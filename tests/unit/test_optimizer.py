"""Groups of AdamW, the learning-rate schedule, and steps that are skipped: numbers by hand."""

import math

import pytest
import torch
from torch import nn

from aullm_dist.config import load
from aullm_dist.errors import UserError
from aullm_dist.training.guard import GradientGuard
from aullm_dist.training.optimizer import build_optimizer, parameter_kind, schedule, set_learning_rates


class Model(nn.Module):
    """A parameter of each kind and shape."""

    def __init__(self):
        super().__init__()
        self.led = nn.Linear(2, 2)
        self.head = nn.Linear(2, 3)
        self.gain = nn.Parameter(torch.ones(3))
        self.lora_A = nn.Linear(2, 4, bias=False)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def _training(**changes):
    rates = {"lr_lora": 0.1, "lr_new": 0.2, "lr_led": 0.4, "weight_decay": 0.05, **changes}
    return load(None).changed({f"training.{name}": value for name, value in rates.items()}).training


def test_each_kind_has_its_rate_and_only_matrices_decay():
    model = Model()
    groups = build_optimizer(model, _training()).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert {
        (group["name"], *sorted(names[id(p)] for p in group["params"])): (
            group["lr"],
            group["base_lr"],
            group["weight_decay"],
        )
        for group in groups
    } == {
        ("led", "led.bias", "led.weight"): (0.4, 0.4, 0.0),
        ("new", "head.weight"): (0.2, 0.2, 0.05),
        ("new", "gain", "head.bias"): (0.2, 0.2, 0.0),
        ("lora", "lora_A.weight"): (0.1, 0.1, 0.05),
    }
    assert all(group["fused"] for group in groups)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llm.layers.0.q_proj.lora_A.default.weight", "lora"),
        ("visual.led.scale", "led"),
        ("led.scale", "led"),
        ("visual.ledger.weight", "new"),
        ("filled.weight", "new"),
    ],
)
def test_the_kind_of_a_parameter_is_in_its_name(name, kind):
    assert parameter_kind(name) == kind


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.25),
        (1, 0.5),
        (3, 1.0),
        (4, 1.0),
        (12, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2))),
        (16, 0.1 + 0.9 * 0.5 * (1 + math.cos(0.75 * math.pi))),
        (20, 0.1),
    ],
)
def test_the_rate_rises_linearly_and_falls_as_a_cosine(step, factor):
    assert schedule(step, 20, warmup_fraction=0.2, min_lr_fraction=0.1) == pytest.approx(factor)


def test_short_and_missing_warm_ups():
    assert schedule(0, 20, 0.0, 0.0) == 1.0
    assert schedule(10, 20, 0.0, 0.0) == pytest.approx(0.5)
    assert [schedule(step, 10, 0.01, 0.5) for step in (0, 1)] == [1.0, 1.0]  # rounded to no step, and still one
    assert schedule(1, 1, 0.5, 0.5) == 1.0  # a run that is all warm-up


def test_rates_are_set_from_the_base_and_not_from_the_last():
    optimizer = build_optimizer(Model(), _training())
    for _ in range(2):
        set_learning_rates(optimizer, 0.5)
        assert {group["name"]: group["lr"] for group in optimizer.param_groups} == {
            "lora": 0.05,
            "new": 0.1,
            "led": 0.2,
        }
        assert {group["base_lr"] for group in optimizer.param_groups} == {0.1, 0.2, 0.4}


def _guarded(max_bad_steps: int = 3) -> tuple[nn.Linear, GradientGuard]:
    model = nn.Linear(2, 1, bias=False)
    return model, GradientGuard(torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), max_bad_steps, fold=4)


def _step(model: nn.Linear, guard: GradientGuard, norm: torch.Tensor | float, step: int) -> bool:
    """Whether a step changed the weights; afterwards there is no gradient."""
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    guard.step(norm, step)
    assert model.weight.grad is None
    return not torch.equal(model.weight, before)


@pytest.mark.parametrize("of", [torch.tensor, float])
def test_a_step_is_taken_where_the_norm_is_finite(of):
    model, guard = _guarded()
    assert math.isnan(guard.last_norm)
    assert _step(model, guard, of(2.0), 0)
    assert (guard.last_norm, guard.bad_steps) == (2.0, 0)
    assert not _step(model, guard, of(math.inf), 1)
    assert not _step(model, guard, of(math.nan), 2)
    assert guard.bad_steps == 2
    assert _step(model, guard, of(3.0), 3)
    assert (guard.last_norm, guard.bad_steps) == (3.0, 0)
    guard.wait_for_steps()
    assert guard.bad_steps == 0


def test_too_many_skipped_steps_in_a_row_end_the_run():
    model, guard = _guarded(max_bad_steps=2)
    for step, norm in enumerate((math.inf, 1.0, math.inf)):
        _step(model, guard, torch.tensor(norm), step)
    with pytest.raises(UserError, match=r"fold 4, step 4: the gradient was not finite in 2 steps in a row"):
        guard.step(torch.tensor(math.nan), 3)
