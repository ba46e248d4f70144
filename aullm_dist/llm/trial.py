"""Tries on the architecture, at tiny size, what a run does to its linear layers: LoRA on them, NF4 in them.

What a sparse indexer computes picks keys and goes no further; fused Mamba kernels multiply with the weight past its
module. LoRA there would stay as it was drawn, and engines that wait for every gradient would wait for ever; NF4 may
fail at the first step even where such layers are left out of it (`llm.bypassed`). Both are properties of the library's
modelling code, so they are tried and not looked up.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from aullm_dist.errors import UserError
from aullm_dist.library_errors import LIBRARY_ERRORS, in_one_line
from aullm_dist.llm.bypassed import left_plain
from aullm_dist.llm.lora import ALL_LINEAR, add_lora, lora_targets_of
from aullm_dist.llm.pieces.skeleton import NeverCalled, mark_quantized
from aullm_dist.llm.quantization import (
    is_packed,
    nf4_config,
    pack,
    packed_parameter,
    prepare,
    put_packed_layers,
    state_of,
)
from aullm_dist.packing.forward import padded_hidden
from aullm_dist.packing.probe import TooSlow, quietly, tiny_model
from aullm_dist.packing.shrink import VOCAB, KeyedConfig, shrink

_TEXTS = 4
"""Drawn one after another, as long as a layer is without a gradient: experts that one text leaves out get another."""
_ROWS, _PREFIX, _SUFFIX = 4, 12, 16


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of training LoRA on all linear layers of an architecture."""

    idle: frozenset[str] = frozenset()
    """Full names of the layers whose LoRA never gets a gradient."""
    failure: str = ""
    """What failed in the library, empty if nothing did."""


def try_adapting(config: PretrainedConfig, *, nf4: bool) -> Trial:
    """Return what comes of LoRA on all linear layers; nothing where that cannot be tried.

    Args:
        config: of the backbone.
        nf4: whether the layers are held in NF4.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        return Trial()  # code of its own is not built before the user's files are read
    given = KeyedConfig(config)
    # One layer of each kind is quickly tried, and mostly nothing comes of it.
    return _trial(given, nf4, True) if _trial(given, nf4, False) != Trial() else Trial()


def refuse_without_nf4(config: PretrainedConfig) -> None:
    """Refuse an architecture that does not run with its linear layers in NF4, before it is quantised.

    Args:
        config: of the backbone.

    Raises:
        UserError: with what failed in the library.
    """
    failure = try_adapting(config, nf4=True).failure
    if failure and not try_adapting(config, nf4=False).failure:
        raise UserError(
            f"backbone of type {config.model_type}: cannot run in NF4 ({failure}); set model.quantization=none"
        )


def idle_targets(
    config: PretrainedConfig, targets: Sequence[str], wanted: str | Sequence[str], *, nf4: bool
) -> list[str]:
    """Return the targets that would not train, after refusing to train nothing.

    Args:
        config: of the backbone.
        targets: full names of linear layers, which `wanted` matched.
        wanted: what the run file asks for.
        nf4: whether the layers are held in NF4.

    Raises:
        UserError: no gradient reaches any layer of a name that was asked for.
    """
    idle = try_adapting(config, nf4=nf4).idle & set(targets)
    for name in [wanted] if isinstance(wanted, str) else wanted:
        matched = {target for target in targets if name == ALL_LINEAR or target.endswith(f".{name}")}
        if matched and matched <= idle:
            raise UserError(
                f"LoRA target {name!r}: no gradient reaches it in {config.model_type}, LoRA on it would train nothing; "
                f"allowed: {ALL_LINEAR}, or other linear layers"
            )
    return sorted(idle)


def freeze_lora(wrapped: nn.Module, targets: Iterable[str]) -> None:
    """Leave LoRA on `targets` out of the training, and in checkpoints: engines wait for every gradient there is."""
    for target in targets:
        for name, parameter in wrapped.get_submodule(f"base_model.model.{target}").named_parameters():
            parameter.requires_grad_(parameter.requires_grad and not name.startswith("lora_"))


@functools.lru_cache(maxsize=64)
def _trial(given: KeyedConfig, nf4: bool, all_layers: bool) -> Trial:
    with quietly():
        try:
            model = tiny_model(shrink(given.config, keep_layers=all_layers))
            targets = lora_targets_of(model, ALL_LINEAR)
        except (*LIBRARY_ERRORS, TooSlow):
            return Trial()  # what cannot be built at tiny size may still run
        try:
            model = _in_nf4(model) if nf4 else model
            wrapped = add_lora(model.requires_grad_(False), targets, rank=1, alpha=1.0, dropout=0.0, seed=0)
            return Trial(idle=frozenset(targets) - _with_gradient(wrapped, targets))
        except LIBRARY_ERRORS as error:
            return Trial(failure=in_one_line(error))
        except TooSlow:
            return Trial()


def _in_nf4(model: PreTrainedModel) -> PreTrainedModel:
    """Put NF4 in the linear layers of a model, but for its vocabulary head.

    In memory: what the library does while it loads depends on the engine of the process.
    """
    config = nf4_config(torch.float32)
    plain = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    head = model.get_output_embeddings()
    model.set_output_embeddings(NeverCalled())
    put_packed_layers(model, config, stored=False, plain=left_plain(model))
    mark_quantized(model)
    for name, module in list(model.named_modules()):
        if is_packed(module, "weight"):
            before = plain[name]
            packed, constants = pack(before.weight.detach().reshape(-1), config)
            state = state_of(constants, before.weight.shape, torch.float32, config)
            module.register_parameter("weight", packed_parameter(packed, state, module))
            module.register_parameter("bias", before.bias)
    model.set_output_embeddings(head)
    prepare(model, torch.float32)
    return model


def _with_gradient(wrapped: nn.Module, targets: Sequence[str]) -> set[str]:
    found: set[str] = set()
    network: Any = wrapped
    for text in range(_TEXTS):
        wrapped.zero_grad()
        _hidden(network, text).square().sum().backward()
        for name, parameter in wrapped.named_parameters():
            # B starts at zero, so A has no gradient yet.
            if ".lora_B." in name and parameter.grad is not None and parameter.grad.any():
                found.add(name.removeprefix("base_model.model.").partition(".lora_B.")[0])
        if found.issuperset(targets):
            break
    return found


def _hidden(network: Any, text: int) -> Tensor:
    generator = torch.Generator().manual_seed(text)
    ids = torch.randint(3, VOCAB, (_ROWS, _PREFIX + _SUFFIX), generator=generator)
    embeds = network.get_input_embeddings()(ids).detach()
    soft = embeds[:, _PREFIX:] + 0.5 * embeds.std() * torch.randn(embeds[:, _PREFIX:].shape, generator=generator)
    hidden = padded_hidden(network, embeds[0, :_PREFIX].requires_grad_(), soft, range(_SUFFIX))
    return hidden * torch.randn(hidden.shape, generator=generator)
