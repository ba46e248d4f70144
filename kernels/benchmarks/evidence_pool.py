"""Benchmarks `evidence_pool`: sizes, traffic arithmetic and the other ways to compute it."""

import torch
import torch.nn.functional as F
from aullm_kernels import evidence_pool, reference
from driver import Provider, Work
from torch import Tensor

TESTS = "tests/ops/test_evidence_kernels.py"
HEADS, REGIONS, JOIN = 4, 9, 256
SIZES = {
    # name: clips B, cells N, channels C. `model` is what the trainer passes for a micro-batch of 16 clips in 3
    # branches: 16 clips and some 22 views of them, of other appearance or without movement.
    "tiny": (2, 18, 16),
    "model": (38, 162, 64),
    "S": (64, 162, 64),
    "M": (512, 162, 128),
    "L": (4096, 162, 256),
}
CALLS = 1
"""Calls in a training step."""
_ROWS = HEADS + 1 + REGIONS


def make_inputs(size: str, device: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict]:
    """Return the differentiable inputs and the rest."""
    batch, cells, channels = SIZES[size]
    draw = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)  # noqa: E731
    inputs = {"cells": draw(batch, cells, channels), "queries": draw(batch, HEADS, channels), "join": draw(batch, JOIN)}
    return inputs, {"regions": torch.arange(cells, device=device) % REGIONS}


def work(size: str, dtype: torch.dtype) -> dict[str, Work]:
    """Return the least work of each mode: cells once forward; backward once read and once written.

    The join goes out once and its gradient comes in once; queries, evidence rows and statistics are in full.
    """
    batch, cells, channels = SIZES[size]
    item = torch.empty((), dtype=dtype).element_size()
    texture = batch * cells * channels
    query, kept = batch * HEADS * channels, 4 * batch * (HEADS * channels + 2 * 16)
    joined = batch * (_ROWS * channels + JOIN)
    forward = Work(item * (texture + query + batch * JOIN + joined) + kept, 4 * _ROWS * texture)
    backward = Work(item * (2 * texture + 2 * query + joined) + kept, 10 * _ROWS * texture)
    return {"forward": forward, "backward": backward, "full": forward + backward}


def arithmetic(size: str) -> str:
    """Say where an unfused pass loses."""
    batch, cells, channels = SIZES[size]
    return (
        f"the cells are {2e-6 * batch * cells * channels:.1f} MB; eager reads them 3 times forward and moves them 11 "
        "times backward, the kernels once and twice; below 10 MB launches decide"
    )


def expected(inputs: dict[str, Tensor], rest: dict) -> dict[str, Tensor]:
    """Return result and gradients in float64."""
    leaves = {name: value.double().requires_grad_() for name, value in inputs.items()}
    out = reference.evidence_pool(**leaves, **rest)
    out.backward(torch.ones_like(out))
    return {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}}


def providers(rest: dict, device: str, kernels: str, inputs: dict[str, Tensor]) -> list[Provider]:
    """Return ours and everything it is compared with."""
    regions = rest["regions"]
    member = F.one_hot(regions, REGIONS).t()
    weights = torch.cat([torch.ones_like(member[:1]), member]).float()
    weights = weights / weights.sum(1, keepdim=True)
    keep = torch.cat([torch.ones(HEADS + 1, len(regions), device=device), member]).bool()

    def eager(cells: Tensor, queries: Tensor, join: Tensor) -> Tensor:
        score = torch.softmax(queries @ cells.transpose(1, 2) * cells.shape[2] ** -0.5, dim=-1)
        parts = [score @ cells, weights.to(cells.dtype) @ cells]
        return torch.cat([*(part.flatten(1) for part in parts), join], dim=1)

    def sdpa(cells: Tensor, queries: Tensor, join: Tensor) -> Tensor:
        zero = queries.new_zeros(queries.shape[0], 1 + REGIONS, queries.shape[2])
        rows = F.scaled_dot_product_attention(
            torch.cat([queries, zero], dim=1)[:, None], cells[:, None], cells[:, None], attn_mask=keep
        )
        return torch.cat([rows.flatten(1), join], dim=1)

    def autocast(**inputs: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return eager(**inputs)

    slow = None if device == "cuda" else "compiled code is compared on a GPU"
    return [
        Provider("eager", eager),
        Provider("autocast eager", autocast, prepare=Tensor.float),
        Provider("compile", torch.compile(eager), skip=slow),
        Provider("compile max-autotune", torch.compile(eager, mode="max-autotune-no-cudagraphs"), skip=slow),
        Provider("SDPA", sdpa),
        _flex(regions, slow),
        Provider(
            f"ours: {kernels}", lambda **inputs: evidence_pool(**inputs, **rest, implementation=kernels), ours=True
        ),
    ]


def _flex(regions: Tensor, slow: str | None) -> Provider:
    """The same as SDPA: rows of zero queries, those of the regions masked, 128 of them at least in a block."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if slow:
        return Provider("flex_attention", None, skip=slow)

    def keep(_b: Tensor, _h: Tensor, row: Tensor, cell: Tensor) -> Tensor:
        return (row <= HEADS) | (regions[cell] == row - HEADS - 1)

    blocks = create_block_mask(keep, None, None, _ROWS, len(regions), device=str(regions.device))
    attend = torch.compile(flex_attention)

    def call(cells: Tensor, queries: Tensor, join: Tensor) -> Tensor:
        zero = queries.new_zeros(queries.shape[0], 1 + REGIONS, queries.shape[2])
        rows = attend(torch.cat([queries, zero], dim=1)[:, None], cells[:, None], cells[:, None], block_mask=blocks)
        return torch.cat([rows.flatten(1), join], dim=1)

    return Provider("flex_attention", call)
