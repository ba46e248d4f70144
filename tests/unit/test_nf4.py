"""Packing to NF4 on a CPU: bit for bit what bitsandbytes packs."""

import pytest
import torch
from bitsandbytes.functional import get_4bit_type, quantize_4bit

from aullm_dist.llm import nf4
from aullm_dist.llm.nf4 import BLOCK, block_maxima
from aullm_dist.llm.quantization import make_packer, nf4_config, pack

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def upstream(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed, state = quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
    return packed.view(-1), state.absmax


def check(values: torch.Tensor) -> None:
    maxima = block_maxima(values)
    expected, constants = upstream(values)
    assert torch.equal(maxima, constants)
    assert torch.equal(make_packer().pack(values, maxima), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.02, 3e-7, 1e4])
def test_random_weights(dtype, scale):
    generator = torch.Generator().manual_seed(0)
    check((torch.randn(500 * BLOCK, generator=generator) * scale).to(dtype))


def test_weights_beside_the_borders():
    code = get_4bit_type("nf4", device="cpu")
    borders = (code[:-1] + code[1:]) / 2
    edges = torch.arange(-16, 17) / 16  # of the table's cells
    near = torch.cat([borders, code, edges])
    for _ in range(3):
        near = torch.cat([near, near.nextafter(torch.tensor(2.0)), near.nextafter(torch.tensor(-2.0))]).unique()
    near = near[near.abs() <= 1]
    # A block that holds 1 is not scaled: its weights stay where they are.
    blocks = [torch.cat([torch.ones(1), part, torch.zeros(BLOCK - 1 - len(part))]) for part in near.split(BLOCK - 1)]
    check(torch.cat(blocks))


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, -3e-39, 65504.0])
def test_blocks_of_one_value(value):
    check(torch.full((BLOCK,), value))


def test_more_than_fits_the_buffers(monkeypatch):
    monkeypatch.setattr(nf4, "_AT_ONCE", 3 * BLOCK)
    check(torch.randn(8 * BLOCK, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_spoil_their_own_block_alone(value):
    values = torch.randn(3 * BLOCK, generator=torch.Generator().manual_seed(2))
    expected, _ = upstream(values)
    values[BLOCK + 5] = value
    maxima = block_maxima(values)
    packed = make_packer().pack(values, maxima)
    assert maxima.isfinite().tolist() == [True, False, True]
    for block in (slice(0, BLOCK // 2), slice(BLOCK, 3 * BLOCK // 2)):
        assert torch.equal(packed[block], expected[block])


@pytest.mark.parametrize("size", [2 * BLOCK, 2 * BLOCK + 12])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_packing_for_a_model(size, storage):
    config = nf4_config(torch.bfloat16)
    config.bnb_4bit_quant_storage = storage
    values = torch.randn(size, generator=torch.Generator().manual_seed(3))
    packed, constants = pack(values, config)
    expected, theirs = upstream(values)
    assert packed.dtype == storage
    assert torch.equal(packed.view(torch.uint8), expected)
    assert torch.equal(constants, theirs)
