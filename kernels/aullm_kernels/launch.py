"""Launches Triton kernels: number types, the device, and the options of the compiler, alike for all of them."""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from aullm_kernels.tables import Tile, operand_bits

INTERPRETING = triton.knobs.runtime.interpret
"""Whether Triton runs kernels in its interpreter; decided by TRITON_INTERPRET when triton was imported."""

# Off by default from triton 3.10 on, which costs the graph kernels a tenth of their instructions.
OPTIONS = {"enable_fp_fusion": True}


class Numbers(NamedTuple):
    """Types that a kernel computes in.

    Attributes:
        bits: Bits of a product's operands, as the configuration table counts them.
        acc: Type of everything that is not an operand of a matrix product.
        dot: Type of a product's operands.
        precision: How float32 operands are multiplied.
    """

    bits: int
    acc: tl.dtype
    dot: tl.dtype
    precision: str


def numbers(*tensors: Tensor | None, interpreting: bool = INTERPRETING) -> Numbers:
    """Choose the types for these inputs; they accumulate in float32, or in float64 (interpreter only) if one has it.

    Products take bfloat16 operands where all inputs are bfloat16. float16 becomes tf32, which holds all of its values
    and does not underflow; anything else is float32 to nearly full precision, in three tf32 products. The interpreter
    multiplies neither bfloat16 nor tf32 as a GPU does, so it takes the accumulator's type, and needs no registers.
    """
    dtypes = {tensor.dtype for tensor in tensors if tensor is not None}
    if interpreting:
        acc = tl.float64 if torch.float64 in dtypes else tl.float32
        return Numbers(16, acc, acc, "ieee")
    bits = operand_bits(*dtypes)
    return Numbers(bits, tl.float32, tl.bfloat16 if bits == 16 else tl.float32, "tf32x3" if bits == 32 else "tf32")


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, device: torch.device, tile: Tile, **constants: Any
) -> None:
    """Run `kernel` on `grid`; nothing runs on an empty one.

    Args:
        kernel: A `triton.jit` function.
        grid: Number of programs in each of up to three dimensions.
        arguments: Positional arguments of the kernel.
        device: Device of its tensors, which need not be the current one.
        tile: Row of the configuration table.
        constants: Compile-time arguments.
    """
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](
            *arguments,
            **constants,
            **OPTIONS,
            **tile.options(),
        )
