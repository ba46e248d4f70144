"""The one place where a checkpoint touches parameters and optimizer state of the running engine.

One process and DDP hold every tensor whole, so these functions are short. An engine that shards (ZeRO-3) gets its
gathering and scattering here and nowhere else. Every process calls them for the same parameters in the same order, so
that they may hold collectives.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def full_tensor(param: Tensor) -> Tensor:
    """Return the whole value of a parameter or buffer, in its own dtype and shape, without autograd history."""
    return param.detach()


def full_shape(param: Tensor) -> tuple[int, ...]:
    """Return the shape that `full_tensor` would give, without gathering."""
    return tuple(param.shape)


def full_master(param: nn.Parameter) -> Tensor:
    """Return the fp32 value that the optimizer updates (fp64 stays fp64); the same shape as the parameter."""
    value = full_tensor(param)
    return value if value.dtype.itemsize >= 4 else value.float()


def optimizer_state(optimizer: torch.optim.Optimizer, param: nn.Parameter) -> dict[str, Any]:
    """Return the optimizer's entries for a parameter (`step`, `exp_avg`, ...), empty if it was never stepped."""
    return dict(optimizer.state.get(param, {}))


def set_tensor(param: Tensor, value: Tensor) -> None:
    """Overwrite a parameter or buffer in place, so that the optimizer and the engine keep their references."""
    with torch.no_grad():
        param.copy_(value)


def set_optimizer_state(optimizer: torch.optim.Optimizer, param: nn.Parameter, values: Mapping[str, Tensor]) -> None:
    """Replace the optimizer's entries for a parameter; without values it counts as never stepped.

    Each entry gets storage of its own: one `step` tensor shared between parameters is advanced once per parameter by
    fused AdamW, and the run is no longer the same (DeepSpeed's universal checkpoints have that defect).
    """
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
