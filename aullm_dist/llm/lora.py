"""Adds LoRA to the decoder's linear layers: which ones, and the adapter in float32."""

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from aullm_dist.errors import UserError
from aullm_dist.llm.bypassed import shared_layers
from aullm_dist.llm.layers import fused_experts
from aullm_dist.packing.forward import decoder_of

ALL_LINEAR = "all-linear"


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the full names of the decoder's linear layers, `lm_head` not among them.

    A subclass that computes something else (the router of Llama 4 returns a tuple) is none.
    """
    decoder = decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    return [f"{prefix}.{name}" for name, module in decoder.named_modules() if _is_linear(module)]


def _is_linear(module: nn.Module) -> bool:
    is_plain = type(module).forward is nn.Linear.forward
    return isinstance(module, nn.Linear) and (is_plain or type(module).__name__ == "Linear4bit")


def _is_other_linear(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.ndim == 2 and not isinstance(module, nn.Embedding)


def lora_targets_of(model: PreTrainedModel, wanted: str | Sequence[str]) -> list[str]:
    """Return the full names of the decoder's linear layers that `wanted` matches; `lm_head` is not among them.

    Raises:
        UserError: a name matches none, or a layer that LoRA cannot be on.
    """
    linear = linear_layers(model)
    if not linear:
        kinds = {type(module).__name__ for module in decoder_of(model).modules() if _is_other_linear(module)}
        own = f", but {' and '.join(sorted(kinds))} of its own" if kinds else ""
        raise UserError(
            f"backbone of type {model.config.model_type}: has no linear layers that LoRA could adapt{own}; "
            "allowed: a decoder with linear layers"
        )
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    refused = _refused(model, linear)
    if names == [ALL_LINEAR]:
        return [name for name in linear if name not in refused]
    chosen: set[str] = set()
    for name in names:
        if name.rpartition(".")[2] == "lm_head":
            raise UserError(
                f"LoRA target {name!r}: the vocabulary head is never called, LoRA on it would train nothing; "
                f"allowed: {ALL_LINEAR}, or names of the decoder's linear layers"
            )
        matched = {full for full in linear if full.endswith(f".{name}")}
        if matched & refused.keys():
            raise UserError(
                f"LoRA target {name!r}: {refused[min(matched & refused.keys())]}; allowed: {ALL_LINEAR}, which leaves "
                "it out, or other linear layers"
            )
        if not matched and any(full.endswith(f".{name}") for full, _ in fused_experts(decoder_of(model))):
            raise UserError(
                f"LoRA target {name!r}: holds all experts of a layer in one parameter, which is not adapted here; "
                f"allowed: {ALL_LINEAR}, which leaves it out, or names of linear layers"
            )
        if not matched:
            known = ", ".join(sorted({full.rpartition(".")[2] for full in linear}))
            raise UserError(
                f"LoRA target {name!r}: matches no linear layer of the decoder; allowed: {ALL_LINEAR} alone, or {known}"
            )
        chosen |= matched
    if not chosen:
        raise UserError(f"LoRA targets: none given; allowed: {ALL_LINEAR} or names of linear layers")
    return sorted(chosen)


def _refused(model: PreTrainedModel, targets: Sequence[str]) -> dict[str, str]:
    """Return the linear layers that LoRA cannot be on in this architecture, each with the reason.

    On a weight that several layers have it is another one in each, and no merge could hold it. An adapter must load
    with stock PEFT, so what that turns into something else cannot be a target: in models with experts it takes layers
    whose names experts once had for the experts, and in Mamba models it refuses what the fused kernels multiply with
    past the module.
    """
    shared = shared_layers(model)
    refused = {name: f"its weight is that of {other} as well" for name, other in shared.items() if name in targets}
    for target in targets:
        config = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=[target])
        leaf = target.rpartition(".")[2]
        try:
            convert_peft_config_for_transformers(config, model, None)
            if set(config.target_modules or ()) != {target}:
                refused[target] = f"PEFT takes {leaf} of {model.config.model_type} for its fused experts"
                continue
            _check_lora_target_modules_mamba(config, model, leaf)
        except ValueError as error:
            refused[target] = " ".join(str(error).split())
    return refused


def add_lora(
    model: PreTrainedModel, targets: list[str], rank: int, alpha: float, dropout: float, seed: int
) -> nn.Module:
    # PEFT annotates an int, and divides whatever it is given.
    scale: Any = alpha
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=scale, lora_dropout=dropout, target_modules=targets, bias="none"
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 reads this property by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.default_generator.manual_seed(seed)
        wrapped = get_peft_model(model, lora)
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    if len(trainable) != 2 * len(targets):
        raise UserError(
            f"backbone of type {model.config.model_type}: PEFT put {len(trainable)} LoRA tensors on {len(targets)} "
            "linear layers; allowed: other names in model.lora_targets, or another backbone"
        )
    assert all(p.dtype == torch.float32 and ".lora_" in name for name, p in trainable.items())
    for layer in wrapped.modules():
        if isinstance(layer, LoraLayer):
            leave_casting_to_autocast(layer)
    return wrapped


def lora_values(wrapped: nn.Module, seed: int) -> dict[str, Tensor]:
    """Return the values that `add_lora` would begin with for another seed, by the names of `wrapped`, on the CPU.

    Args:
        wrapped: the LLM with LoRA, whatever its values are.
        seed: of the initialisation; the global generator is left as it was.
    """
    layers = [(name, layer) for name, layer in wrapped.named_modules() if isinstance(layer, LoraLayer)]
    values = {}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for name, layer in layers:
            for adapter in layer.lora_A:
                # As PEFT draws: two layers with torch's own first values, of which it then draws the first again.
                rank, width, height = layer.r[adapter], layer.in_features, layer.out_features
                assert isinstance(width, int), "only linear layers are adapted"
                assert isinstance(height, int)
                down, up = nn.Linear(width, rank, bias=False), nn.Linear(rank, height, bias=False)
                nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
                values[f"{name}.lora_A.{adapter}.weight"] = down.weight.detach()
                values[f"{name}.lora_B.{adapter}.weight"] = torch.zeros_like(up.weight)
    return values


def leave_casting_to_autocast(layer: LoraLayer) -> None:
    """Have a LoRA layer take its input as it comes wherever autocast casts it anyway.

    PEFT casts it to the dtype of the LoRA parameters, float32, and autocast back to bfloat16 for the product: a float32
    copy of every layer's input, which dropout keeps for the backward pass. Its NF4 layer leaves the cast out under the
    autocast of GPUs, but not under that of CPUs.
    """
    cast: Any = layer._cast_input_dtype

    def cast_input(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return x if x is not None and _is_autocast(x.device.type) else cast(x, dtype)

    setattr(layer, "_cast_input_dtype", cast_input)  # noqa: B010 - a method, which no checker lets be replaced


def _is_autocast(device_type: str) -> bool:
    # A trace of shapes alone runs on the meta device under the autocast of CPUs.
    return torch.is_autocast_enabled(device_type if torch.amp.is_autocast_available(device_type) else "cpu")
