"""Reads and writes parameters and optimizer state of the running engine for checkpoints: the one place that does.

One process and DDP hold every tensor whole; what ZeRO keeps in pieces is gathered and scattered in `zero_state`. Every
process calls these functions for the same parameters in the same order, so that they may hold collectives.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from aullm_dist.distributed import zero_state


def full_tensor(param: Tensor) -> Tensor:
    """Return the whole value of a parameter or buffer, in its own dtype and shape, without autograd history."""
    return zero_state.full_tensor(param) if zero_state.is_managed(param) else param.detach()


def gathered(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """Return a region in which the given parameters are whole on every process, for reading alone."""
    return zero_state.gathered([param for param in parameters if zero_state.is_managed(param)])


def full_shape(param: Tensor) -> tuple[int, ...]:
    """Return the shape that `full_tensor` would give, without gathering."""
    return zero_state.full_shape(param)


def full_master(param: Tensor) -> Tensor:
    """Return the fp32 value that the optimizer updates (fp64 stays fp64); the same shape as the parameter."""
    if zero_state.is_managed(param):
        return zero_state.full_master(param)
    value = full_tensor(param)
    return value if value.dtype.itemsize >= 4 else value.float()


def optimizer_state(optimizer: torch.optim.Optimizer, param: Tensor) -> dict[str, Any]:
    """Return the optimizer's entries for a parameter (`step`, `exp_avg`, ...), empty if it was never stepped."""
    if zero_state.is_managed(param):
        return zero_state.optimizer_state(optimizer, param)
    return dict(optimizer.state.get(param, {}))


def updating_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the torch optimizer that computes the update, which ZeRO wraps and lets work on flat pieces."""
    return zero_state.base_optimizer(optimizer) if zero_state.is_zero_optimizer(optimizer) else optimizer


def grouped_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Return the parameters that the optimizer updates, one entry for each param group that holds them."""
    if zero_state.is_zero_optimizer(optimizer):
        return zero_state.grouped_parameters(optimizer)
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_tensor(param: Tensor, value: Tensor) -> None:
    """Overwrite a parameter or buffer in place, so that the optimizer and the engine keep their references."""
    if zero_state.is_managed(param):
        zero_state.set_tensor(param, value)
        return
    with torch.no_grad():
        param.copy_(value)


def set_optimizer_state(optimizer: torch.optim.Optimizer, param: Tensor, values: Mapping[str, Tensor]) -> None:
    """Replace the optimizer's entries for a parameter; with empty `values` it counts as never stepped.

    Each entry gets storage of its own: one `step` tensor shared between parameters is advanced once per parameter by
    fused AdamW, and the run is no longer the same (DeepSpeed's universal checkpoints have that defect).
    """
    if zero_state.is_managed(param):
        zero_state.set_optimizer_state(optimizer, param, values)
        return
    if not values:
        optimizer.state.pop(param, None)
        return
    group = next(group for group in optimizer.param_groups if any(member is param for member in group["params"]))
    on_device = bool(group.get("capturable") or group.get("fused"))
    restored = {}
    for key, value in values.items():
        if key != "step" and value.shape == param.shape:
            # The layout of the parameter, as the optimizer itself would have allocated it.
            restored[key] = torch.empty_like(param, memory_format=torch.preserve_format, requires_grad=False).copy_(
                value
            )
        else:
            restored[key] = value.clone().to(param.device if on_device else "cpu")
    optimizer.state[param] = restored


def reset(model: nn.Module, optimizer: torch.optim.Optimizer, values: Mapping[str, Tensor]) -> None:
    """Set the trainables and buffers named in `values` and forget what the optimizer has seen, as if nothing had been
    trained.
    """
    for name, param in model.named_parameters():
        if name in values:
            set_tensor(param, values[name])
            set_optimizer_state(optimizer, param, {})
    for name, buffer in model.named_buffers():
        if name in values:
            set_tensor(buffer, values[name])
