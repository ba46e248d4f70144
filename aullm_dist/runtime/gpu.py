"""Sets a GPU up before its first use: exact float32, and memory that can grow in place. CPUs ignore both."""

from collections.abc import MutableMapping

_ALLOCATOR = "PYTORCH_ALLOC_CONF"
_ALLOCATOR_VARIABLES = (_ALLOCATOR, "PYTORCH_CUDA_ALLOC_CONF")
"""The second is its earlier name, which torch still reads."""


def compute_float32_exactly() -> None:
    """Have float32 convolutions and products computed in float32 and not in TF32, which keeps 10 bits of 23.

    cuDNN takes TF32 for convolutions unless it is set otherwise, and on GPUs alone.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def let_memory_grow(environment: MutableMapping[str, str]) -> None:
    """Have torch's GPU allocator grow its segments, before torch is imported; what the user has set stays.

    Rows differ in length from step to step: in segments of fixed sizes, freed memory lies unused for those that fit
    none.
    """
    if not any(name in environment for name in _ALLOCATOR_VARIABLES):
        environment[_ALLOCATOR] = "expandable_segments:True"
