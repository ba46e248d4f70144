"""Defines the smallest kernel, which shows whether Triton can run at all (`first_launch`); imports triton."""

import torch
import triton
import triton.language as tl
from triton.errors import TritonError


@triton.jit
def _store_kernel(pointer):
    tl.store(pointer, 1.0)


def compile_smallest() -> None:
    """Start Triton's driver, compile the kernel for the current device and load it there.

    Raises:
        RuntimeError: Triton cannot compile or load it.
        Exception: whatever else its compilers or the driver of the GPU raise (`first_launch`).
    """
    try:
        compiled = _store_kernel.warmup(torch.float32, grid=(1,))
        # Reading the launcher is what loads the binary.
        assert compiled.run is not None, "triton returns no launcher"
    except TritonError as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
