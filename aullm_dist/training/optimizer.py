"""Makes AdamW groups and the learning-rate schedule, a pure function of the step: a resume has nothing to restore."""

import math

import torch
from torch import nn

from aullm_dist.config import TrainingConfig


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters with one learning rate each for LoRA, new modules and LED.

    Matrices decay; vectors, gains and the few LED parameters do not. The update is torch's fused one, on CPU and GPU
    alike: one pass over the memory, and it can skip a step by a flag on the device (`training.guard`).
    """
    rates = {"lora": training.lr_lora, "new": training.lr_new, "led": training.lr_led}
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = parameter_kind(name)
            decays = parameter.ndim >= 2 and kind != "led"
            groups.setdefault((kind, decays), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "lr": rates[kind],
                "base_lr": rates[kind],
                "name": kind,
                "weight_decay": training.weight_decay if decays else 0.0,
            }
            for (kind, decays), parameters in groups.items()
        ],
        fused=True,
    )


def parameter_kind(name: str) -> str:
    """Return `lora`, `led` or `new` for a parameter's qualified name."""
    if "lora_" in name:
        return "lora"
    return "led" if "led" in name.split(".") else "new"


def schedule(step: int, total: int, warmup_fraction: float, min_lr_fraction: float) -> float:
    """Return the factor on every learning rate at `step` (from 0) of `total`: linear warm-up, then cosine decay."""
    warmup = max(1, round(warmup_fraction * total)) if warmup_fraction else 0
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return min_lr_fraction + (1 - min_lr_fraction) * 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
