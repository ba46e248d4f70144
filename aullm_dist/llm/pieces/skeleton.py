"""Builds an LLM without storage: modules, shapes and dtypes as they will be, on the meta device."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import build_glob_alternation
from transformers.pytorch_utils import Conv1D

from aullm_dist.errors import UserError
from aullm_dist.library_errors import refusing
from aullm_dist.llm.blame import key_refusal
from aullm_dist.llm.bypassed import bypassed_layers, left_plain, shared_layers
from aullm_dist.llm.pieces.walk import kept_buffers, owners
from aullm_dist.llm.quantization import put_packed_layers
from aullm_dist.llm.stored.weight_files import WeightFiles


class NeverCalled(nn.Module):
    """Stands where the vocabulary head would: no logits over the vocabulary are ever computed."""

    def __init__(self) -> None:
        super().__init__()
        # Some library functions that re-initialise a model ask any head for them.
        self.weight, self.bias = torch.empty(1, 1, device="meta"), None

    def forward(self, *_: object) -> Tensor:
        """Fail: a caller of the head is a mistake of ours."""
        raise AssertionError("the vocabulary head is not loaded")


def model_without_storage(
    config: PretrainedConfig,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
    packed_files: WeightFiles | None = None,
    options: dict | None = None,
    keep_head: bool = False,
) -> PreTrainedModel:
    """Return the causal LM on the meta device, its linear layers replaced by NF4 layers if they are to be packed.

    Args:
        config, dtype, quantization, options: see `load_in_pieces`.
        packed_files: files that hold packed weights already: they say which layers are packed.
        keep_head: whether the vocabulary head stays; it is never packed.

    Raises:
        UserError: the library builds no such model, or cannot run it with what is packed in the files.
    """
    model = build_without_storage(config, dtype=dtype, **(options or {}))
    head = model.get_output_embeddings()
    model.set_output_embeddings(NeverCalled())
    if quantization is not None:
        put_packed_layers(
            model, quantization, stored=packed_files is not None, plain=_plain_layers(model, packed_files)
        )
    if keep_head:
        model.set_output_embeddings(head)
    return model


def build_without_storage(config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """Return the library's own causal LM on the meta device; `options` are those of `from_config`.

    Raises:
        UserError: the library builds no model of the config; names the key where it is known.
    """

    def make(values: dict[str, Any]) -> PreTrainedModel:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(type(config).from_dict(values), **options)

    def refused(error: BaseException) -> UserError:
        return key_refusal(config.name_or_path or config.model_type, "config.json", error, config.to_dict(), make)

    with refusing(refused), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, **options)
    return model


def _plain_layers(model: PreTrainedModel, packed_files: WeightFiles | None) -> list[str]:
    """Return the linear layers that stay unpacked: a publisher's in packed files, else those used past the layer."""
    if packed_files is None:
        return left_plain(model)
    prefix = f"{model.base_model_prefix}."
    plain = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and not any(f"{key}.weight.absmax" in packed_files for key in (name, name.removeprefix(prefix)))
    ]
    if spoiled := sorted({*bypassed_layers(model), *shared_layers(model)}.difference(plain)):
        raise UserError(
            f"backbone {packed_files.folder}: {spoiled[0]} is in NF4, but {model.config.model_type} uses its weight "
            "past the layer as well; allowed: files that aullm-dist quantize wrote, or the LLM as it was before"
        )
    return plain


def mark_quantized(model: PreTrainedModel) -> None:
    """Mark a model as the library marks what it has quantised itself: modelling code goes other ways then."""
    marked: Any = model
    marked.is_quantized = marked.is_loaded_in_4bit = True
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PretrainedConfig):
            setattr(module.config, "_is_quantized", True)  # noqa: B010 - the library's own, which its types do not have


def dtypes_of(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return the dtype of every parameter and kept buffer: a few, such as a router's bias, keep one of their own.

    Args:
        model: the causal LM on the meta device, made in `dtype`.
        dtype: of what has none of its own.

    Source: transformers.PreTrainedModel._get_dtype_plan, and how its loading applies it.
    """
    plan = model._get_dtype_plan(dtype)
    pattern, by_group, _ = build_glob_alternation(list(plan)) if plan else (None, {}, None)
    found = {}
    for full, name, module in (*owners(model), *kept_buffers(model)):
        match = None if pattern is None else pattern.search(full)
        if match is not None and match.lastgroup is not None:
            found[full] = plan[by_group[match.lastgroup]]
        else:
            # The layers put in for packed ones are made in float32, whatever becomes of their biases.
            found[full] = dtype if type(module).__name__ == "Linear4bit" else getattr(module, name).dtype
    return found
