"""The engine's small parts that need no process group."""

import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from aullm_dist.config import Strategy
from aullm_dist.distributed import engine
from aullm_dist.errors import UserError


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"stage": 3, "stage3_prefetch_buckets": 1}, "stage3_prefetch_buckets is refused by DeepSpeed"),
        ({"stage": 2, "reduce_bucket_size": "many"}, "reduce_bucket_size is refused by DeepSpeed"),
    ],
)
def test_what_deepspeed_refuses_is_one_line(section, message):
    with pytest.raises(UserError, match=message) as refusal:
        engine.check_zero_section(Strategy("own", section["stage"], {}, Path("own.json")), section)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith("own.json: ")


def test_the_gradient_norm_is_exact_and_clips():
    accelerator = Accelerator(cpu=True)
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(500_000)), torch.nn.Parameter(torch.zeros(3))]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    exact = torch.cat([parameter.grad for parameter in parameters]).double().norm().item()
    assert engine.clip_gradients(accelerator, parameters, 2.0).item() == pytest.approx(exact, rel=1e-9)
    clipped = torch.cat([parameter.grad for parameter in parameters]).double().norm().item()
    assert clipped == pytest.approx(2.0, rel=1e-5)
    parameters[1].grad[0] = torch.nan
    assert math.isnan(engine.clip_gradients(accelerator, parameters, 2.0))
