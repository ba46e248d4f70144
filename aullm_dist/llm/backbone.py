"""Loads the language model, a frozen Hugging Face decoder, and puts LoRA on it.

PEFT wraps the causal LM alone, so the adapter's keys load with stock PEFT onto the plain model. The forward passes go
to the decoder inside it (`packing.decoder_of`): `lm_head` is never called and no vocabulary logits are ever computed.
What NF4 needs is in `llm.quantization`, what several processes need to share the loading in `llm.pieces`.
"""

import functools
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from aullm_dist.errors import UserError
from aullm_dist.library_errors import refusing
from aullm_dist.llm.base_check import check_base, holds_finite, refuse_not_finite
from aullm_dist.llm.blame import blamed_setting
from aullm_dist.llm.bypassed import leaving_plain
from aullm_dist.llm.compiled import COMPILATIONS, compile_blocks
from aullm_dist.llm.experts import packed_experts
from aullm_dist.llm.files import downloaded, load_config, no_model, resolve
from aullm_dist.llm.layers import checkpoint_activations, fused_experts
from aullm_dist.llm.lora import ALL_LINEAR, add_lora, linear_layers, lora_targets_of
from aullm_dist.llm.pieces.loading import load_in_pieces
from aullm_dist.llm.pieces.placement import Alone, Placement
from aullm_dist.llm.pieces.skeleton import build_without_storage, model_without_storage
from aullm_dist.llm.pieces.values import values_in_files
from aullm_dist.llm.quantization import (
    is_stored_in_nf4,
    misshapen_weights,
    nf4_config,
    num_weights,
    packed_share,
    prepare,
    quantized_modules,
)
from aullm_dist.llm.stored.conversion import COMPUTED, find_values
from aullm_dist.llm.stored.wrappers import library_options, open_base, wrapper_type
from aullm_dist.llm.trial import freeze_lora, idle_targets, refuse_without_nf4
from aullm_dist.log import is_main_process
from aullm_dist.packing.forward import decoder_of
from aullm_dist.packing.hybrids import carry_states
from aullm_dist.packing.implementations import ATTENTIONS, LIBRARY_NAMES, has_sdpa
from aullm_dist.packing.masks import MASK_RECIPES, layer_windows
from aullm_dist.packing.support import check_packable, check_padded
from aullm_dist.quiet import hidden_progress_bars, hidden_reports

ACTIVATION_CHECKPOINTING = ("none", "non_reentrant", "reentrant")

_PROGRESS_BAR_FROM_BYTES = 2**30
_BLAME_SECONDS = 10
"""What the search for the key to blame may compute for: an architecture may be slow to probe, and has many keys."""
IDS_AT_ONCE = 8192
"""Rows of the embeddings that are looked up at a time for their scale."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A loaded LLM and what belongs to it."""

    model: nn.Module
    """The causal LM: a `PeftModel`, or the plain frozen model when the LoRA rank is 0."""
    tokenizer: Any
    config: PretrainedConfig
    hidden_size: int
    """LLM width D."""
    quantized_modules: tuple[str, ...]
    """Linear layers that hold NF4 weights, named as on the plain causal LM; empty without quantisation."""
    reasons: dict[str, str]
    """What was decided while loading, and why; for the log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackboneOptions:
    """How a backbone is loaded and adapted."""

    dtype: torch.dtype = torch.float32
    """Of the frozen weights, and of NF4's matrix products. LoRA parameters are float32 whatever it is."""
    attention: str = "auto"
    """"prefix", "sdpa", "eager", "flex" (on a GPU), or "auto": prefix when packing, else sdpa, else eager."""
    packing: bool = True
    """Whether packed branches will run on it; then its architecture must pass the probe."""
    trust_remote_code: bool = False
    """Run model code that ships with the checkpoint."""
    lora_rank: int = 16
    """0 leaves the model without LoRA."""
    lora_alpha: float = 32.0
    """LoRA scaling is `lora_alpha / lora_rank`."""
    lora_dropout: float = 0.0
    """Dropout on the input of the LoRA branch."""
    lora_targets: str | Sequence[str] = ALL_LINEAR
    """"all-linear" (every linear layer of the decoder) or names of linear layers such as "q_proj"."""
    quantization: str = "none"
    """"none"; "nf4": the decoder's linear layers in 4 bits, quantised while loading, or as stored; "nf4_experts": fused
    experts as well, quantised while loading."""
    activation_checkpointing: str = "none"
    """"none", or recompute each decoder layer in the backward pass: "non_reentrant" or "reentrant"."""
    compilation: str = "none"
    """"none", or "blocks": torch.compile for each decoder layer."""
    static_lengths: bool = False
    """Whether packed rows will come in few lengths (`compile_blocks`)."""
    device: torch.device | None = None
    """Where one process packs and keeps an NF4 base; None leaves that to the library, which takes the current GPU."""
    seed: int = 0
    """Of the LoRA initialisation; the global generator is left as it was."""


def load_backbone(
    name_or_path: str | os.PathLike, options: BackboneOptions | None = None, *, placement: Placement | None = None
) -> Backbone:
    """Load a decoder with its tokenizer, freeze it and add LoRA in float32.

    A local folder is read without asking the Hub; a Hub name obeys `HF_HUB_OFFLINE`.

    Args:
        name_or_path: a local folder with config.json, or a Hugging Face name.
        options: how it is loaded and adapted; None takes the defaults.
        placement: how several processes share the weights, each reading its part; None reads them all here.

    Raises:
        UserError: no model there, files that cannot be used or not by every command (`llm.base_check`), incomplete
            weights, an unsupported attention, architecture or quantisation, LoRA targets that match nothing or are
            never called.
    """
    given = options or BackboneOptions()
    _check_choices(given.activation_checkpointing, given.compilation)
    started = time.monotonic()
    describe = functools.partial(_describe, name_or_path, given)
    files = describe() if placement is None else placement.together(describe)
    packing_config = None if given.quantization == "none" else nf4_config(given.dtype)
    pack_experts = given.quantization == "nf4_experts"
    if placement is None and not pack_experts:
        model = _load_files(files, given.dtype, packing_config, given.device)
    else:
        # The library packs no experts.
        placed = placement or Alone()
        model = load_in_pieces(
            placed.together(lambda: files.folder),
            files.config,
            given.dtype,
            placed,
            packing_config,
            files.stored_in_nf4,
            files.options,
            pack_experts,
        )
    model.requires_grad_(False)
    model.config.use_cache = False
    # Before anything is compiled, and before LoRA: from here on recurrent layers know packed rows.
    carry_states(decoder_of(model))
    reasons = {
        "backbone": _what_was_loaded(files, model, given.dtype, time.monotonic() - started, placement),
        "attention": files.attention_reason,
    }
    quantized: tuple[str, ...] = ()
    if packing_config is not None:
        origin = "as stored" if files.stored_in_nf4 else "quantised while loading"
        reasons["quantization"] = f"{prepare(model, given.dtype)} ({origin}); {_share_in_nf4(model)}"
        quantized = (*quantized_modules(model), *(name for name, _ in packed_experts(model)))
        if pack_experts and len(quantized) == len(quantized_modules(model)):
            raise UserError(
                f"backbone of type {files.config.model_type}: has no fused experts that NF4 could quantise; "
                "set model.quantization=nf4"
            )
    wrapped, reasons["lora"] = _adapted(model, given)
    if given.activation_checkpointing != "none":
        checkpoint_activations(model, reentrant=given.activation_checkpointing == "reentrant")
        how = given.activation_checkpointing.replace("_", "-")
        reasons["activation_checkpointing"] = f"every decoder layer, {how}"
    if given.compilation == "blocks":
        reasons["compilation"] = compile_blocks(model, static_lengths=given.static_lengths)
    return Backbone(
        model=wrapped,
        tokenizer=files.tokenizer,
        config=files.config,
        hidden_size=decoder_of(model).config.hidden_size,
        quantized_modules=quantized,
        reasons=reasons,
    )


def _share_in_nf4(model: PreTrainedModel) -> str:
    """Return how much of the LLM really is in 4 bits, and what the most of the rest is."""
    packed, others = packed_share(decoder_of(model).parameters())
    experts = sum(num_weights([parameter]) * parameter.element_size() for _, parameter in fused_experts(model))
    what = ""
    if experts:
        what = f", {experts / 1e9:.2f} GB of that fused experts, which model.quantization=nf4_experts packs as well"
    elif count := len(list(packed_experts(model))):
        what = f", {count} parameters of fused experts packed"
    return f"{packed / 1e9:.2f} GB in 4 bits, {others / 1e9:.2f} GB not{what}"


def _adapted(model: PreTrainedModel, given: BackboneOptions) -> tuple[nn.Module, str]:
    """Return the model with LoRA on it, and what to log of that."""
    if given.lora_rank <= 0:
        return model, "none (lora_rank is 0)"
    count, targets = len(linear_layers(model)), lora_targets_of(model, given.lora_targets)
    idle = idle_targets(model.config, targets, given.lora_targets, nf4=given.quantization != "none")
    wrapped = add_lora(model, targets, given.lora_rank, given.lora_alpha, given.lora_dropout, given.seed)
    freeze_lora(wrapped, idle)
    size = _millions(p for p in wrapped.parameters() if p.requires_grad)
    left_out = count - len(targets) if given.lora_targets == ALL_LINEAR else 0
    without = f" ({left_out} others are none that LoRA can be on in {model.config.model_type})" if left_out else ""
    frozen = f"; {len(idle)} of them get no gradient and stay as they are, first {idle[0]}" if idle else ""
    on = f"{len(targets)} linear layers{without}"
    return wrapped, f"rank {given.lora_rank} on {on}, {size} M parameters, float32{frozen}"


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
    wrapper = wrapper_type(files.source)
    kind = files.config.model_type if wrapper is None else f"{files.config.model_type} inside {wrapper}"
    source = f"{kind} from {files.source}, {size} M parameters, frozen, {precision}"
    return f"{source}, loaded in {seconds:.1f} s{how}"


@dataclass(frozen=True, slots=True)
class _ModelFiles:
    """What is known of a backbone before its weights are read."""

    source: str
    is_local: bool
    folder: str
    """Where its files are on this machine."""
    config: PretrainedConfig
    tokenizer: Any
    stored_in_nf4: bool
    options: dict
    """More for the library's loading functions."""
    attention_reason: str


def _describe(name_or_path: str | os.PathLike, given: BackboneOptions) -> _ModelFiles:
    source, is_local = resolve(name_or_path)
    common = {"trust_remote_code": given.trust_remote_code, "local_files_only": is_local}
    config = load_config(source, common)
    stored_in_nf4 = is_stored_in_nf4(source, config, given.quantization)
    try:
        implementation, reason = choose_attention(config, given.attention, given.packing)
    except UserError as refusal:
        raise with_setting(refusal, config, given.attention, given.packing) from refusal
    options = {
        "attn_implementation": LIBRARY_NAMES.get(implementation, implementation),
        "trust_remote_code": given.trust_remote_code,
    }
    folder = source if is_local else downloaded(source)
    tokenizer = check_base(source, Path(folder), config, common)
    if given.quantization != "none":
        refuse_without_nf4(config)
    if given.lora_rank > 0:
        _refuse_unmergeable(source, folder, config, stored_in_nf4, given)
    return _ModelFiles(source, is_local, folder, config, tokenizer, stored_in_nf4, options, reason)


def _refuse_unmergeable(
    source: str, folder: str, config: PretrainedConfig, stored_in_nf4: bool, given: BackboneOptions
) -> None:
    """Refuse LoRA on layers that no merge could write into the files, before it is trained.

    Raises:
        UserError: the library turns or mixes what stands in the files into such a layer's weight.
    """
    files = open_base(folder, config)
    files.close()
    packing = nf4_config(given.dtype) if stored_in_nf4 else None
    options = {"trust_remote_code": given.trust_remote_code}
    model = model_without_storage(config, given.dtype, packing, files if stored_in_nf4 else None, options)
    values = find_values(model, files)
    for target in lora_targets_of(model, given.lora_targets):
        weight, layer = values.get(f"{target}.weight"), model.get_submodule(target)
        if weight is not None and not weight.is_rows(getattr(layer, "in_features")):  # noqa: B009 - no type has it
            raise UserError(
                f"backbone {source}: LoRA on {target} could not be merged: its weight {COMPUTED}; allowed: other "
                "names in model.lora_targets, or another base"
            )


def with_setting(refusal: UserError, config: PretrainedConfig, attention: str, packing: bool) -> UserError:
    """Return the refusal of an architecture, with the key of config.json that alone brings it about, if one does.

    Args:
        refusal: what `choose_attention` raised.
        config, attention, packing: for these.

    Raises:
        UserError: the library does not even build a model of the config.
    """
    build_without_storage(config)
    end = time.thread_time() + _BLAME_SECONDS

    def choose(values: dict[str, Any]) -> object:
        if time.thread_time() > end:
            raise refusal
        return choose_attention(type(config).from_dict(values), attention, packing)

    setting = blamed_setting(config.to_diff_dict(), choose)
    return (
        refusal if setting is None else UserError(f"{refusal} (config.json: {setting}; without this key it would run)")
    )


@torch.no_grad()
def embedding_rms(llm: Any) -> float:
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
def mean_embeddings(llm: Any, ids: Sequence[Sequence[int]]) -> Tensor:
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
        return chosen, f"{chosen} ({why}){_describe_windows(config)}"
    if chosen == "sdpa" and not has_sdpa(config):
        raise UserError(
            f"backbone of type {config.model_type}: has no sdpa attention; set model.attention to auto or eager"
        )
    check_padded(config)
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


def _load_files(
    files: _ModelFiles,
    dtype: torch.dtype,
    quantization: BitsAndBytesConfig | None,
    device: torch.device | None,
) -> PreTrainedModel:
    """Load the weights by the library's own means, whole, in this process."""
    source = files.source
    model = _model_of_files(files, dtype, quantization)
    options = files.options | library_options(source, lambda: files.folder, files.config)
    if quantization is not None and device is not None:
        options["device_map"] = {"": str(device)}
    if quantization is not None and not files.stored_in_nf4:
        options["quantization_config"] = leaving_plain(quantization, model)
    # The towers of a wrapper would be listed as weights that nobody asked for.
    reports, refused = hidden_reports("key_mapping" in options), functools.partial(no_model, source)
    with hidden_progress_bars(_hides_progress(source, files.is_local)), reports, refusing(refused):
        # A pair, as the loading information is asked for; the library annotates the model alone.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=files.is_local,
            use_safetensors=True,
            # Nothing is ever generated, so the file of these settings is not read.
            generation_config=GenerationConfig(),
            **options,
        )
    model, info = loaded
    # The library fills what a file lacks with random numbers and continues; lm_head alone may lack, it is never called.
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
    head = model.get_output_embeddings()
    of_head = set() if head is None else {id(parameter) for parameter in head.parameters()}
    of_head -= {id(parameter) for parameter in decoder_of(model).parameters()}
    refuse_not_finite(
        source,
        (
            name
            for name, parameter in model.named_parameters()
            if id(parameter) not in of_head and not holds_finite(parameter)
        ),
    )
    return model


def _model_of_files(files: _ModelFiles, dtype: torch.dtype, quantization: BitsAndBytesConfig | None) -> PreTrainedModel:
    """Return the model without storage, after refusing files that do not hold its weights.

    Otherwise the library makes up what is missing.
    """
    stored = open_base(files.folder, files.config)
    model = model_without_storage(
        files.config, dtype, quantization, stored if files.stored_in_nf4 else None, files.options
    )
    values_in_files(model, stored, files.source)
    return model


def _hides_progress(source: str, is_local: bool) -> bool:
    """Whether the library's loading bar is in the way: off the main process, and where loading takes no time."""
    if not is_local:
        return not is_main_process()
    size = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    return size < _PROGRESS_BAR_FROM_BYTES or not is_main_process()


def _millions(parameters: Iterable[nn.Parameter]) -> str:
    return f"{num_weights(parameters) / 1e6:.2f}"
