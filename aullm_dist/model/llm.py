"""The language model: loading a frozen Hugging Face decoder and putting LoRA on it.

PEFT wraps the causal LM alone, so the adapter's keys load with stock PEFT onto the plain model. The forward passes go
to the decoder inside it (`packing.decoder_of`): `lm_head` is never called and no vocabulary logits are ever computed.
What NF4 needs is in `model.quantization`, what several processes need to share the loading in `model.piecewise`.
"""

import functools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from aullm_dist.errors import UserError
from aullm_dist.log import is_main_process
from aullm_dist.model.compiled import COMPILATIONS, compile_blocks
from aullm_dist.model.layers import checkpoint_activations
from aullm_dist.model.llm_files import LIBRARY_ERRORS, downloaded, load_config, load_tokenizer, no_model, resolve
from aullm_dist.model.lora import ALL_LINEAR, add_lora, lora_targets_of
from aullm_dist.model.packing import (
    ATTENTIONS,
    LIBRARY_NAMES,
    MASK_RECIPES,
    check_packable,
    decoder_of,
    has_sdpa,
    layer_windows,
)
from aullm_dist.model.piecewise import Placement, load_in_pieces
from aullm_dist.model.quantization import (
    is_stored_in_nf4,
    misshapen_weights,
    nf4_config,
    num_weights,
    prepare,
    quantized_modules,
)
from aullm_dist.model.quiet import hidden_progress_bars

ACTIVATION_CHECKPOINTING = ("none", "non_reentrant", "reentrant")

_PROGRESS_BAR_FROM_BYTES = 2**30
IDS_AT_ONCE = 8192
"""Rows of the embeddings that are looked up at a time for their scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A loaded LLM and what belongs to it."""

    model: nn.Module
    """The causal LM: a `PeftModel`, or the plain frozen model when the LoRA rank is 0."""
    tokenizer: object
    config: PretrainedConfig
    hidden_size: int
    """LLM width D."""
    quantized_modules: tuple[str, ...]
    """Linear layers that hold NF4 weights, named as on the plain causal LM; empty without quantisation."""
    reasons: dict[str, str]
    """What was decided while loading, and why; for the log."""


def load_backbone(
    name_or_path: str | os.PathLike,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str = "auto",
    packing: bool = True,
    trust_remote_code: bool = False,
    lora_rank: int = 16,
    lora_alpha: float = 32.0,
    lora_dropout: float = 0.0,
    lora_targets: str | Sequence[str] = ALL_LINEAR,
    quantization: str = "none",
    activation_checkpointing: str = "none",
    compilation: str = "none",
    static_lengths: bool = False,
    seed: int = 0,
    placement: Placement | None = None,
) -> Backbone:
    """Load a decoder with its tokenizer, freeze it and add LoRA in float32.

    A local folder is read without asking the Hub; a Hub name obeys `HF_HUB_OFFLINE`.

    Args:
        name_or_path: a local folder with config.json, or a Hugging Face name.
        dtype: dtype of the frozen weights, and of NF4's matrix products. LoRA parameters are float32 whatever it is.
        attention: "prefix", "sdpa", "eager", "flex" (on a GPU), or "auto": prefix when packing, else sdpa, else eager.
        packing: whether packed branches will run on it; then its architecture must have a mask recipe.
        trust_remote_code: run model code that ships with the checkpoint.
        lora_rank: LoRA rank; 0 leaves the model without LoRA.
        lora_alpha: LoRA scaling is `lora_alpha / lora_rank`.
        lora_dropout: dropout on the input of the LoRA branch.
        lora_targets: "all-linear" (every linear layer of the decoder) or names of linear layers such as "q_proj".
        quantization: "none", or "nf4": the decoder's linear layers in 4 bits, quantised while loading, or as stored.
        activation_checkpointing: "none", or recompute each decoder layer in the backward pass: "non_reentrant" or
            "reentrant".
        compilation: "none", or "blocks": torch.compile for each decoder layer.
        static_lengths: whether packed rows will come in few lengths (`compile_blocks`).
        seed: seed of the LoRA initialisation; the global generator is left as it was.
        placement: how several processes share the weights, each reading its part; None reads them all here.

    Raises:
        UserError: no model there, incomplete weights, an unsupported attention, architecture or quantisation, LoRA
            targets that match nothing or are never called.
    """
    _check_choices(activation_checkpointing, compilation)
    started = time.monotonic()
    describe = functools.partial(_describe, name_or_path, attention, packing, quantization, trust_remote_code)
    files = describe() if placement is None else placement.together(describe)
    packing_config = nf4_config(dtype) if quantization == "nf4" else None
    if placement is None:
        model = _load_files(files, dtype, None if files.stored_in_nf4 else packing_config)
    else:
        folder = placement.together(lambda: files.folder)
        model = load_in_pieces(
            folder, files.config, dtype, placement, packing_config, files.stored_in_nf4, files.options
        )
    model.requires_grad_(False)
    model.config.use_cache = False
    reasons = {
        "backbone": _what_was_loaded(files, model, dtype, time.monotonic() - started, placement),
        "attention": files.attention_reason,
        "lora": "none (lora_rank is 0)",
    }
    quantized: tuple[str, ...] = ()
    if quantization == "nf4":
        origin = "as stored" if files.stored_in_nf4 else "quantised while loading"
        reasons["quantization"] = f"{prepare(model, dtype)} ({origin})"
        quantized = quantized_modules(model)
    wrapped: nn.Module = model
    if lora_rank > 0:
        targets = lora_targets_of(model, lora_targets)
        wrapped = add_lora(model, targets, lora_rank, lora_alpha, lora_dropout, seed)
        size = _millions(p for p in wrapped.parameters() if p.requires_grad)
        reasons["lora"] = f"rank {lora_rank} on {len(targets)} linear layers, {size} M parameters, float32"
    if activation_checkpointing != "none":
        checkpoint_activations(model, reentrant=activation_checkpointing == "reentrant")
        reasons["activation_checkpointing"] = f"every decoder layer, {activation_checkpointing.replace('_', '-')}"
    if compilation == "blocks":
        reasons["compilation"] = compile_blocks(model, static_lengths=static_lengths)
    return Backbone(
        model=wrapped,
        tokenizer=files.tokenizer,
        config=files.config,
        hidden_size=decoder_of(model).config.hidden_size,
        quantized_modules=quantized,
        reasons=reasons,
    )


def _check_choices(activation_checkpointing: str, compilation: str) -> None:
    if activation_checkpointing not in ACTIVATION_CHECKPOINTING:
        raise UserError(
            f"backbone: activation_checkpointing is {activation_checkpointing!r}; "
            f"allowed: {', '.join(ACTIVATION_CHECKPOINTING)}"
        )
    if compilation not in COMPILATIONS:
        raise UserError(f"backbone: compilation is {compilation!r}; allowed: {', '.join(COMPILATIONS)}")


def _what_was_loaded(
    files: "_ModelFiles", model: nn.Module, dtype: torch.dtype, seconds: float, placement: Placement | None
) -> str:
    how = f" in pieces by {placement.world_size} processes" if placement is not None else ""
    size, precision = _millions(model.parameters()), str(dtype).removeprefix("torch.")
    source = f"{files.config.model_type} from {files.source}, {size} M parameters, frozen, {precision}"
    return f"{source}, loaded in {seconds:.1f} s{how}"


@dataclass(frozen=True, slots=True)
class _ModelFiles:
    """What is known of a backbone before its weights are read."""

    source: str
    is_local: bool
    config: PretrainedConfig
    tokenizer: object
    stored_in_nf4: bool
    options: dict
    """More for the library's loading functions."""
    attention_reason: str

    @property
    def folder(self) -> str:
        """The local folder of its files, which are downloaded if they are not there yet."""
        return self.source if self.is_local else downloaded(self.source)


def _describe(
    name_or_path: str | os.PathLike, attention: str, packing: bool, quantization: str, trust_remote_code: bool
) -> _ModelFiles:
    source, is_local = resolve(name_or_path)
    common = {"trust_remote_code": trust_remote_code, "local_files_only": is_local}
    config = load_config(source, common)
    stored_in_nf4 = is_stored_in_nf4(source, config, quantization)
    implementation, reason = choose_attention(config, attention, packing)
    options = {
        "attn_implementation": LIBRARY_NAMES.get(implementation, implementation),
        "trust_remote_code": trust_remote_code,
    }
    return _ModelFiles(source, is_local, config, load_tokenizer(source, common), stored_in_nf4, options, reason)


@torch.no_grad()
def embedding_rms(llm: nn.Module) -> float:
    """Return the root mean square of words as the first layer gets them.

    All-zero rows (padding, unused ids) are left out.
    """
    # Through the module, not from its weights: Gemma's scales what it looks up.
    embed = llm.get_input_embeddings()
    ids = torch.arange(embed.num_embeddings, device=embed.weight.device)
    norms = torch.cat(
        [torch.linalg.vector_norm(embed(part), dim=1, dtype=torch.float32) for part in ids.split(IDS_AT_ONCE)]
    )
    used = norms[norms > 0].double()
    assert len(used), "input embeddings are all zero"
    return (used.square().mean() / embed.embedding_dim).sqrt().item()


@torch.no_grad()
def mean_embeddings(llm: nn.Module, ids: Sequence[Sequence[int]]) -> Tensor:
    """Return the mean input embedding of each id sequence, float32 [len(ids), D] on the CPU.

    Such sequences are `Prompt.name_ids`.
    """
    embed = llm.get_input_embeddings()
    flat = torch.tensor([i for row in ids for i in row], device=embed.weight.device)
    rows = embed(flat).float().split([len(row) for row in ids])
    # A quantised LLM may be loaded on a GPU, while what these rows initialise is built on the CPU.
    return torch.stack([row.mean(dim=0) for row in rows]).cpu()


def choose_attention(config: PretrainedConfig, attention: str, packing: bool) -> tuple[str, str]:
    """Return the attention implementation, and what to log of it: why it was chosen, and the windows.

    Raises:
        UserError: an attention that is not known, or does not fit the architecture.
    """
    if attention not in ("auto", *ATTENTIONS):
        raise UserError(f"backbone: attention is {attention!r}; allowed: auto, {', '.join(ATTENTIONS)}")
    if attention == "flex" and not torch.cuda.is_available():
        raise UserError(
            "backbone: attention is 'flex', which has no backward pass on CPUs; allowed here: auto, prefix, sdpa, eager"
        )
    if attention != "auto":
        chosen, why = attention, "as set"
    elif packing:
        chosen, why = "prefix", "auto: knows the layout of packed branches"
    elif has_sdpa(config):
        chosen, why = "sdpa", "auto: rows of one branch need no mask of ours"
    else:
        chosen, why = "eager", f"auto: {config.model_type} has no sdpa"
    # Prefix attention gets no masks from the library, packed or not: it needs an architecture that it knows.
    if packing or chosen == "prefix":
        check_packable(config, chosen)
    elif chosen == "sdpa" and not has_sdpa(config):
        raise UserError(
            f"backbone of type {config.model_type}: has no sdpa attention; set model.attention to auto or eager"
        )
    return chosen, f"{chosen} ({why}){_describe_windows(config)}"


def _describe_windows(config: PretrainedConfig) -> str:
    """Return the sliding windows of a backbone with a mask recipe, for the log."""
    windows = layer_windows(config) if config.model_type in MASK_RECIPES else {}
    window = windows.get("sliding_attention")
    if window is None:
        return ""
    total = config.num_hidden_layers
    sliding = config.layer_types.count("sliding_attention") if len(windows) > 1 else total
    return f", window of {window} tokens on {sliding} of {total} layers"


def _load_files(files: _ModelFiles, dtype: torch.dtype, quantization: BitsAndBytesConfig | None) -> PreTrainedModel:
    """Load the weights by the library's own means, whole, in this process."""
    source, options = files.source, dict(files.options)
    if quantization is not None:
        options["quantization_config"] = quantization
    try:
        with hidden_progress_bars(_hides_progress(source, files.is_local)):
            model, info = AutoModelForCausalLM.from_pretrained(
                source,
                config=files.config,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                local_files_only=files.is_local,
                **options,
            )
    except LIBRARY_ERRORS as error:
        raise no_model(source, error) from error
    except RuntimeError as error:
        # Stored NF4 weights that lack a part; a GPU without memory, say, is no property of the files.
        if "conversion of the weights" not in str(error):
            raise
        raise no_model(source, error) from error
    # The library fills what a file lacks with random numbers and goes on; lm_head alone may lack, it is never called.
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("lm_head."))
    mismatched = sorted(str(entry[0]) for entry in info["mismatched_keys"])
    if getattr(model, "is_loaded_in_4bit", False):
        mismatched = sorted({*mismatched, *misshapen_weights(model)})
    for what, keys in (("missing in", missing), ("of another shape in", mismatched)):
        if keys:
            raise UserError(
                f"backbone {source}: {len(keys)} weights are {what} its files, first {keys[0]}; "
                "allowed: files that hold every weight of config.json's model"
            )
    return model


def _hides_progress(source: str, is_local: bool) -> bool:
    """Whether the library's loading bar is in the way: off the main process, and where loading takes no time."""
    if not is_local:
        return not is_main_process()
    size = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    return size < _PROGRESS_BAR_FROM_BYTES or not is_main_process()


def _millions(parameters: Iterable[nn.Parameter]) -> str:
    return f"{num_weights(parameters) / 1e6:.2f}"
