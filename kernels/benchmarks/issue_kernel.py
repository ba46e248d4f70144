"""Defines a Triton kernel that only issues multiply-adds: the ceiling of instruction issue. Imported on a GPU only."""

import torch
import triton
import triton.language as tl

_STEPS, _CHAINS = 2048, 8
INSTRUCTIONS = _STEPS * _CHAINS
"""Multiply-adds of a thread for each of its elements."""


@triton.jit
def _issue_kernel(out_ptr, factor, STEPS: tl.constexpr, CHAINS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.cast(i, tl.float32)
    chains = ()
    for chain in tl.static_range(CHAINS):
        chains = chains + (b_x + chain,)
    for _ in range(STEPS):
        following = ()
        for chain in tl.static_range(CHAINS):
            following = following + (chains[chain] * factor + b_x,)
        chains = following
    b_sum = b_x
    for chain in tl.static_range(CHAINS):
        b_sum += chains[chain]
    tl.store(out_ptr + i, b_sum)


def run(out: torch.Tensor) -> None:
    """Fill `out`, whose length is a multiple of 1024."""
    grid = (out.numel() // 1024,)
    _issue_kernel[grid](out, 0.5, STEPS=_STEPS, CHAINS=_CHAINS, BLOCK=1024, num_warps=8, enable_fp_fusion=True)
