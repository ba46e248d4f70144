"""LoRA on the decoder's linear layers: which ones, and the adapter in float32."""

import warnings
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from aullm_dist.errors import UserError
from aullm_dist.model.packing import MASK_RECIPES, decoder_of

ALL_LINEAR = "all-linear"


def lora_targets_of(model: PreTrainedModel, wanted: str | Sequence[str]) -> list[str]:
    """Return the full names of the decoder's linear layers that `wanted` matches; `lm_head` is not among them."""
    decoder = decoder_of(model)
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    linear = [f"{prefix}.{name}" for name, module in decoder.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UserError(
            f"backbone of type {model.config.model_type}: has no linear layers that LoRA could adapt; "
            f"allowed: decoders such as {', '.join(sorted(MASK_RECIPES))}"
        )
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    if names == [ALL_LINEAR]:
        return linear
    chosen: set[str] = set()
    for name in names:
        if name.rpartition(".")[2] == "lm_head":
            raise UserError(
                f"LoRA target {name!r}: the vocabulary head is never called, LoRA on it would train nothing; "
                f"allowed: {ALL_LINEAR}, or names of the decoder's linear layers"
            )
        matched = {full for full in linear if full.endswith(f".{name}")}
        if not matched:
            known = ", ".join(sorted({full.rpartition(".")[2] for full in linear}))
            raise UserError(
                f"LoRA target {name!r}: matches no linear layer of the decoder; allowed: {ALL_LINEAR} alone, or {known}"
            )
        chosen |= matched
    if not chosen:
        raise UserError(f"LoRA targets: none given; allowed: {ALL_LINEAR} or names of linear layers")
    return sorted(chosen)


def add_lora(
    model: PreTrainedModel, targets: list[str], rank: int, alpha: float, dropout: float, seed: int
) -> nn.Module:
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none"
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # PEFT 0.21 reads this property by its old name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        torch.default_generator.manual_seed(seed)
        wrapped = get_peft_model(model, lora)
    trainable = {name: p for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * len(targets), f"{len(trainable)} LoRA tensors for {len(targets)} linear layers"
    assert all(p.dtype == torch.float32 and ".lora_" in name for name, p in trainable.items())
    return wrapped
