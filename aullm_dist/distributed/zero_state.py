"""Reads and writes full values of parameters that DeepSpeed ZeRO keeps in pieces, and of their optimizer state.

ZeRO-1 and -2 hold every parameter whole and cut flat fp32 copies of the trainables, with AdamW's state, over the
processes (`_hp_mapping`); ZeRO-3 also cuts the parameters (`ds_id`). What reads or writes values is collective: every
process calls it for the same parameters in the same order. Only the parameter asked for is ever gathered.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper
from torch import Tensor, nn

_MOMENTS = ("exp_avg", "exp_avg_sq")


def is_managed(param: Tensor) -> bool:
    """Whether ZeRO keeps this parameter, or its optimizer state, in pieces."""
    return hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")


def full_shape(param: Tensor) -> tuple[int, ...]:
    """Return the shape of the full parameter or buffer, partitioned or not."""
    return tuple(getattr(param, "ds_shape", param.shape))


def gathered(parameters: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Return a region in which parameters that ZeRO-3 partitioned are whole on every process, for reading alone."""
    if not parameters:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(list(parameters))


def full_tensor(param: Tensor) -> Tensor:
    """Return the whole parameter as the model computes with it."""
    if not hasattr(param, "ds_id"):
        return param.detach()
    with gathered([param]):
        return param.detach().clone()


def full_master(param: Tensor) -> Tensor:
    """Return the whole fp32 value that the optimizer updates."""
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(param)


def set_tensor(param: Tensor, value: Tensor) -> None:
    """Overwrite the parameter, and the fp32 copy that the optimizer updates."""
    value = value.to(param.device)
    if not hasattr(param, "ds_id"):
        with torch.no_grad():
            param.copy_(value)
    else:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([param], modifier_rank=0), torch.no_grad():
            param.copy_(value)
    if param.requires_grad:
        _set_fragment(param, value, None)


def optimizer_state(optimizer: Any, param: Tensor) -> dict[str, Any]:
    """Return `step`, `exp_avg` and `exp_avg_sq` of a parameter, empty before the first step."""
    from deepspeed.utils import safe_get_full_optimizer_state

    states = list(base_optimizer(optimizer).state.values())
    if not states:
        return {}
    # ZeRO steps all groups together, so one counter stands for all.
    step = states[0]["step"]
    moments = [key for key, value in states[0].items() if key != "step" and torch.is_tensor(value)]
    return {"step": step, **{key: safe_get_full_optimizer_state(param, key) for key in moments}}


def set_optimizer_state(optimizer: Any, param: Tensor, values: Mapping[str, Tensor]) -> None:
    """Replace AdamW's entries of a parameter; with empty `values` they are as before the first step."""
    _ensure_state(optimizer)
    base = base_optimizer(optimizer)
    step = float(values["step"]) if "step" in values else 0.0
    for state in base.state.values():
        state["step"].fill_(step)
    zeros = torch.zeros(full_shape(param), device=param.device)
    for key in _MOMENTS:
        _set_fragment(param, values.get(key, zeros).to(param.device), key)


def grouped_parameters(optimizer: Any) -> list[nn.Parameter]:
    """Return the trainables that the optimizer updates."""
    zero = _zero(optimizer)
    groups = zero.fp16_groups if hasattr(zero, "fp16_groups") else zero.bit16_groups
    return [param for group in groups for param in group]


def is_zero_optimizer(optimizer: Any) -> bool:
    """Whether this is DeepSpeed's ZeRO optimizer, in Accelerate's wrapper."""
    return isinstance(optimizer, DeepSpeedOptimizerWrapper)


def _zero(optimizer: DeepSpeedOptimizerWrapper) -> Any:
    return optimizer.optimizer


def base_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return the AdamW that works on the flat pieces."""
    return _zero(optimizer).optimizer


def _flat_pieces(zero: Any) -> list[Tensor]:
    """Return the flat fp32 tensors of this process that AdamW keeps its state under."""
    if hasattr(zero, "fp16_groups"):
        return list(zero.fp32_partitioned_groups_flat)
    return list(zero.single_partition_of_fp32_groups)


def _ensure_state(optimizer: Any) -> None:
    """Create AdamW's state as its first step would, so that there is something to overwrite."""
    zero, base = _zero(optimizer), base_optimizer(optimizer)
    on_device = any(group.get("capturable") or group.get("fused") for group in base.param_groups)
    for piece in _flat_pieces(zero):
        if piece not in base.state:
            counter = torch.zeros((), device=piece.device if on_device else "cpu")
            base.state[piece] = {"step": counter, **{key: torch.zeros_like(piece) for key in _MOMENTS}}
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()


def _set_fragment(param: Any, value: Tensor, key: str | None) -> None:
    """Write this process's piece of the fp32 copy (`key` None) or of a moment."""
    if not hasattr(param, "ds_id"):
        param.set_full_hp_param(value.float(), key)
        return
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    # DeepSpeed's own setter of whole values fails where the pieces do not divide the parameter evenly.
    size, group = param.ds_tensor.numel(), param.ds_process_group
    rank = torch.distributed.get_rank(group=group)
    padded = torch.zeros(size * torch.distributed.get_world_size(group=group), device=value.device)
    padded[: value.numel()] = value.flatten().float()
    piece = padded[rank * size : (rank + 1) * size]
    if key is None:
        safe_set_local_fp32_param(param, piece)
    else:
        safe_set_local_optimizer_state(param, piece, key)
