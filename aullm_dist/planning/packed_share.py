"""Counts the bytes of an LLM that will really be in 4 bits, from its config alone: `model.quantization` says less."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from aullm_dist.llm.experts import packed_shape, put_packed_experts
from aullm_dist.llm.files import load_config, resolve
from aullm_dist.llm.layers import fused_experts
from aullm_dist.llm.pieces.skeleton import model_without_storage
from aullm_dist.llm.pieces.walk import owners
from aullm_dist.llm.quantization import nf4_config, packed_share, valueless_state

_DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Share:
    """What NF4 makes of a decoder, its vocabulary head left out."""

    packed_weights: int
    packed_bytes: int
    """Constants of the blocks included."""
    plain_bytes: int
    """Of everything else, in bfloat16 where it has no dtype of its own."""
    experts: int
    """Weights of fused experts that are left unpacked."""
    experts_bytes: int
    others: int
    """Weights of linear layers that are left unpacked."""


def share_in_nf4(config: PretrainedConfig, *, experts: bool = False) -> Share:
    """Return what of a decoder NF4 packs.

    Args:
        config: of the decoder.
        experts: whether fused experts are packed as well (`nf4_experts`).

    Raises:
        UserError: the library builds no such model.
    """
    model = model_without_storage(config, _DTYPE, nf4_config(_DTYPE))
    if experts:
        put_packed_experts(model)
    unpacked = dict(fused_experts(model))
    packed_weights = packed_bytes = plain_bytes = others = in_experts = experts_bytes = 0
    for full, name, module in owners(model):
        parameter = module._parameters[name]
        assert parameter is not None
        if (shape := packed_shape(module, name)) is not None:
            packed_weights += shape.numel()
            packed_bytes += _packed_bytes(shape)
            continue
        plain_bytes += parameter.nbytes
        if full in unpacked:
            in_experts += parameter.numel()
            experts_bytes += parameter.nbytes
        elif isinstance(module, torch.nn.Linear) and name == "weight":
            others += parameter.numel()
    return Share(packed_weights, packed_bytes, plain_bytes, in_experts, experts_bytes, others)


def _packed_bytes(shape: torch.Size) -> int:
    packed = torch.nn.Parameter(torch.empty(-(-shape.numel() // 2), dtype=torch.uint8, device="meta"), False)
    setattr(packed, "quant_state", valueless_state(shape, _DTYPE, "meta"))  # noqa: B010 - no parameter's attribute
    return packed_share([packed])[0]


def describe_share(name: str) -> str:
    """Return in a line what of an LLM `model.quantization=nf4` packs.

    Args:
        name: local folder with config.json, or a Hugging Face name.

    Raises:
        UserError: there is no such model, or no decoder in it.
    """
    source, is_local = resolve(name)
    config = load_config(source, {"trust_remote_code": False, "local_files_only": is_local})
    share = share_in_nf4(config)
    text = f"{config.model_type}, in NF4: {in_gb(share.packed_bytes)} in 4 bits, {in_gb(share.plain_bytes)} not"
    if share.experts:
        text += (
            f", {in_gb(share.experts_bytes)} of that fused experts, which model.quantization=nf4_experts packs as well "
            f"({in_gb(share_in_nf4(config, experts=True).packed_bytes)} in 4 bits)"
        )
    return text


def in_gb(nbytes: int) -> str:
    """Return bytes as text."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 5e6 else f"{nbytes / 1e6:.3f} MB"
