"""Measures how far LoRA has moved each linear layer since the start, without ever making the product of its matrices.

LoRA adds `s B A` to a weight, with B zero at the start, so the change since then is `s B A` itself, and
`||B A||_F^2 = trace((B^T B)(A A^T))`: two matrices of rank x rank. Under ZeRO-3 one matrix at a time is whole.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from aullm_dist.distributed.engine_state import full_tensor

_LAYER = re.compile(r"\.(\d+)\.")
_ADAPTER = "default"


def update_norms(model: nn.Module) -> dict[str, dict[int, float]]:
    """Return the Frobenius norm of each LoRA update by kind of linear layer (`q_proj`) and decoder layer.

    Every process calls it: where parameters are partitioned, each is gathered in turn. Waits for the device, once.
    """
    names, squares = [], []
    module: Any
    for name, module in _lora_layers(model):
        a, b = (full_tensor(getattr(module, part)[_ADAPTER].weight).float() for part in ("lora_A", "lora_B"))
        scale = module.scaling[_ADAPTER]
        names.append(name)
        squares.append(_squared_norm(a, b) * scale**2)
        del a, b
    if not names:
        return {}
    norms = torch.stack(squares).clamp(min=0).sqrt().cpu().tolist()
    table: dict[str, dict[int, float]] = {}
    for name, norm in zip(names, norms, strict=True):
        layer = _LAYER.search(name)
        table.setdefault(name.rpartition(".")[2], {})[int(layer[1]) if layer else 0] = norm
    return table


def norms_of_layers(table: dict[str, dict[int, float]]) -> np.ndarray:
    """Return the norm of all updates of each decoder layer, `[layers]`, in their order."""
    layers = sorted({layer for row in table.values() for layer in row})
    return np.array([np.sqrt(sum(row.get(layer, 0.0) ** 2 for row in table.values())) for layer in layers])


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if _ADAPTER in getattr(module, "lora_A", ()):
            yield name, module


def _squared_norm(a: Tensor, b: Tensor) -> Tensor:
    """Return `||B A||_F^2` of A `[r, in]` and B `[out, r]`."""
    return ((b.T @ b).double() * (a @ a.T).double()).sum()
