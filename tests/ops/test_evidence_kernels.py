"""The kernels of evidence_pool against the reference in float64: values, gradients, shapes, layouts, stray accesses."""

import pytest
import torch
from aullm_kernels import evidence_pool, reference
from kernel_tools import (
    DEVICE,
    KERNELS,
    TOLERANCES,
    error,
    gradients,
    inside_nan,
    poisoned_and_fenced,
    rounding_casts,
    shuffled_programs,
)

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = pytest.mark.filterwarnings("ignore:.*FP fusion.*")


def make_inputs(batch, cells, channels, heads, dtype=torch.float32, join=None, scale=1.0):
    generator = torch.Generator().manual_seed(batch + cells + channels + heads)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)  # noqa: E731
    inputs = {"cells": draw(batch, cells, channels), "queries": draw(batch, heads, channels) * scale}
    if join is not None:
        inputs["join"] = draw(batch, join)
    return inputs


def both(inputs, regions, valid=None, num_regions=9):
    """Results and gradients of the kernels, and of the reference in float64 on the same rounded inputs."""
    options = {"regions": regions.to(DEVICE), "valid": valid, "num_regions": num_regions}
    probe = evidence_pool(**inputs, **options, implementation="torch")
    grad = torch.randn(probe.shape, generator=torch.Generator().manual_seed(5)).to(probe.dtype).to(DEVICE)
    found = gradients(lambda **kw: evidence_pool(**kw, **options, implementation=KERNELS), inputs, grad)
    wide = {name: value.double() for name, value in inputs.items()}
    return found, gradients(lambda **kw: reference.evidence_pool(**kw, **options), wide, grad.double())


def check(inputs, *args, factor=1.0, **kwargs):
    found, expected = both(inputs, *args, **kwargs)
    for name, value in found.items():
        # A join of another type changes the type of the result, not that of the sums.
        tolerance = factor * TOLERANCES[inputs["cells"].dtype]
        assert error(value, expected[name]) <= tolerance, name
    return found


@pytest.mark.parametrize(
    ("batch", "cells", "channels", "heads", "join"),
    [
        (2, 162, 64, 4, 256),
        (1, 1, 64, 4, None),
        (3, 16, 16, 1, 3),
        (1, 17, 20, 2, None),
        (2, 33, 24, 3, 300),
        (1, 33, 100, 6, None),
        (1, 20, 128, 2, None),
        (1, 18, 256, 4, 5),
        (2, 9, 48, 0, 7),
        (0, 5, 8, 2, 4),
    ],
)
def test_every_size_agrees_with_float64(batch, cells, channels, heads, join):
    # On a GPU the table holds float32 up to 64 channels.
    dtype = torch.bfloat16 if DEVICE == "cuda" and channels > 64 else torch.float32
    check(make_inputs(batch, cells, channels, heads, dtype, join=join), torch.arange(cells) % 9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_agrees_with_float64(dtype):
    if DEVICE == "cuda" and dtype == torch.float64:
        pytest.skip("float64 runs in the interpreter only")
    valid = torch.rand(2, 50, device=DEVICE) > 0.3
    check(make_inputs(2, 50, 64, 4, dtype, join=9, scale=2.0), torch.arange(50) % 7, valid)


@pytest.mark.parametrize("low", ["cells", "queries"])
def test_types_may_differ_as_under_autocast(low):
    inputs = make_inputs(1, 18, 16, 2, join=3)
    inputs[low] = inputs[low].bfloat16()
    found, expected = both(inputs, torch.arange(18) % 9)
    assert found["out"].dtype == found["join"].dtype == torch.float32
    for name, value in found.items():
        assert error(value, expected[name]) <= TOLERANCES[torch.bfloat16 if name == low else torch.float32], name


def test_the_errors_in_bfloat16_are_those_of_plain_bfloat16(monkeypatch):
    """At most 1.2 times those of the same function in bfloat16 throughout: of the result and of every gradient."""
    inputs = make_inputs(2, 162, 64, 4, torch.bfloat16)
    regions = torch.arange(162) % 9
    with rounding_casts(monkeypatch):
        found, expected = both(inputs, regions)
    means = torch.cat([torch.ones(1, 162), torch.nn.functional.one_hot(regions, 9).t()])
    means = (means / means.sum(1, keepdim=True)).bfloat16().to(DEVICE)

    def plain(cells, queries):
        weights = torch.softmax(queries @ cells.transpose(1, 2) / 8.0, dim=-1)
        return torch.cat([weights @ cells, means @ cells], dim=1)

    grad = torch.randn(found["out"].shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(DEVICE)
    for name, value in gradients(plain, inputs, grad).items():
        assert error(found[name], expected[name]) <= 1.2 * error(value, expected[name]), name


def test_cells_that_do_not_count_are_never_read():
    valid = torch.rand(3, 40, device=DEVICE) > 0.4
    valid[1] = False
    inputs = make_inputs(3, 40, 24, 2)
    clean = check(inputs, torch.arange(40) % 5, valid)
    inputs["cells"] = inputs["cells"].masked_fill(~valid[:, :, None], float("nan"))
    options = {"regions": torch.arange(40, device=DEVICE) % 5, "valid": valid, "implementation": KERNELS}
    dirty = gradients(lambda **kw: evidence_pool(**kw, **options), inputs)
    assert torch.equal(dirty["out"], clean["out"])
    assert (dirty["out"][1] == 0).all()
    assert (dirty["cells"][~valid] == 0).all()
    assert torch.isfinite(dirty["queries"]).all()
    assert (dirty["queries"][1] == 0).all()


def test_large_scores_and_equal_cells():
    inputs = make_inputs(2, 33, 64, 4, scale=40.0)
    check(inputs, torch.arange(33) % 9, factor=20)
    inputs["cells"] = inputs["cells"][:, :1].expand(-1, 33, -1)
    found, expected = both(inputs, torch.arange(33) % 9)
    # With equal cells no query can change anything: their gradient is rounding error.
    assert found["queries"].abs().max() < 1e-3
    assert error(found["out"], expected["out"]) < 1e-5


@pytest.mark.parametrize("layout", ["channels_first", "slice", "expanded", "offset"])
def test_any_layout_in_memory(layout):
    inputs = make_inputs(2, 21, 20, 2, join=6)
    cells = inputs["cells"]
    if layout == "channels_first":
        inputs["cells"] = cells.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "slice":
        inputs["cells"] = cells.repeat_interleave(2, dim=2)[:, :, ::2]
        inputs["queries"] = inputs["queries"].transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "expanded":
        inputs["cells"] = cells[:1].expand(2, -1, -1)
    else:
        inputs["cells"] = torch.cat([cells.new_zeros(1), cells.flatten()])[1:].view(cells.shape)
    found = check(inputs, torch.arange(21) % 9, torch.rand(21, 2, device=DEVICE).t() > 0.2)
    if layout == "channels_first":
        assert found["cells"].stride() == inputs["cells"].stride()


def test_a_frozen_backbone_and_fixed_queries_need_no_gradient():
    inputs = make_inputs(2, 20, 24, 2)
    regions = torch.arange(20, device=DEVICE) % 9
    full = gradients(lambda **kw: evidence_pool(**kw, regions=regions, implementation=KERNELS), inputs)
    for kept, frozen in (("queries", "cells"), ("cells", "queries")):
        rest = {frozen: inputs[frozen]}
        found = gradients(
            lambda rest=rest, **kw: evidence_pool(**kw, **rest, regions=regions, implementation=KERNELS),
            {kept: inputs[kept]},
        )
        assert torch.equal(found[kept], full[kept])


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 runs in the interpreter only")
def test_gradcheck_of_the_kernels():
    inputs = make_inputs(2, 5, 3, 2, torch.float64, join=2)
    regions, valid = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([[True, True, False, True, True], [False] * 5])

    def call(cells, queries, join):
        return evidence_pool(cells, queries, regions, valid, join, num_regions=3, implementation=KERNELS)

    assert torch.autograd.gradcheck(call, tuple(value.requires_grad_() for value in inputs.values()))


@pytest.mark.parametrize("with_valid", [False, True])
def test_nothing_is_left_unwritten_and_nothing_strays(with_valid, monkeypatch):
    inputs = {name: inside_nan(value) for name, value in make_inputs(2, 19, 20, 3, join=5).items()}
    regions = torch.arange(19, device=DEVICE) % 9
    valid = torch.rand(2, 19, device=DEVICE) > 0.3 if with_valid else None
    call = lambda **kw: evidence_pool(**kw, regions=regions, valid=valid, implementation=KERNELS)  # noqa: E731
    clean = gradients(call, inputs)
    with poisoned_and_fenced(monkeypatch) as allocated:
        found = gradients(call, inputs)
    assert len(allocated) >= 4
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU shuffles by itself")
def test_the_order_of_programs_does_not_matter(monkeypatch):
    inputs = make_inputs(4, 20, 16, 2, join=3)
    call = lambda **kw: evidence_pool(**kw, regions=torch.arange(20) % 9, implementation=KERNELS)  # noqa: E731
    expected = gradients(call, inputs)
    with shuffled_programs(monkeypatch, seed=1):
        found = gradients(call, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
