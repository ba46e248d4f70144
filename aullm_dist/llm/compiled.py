"""Compiles the decoder's blocks one by one: they share one graph for each length of the packed row (torch.compile)."""

from typing import Any

import torch
from torch import nn

from aullm_dist.packing.forward import decoder_of

COMPILATIONS = ("none", "blocks")
_RECOMPILE_LIMIT = 64
"""Training and evaluation, with and without gradients, at each length; torch's own 8 are soon used up, and it then runs
uncompiled silently."""


def compile_blocks(llm: nn.Module, *, static_lengths: bool, backend: str = "inductor") -> str:
    """Have every decoder layer compiled at its first call, and say for the log what was done.

    Args:
        llm: causal LM, wrapped by PEFT or not.
        static_lengths: whether packed rows come in few lengths, so that each is compiled for itself; otherwise the
            second length already is compiled for all that follow.
        backend: torch.compile's backend; tests take one that needs no compiler.
    """
    decoder: Any = decoder_of(llm)
    layers: nn.ModuleList = decoder.layers
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _RECOMPILE_LIMIT)
    for layer in layers:
        layer.compile(backend=backend, dynamic=False if static_lengths else None)
    lengths = "each length for itself" if static_lengths else "one graph for all lengths"
    return f"{len(layers)} decoder layers ({backend}, {lengths})"
