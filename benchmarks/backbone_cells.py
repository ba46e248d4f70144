"""What becomes of one model type, for benchmarks/backbones.py: each step that a run takes, on a saved tiny base."""

import copy
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aullm_dist.checkpoint.base_identity import base_identity
from aullm_dist.checkpoint.store import RunFacts, save_checkpoint
from aullm_dist.errors import UserError
from aullm_dist.library_errors import LIBRARY_ERRORS, in_one_line
from aullm_dist.llm.backbone import Backbone, BackboneOptions, load_backbone
from aullm_dist.llm.tiny import tiny_parts
from aullm_dist.merge.merge import merge_llm
from aullm_dist.packing import attention
from aullm_dist.packing.forward import decoder_of, packed_hidden, padded_hidden
from aullm_dist.packing.probe import probe_packed, probe_padded, tiny_model
from aullm_dist.packing.shrink import VOCAB, shrink

YES, NOTHING = "yes", "-"
TOLERANCE = 1e-4
COLUMNS = ("padded", "packed", "LoRA", "merge", "NF4", "merge of NF4")
COMPLETIONS: dict[str, dict[str, object]] = {
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention"] * 31 + ["full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm3": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
}
"""Fields that the library's defaults leave open, or that keep a hybrid's recurrent layers out; of released models."""
_WIDTHS = (
    "intermediate_size", "intermediate_size_mlp", "ffn_dim", "n_inner", "dff", "dim_ff", "ffn_hidden_size", "_rank",
    "linear_head_dim", "hidden_size_per_layer_input", "router_hidden_size",
)  # fmt: skip
"""Ends of the names of widths that products sum over."""
_BLOCK = 64
_OPTIONS = {"packing": False, "attention": "eager", "lora_rank": 2, "lora_alpha": 4.0}


def cells_of(name: str) -> list[str]:
    """Return the cells of a type, one for each of `COLUMNS`; what a refusal rules out as well is `NOTHING`."""
    try:
        config = CONFIG_MAPPING[name](**COMPLETIONS.get(name, {}))
    except LIBRARY_ERRORS as error:
        return alone(refused(f"its default config cannot be built ({in_one_line(error)})"))
    if config.is_encoder_decoder:
        return alone(refused("encoder and decoder"))
    text = config.get_text_config()
    if text is not config:
        return alone(_through(text))
    padded, packed = probe_padded(config), probe_packed(config)
    if padded.refusal is not None:
        return alone(refused(padded.refusal))
    packs = packed.refusal is None
    cells = [YES, f"{YES} ({packed.deviation:.0e})" if packs else refused(packed.refusal)]
    with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as place:
        base = Path(place) / "base"
        try:
            write_base(base, config)
        except LIBRARY_ERRORS as error:
            return [*cells, fails(error), *[NOTHING] * 3]
        for quantization in ("none", "nf4"):
            cells += _adapted(base, packs, quantization)
    return cells


def alone(cell: str) -> list[str]:
    """Return the cells of a type of which one thing is to be said."""
    return [cell, *[NOTHING] * (len(COLUMNS) - 1)]


def refused(reason: str | None) -> str:
    """Return the cell of a refusal."""
    return f"refused: {reason}".replace("|", "/")


def fails(error: BaseException) -> str:
    """Return the cell of what a run would end in: nothing refuses it yet."""
    return f"fails: {in_one_line(error)}".replace("|", "/")


def _through(text: PretrainedConfig) -> str:
    """Return what becomes of a multimodal model: what becomes of its text decoder."""
    if type(text) in AutoModelForCausalLM._model_mapping:
        return f"its text decoder, `{text.model_type}`"
    return refused(f"its text model, `{text.model_type}`, is no causal LM by itself")


def write_base(folder: Path, config: PretrainedConfig) -> None:
    """Write a tiny checkpoint of an architecture with a tokenizer; sums go over whole NF4 blocks wherever they can."""
    tokenizer = tiny_parts()[1]
    small = shrink(config)
    wide = copy.deepcopy(small)
    for name, value in small.to_dict().items():
        if name.endswith(_WIDTHS):
            setattr(wide, name, _widened(value))
    wide.vocab_size = len(tokenizer)
    tiny_model(wide).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _widened(value: Any) -> Any:
    if isinstance(value, list):
        return [_widened(entry) for entry in value]
    is_width = isinstance(value, int) and not isinstance(value, bool)
    return math.ceil(value / _BLOCK) * _BLOCK if is_width else value


def _adapted(base: Path, packs: bool, quantization: str) -> list[str]:
    """Return the cells of LoRA on all linear layers of a base, and of what is merged of it."""
    trained = None

    def train() -> str:
        nonlocal trained
        trained = load_backbone(base, BackboneOptions(quantization=quantization, **_OPTIONS))
        return _trains(trained, packs)

    cells = [_cell(base, train)]
    if not cells[0].startswith(YES) or trained is None:
        return [*cells, NOTHING]
    backbone = trained
    return [*cells, _cell(base, lambda: _merges(base, backbone))]


def _cell(base: Path, work: Callable[[], str]) -> str:
    try:
        return work()
    except UserError as error:
        # A name of the day, in a file that is to be compared with others.
        return refused(in_one_line(error).replace(f"{base}: ", "").replace(str(base), "the base"))
    except LIBRARY_ERRORS as error:
        return fails(error)


def _trains(backbone: Backbone, packs: bool) -> str:
    """Train an adapter on rows, and packed where the type packs; its LoRA then is what it is compared with."""
    generator = torch.Generator().manual_seed(1)
    model = backbone.model
    for name, parameter in model.named_parameters():
        # What no gradient reaches stays as it is: zero.
        if "lora_B" in name and parameter.requires_grad:
            parameter.data.normal_(std=0.05, generator=generator)
    layers = [parameter.requires_grad for name, parameter in model.named_parameters() if "lora_B" in name]
    idle = layers.count(False)
    model.eval()
    expected = _hidden_and_gradients(model, padded_hidden)
    if packs:
        decoder_of(model).config._attn_implementation = attention.NAME
        found = _hidden_and_gradients(model, packed_hidden)
        decoder_of(model).config._attn_implementation = "eager"
        whole = torch.cat([value.reshape(-1) for name, value in expected.items() if "lora_" in name])
        other = torch.cat([value.reshape(-1) for name, value in found.items() if "lora_" in name])
        deviation = max(_deviation(found["hidden"], expected["hidden"]), _deviation(other, whole))
        if not deviation <= TOLERANCE:
            return refused(f"packed deviates by {deviation:.2g}")
    return f"{YES}, {len(layers)} layers{f', {idle} of them idle' if idle else ''}"


def _hidden_and_gradients(wrapped: nn.Module, run: Callable[..., Tensor]) -> dict[str, Tensor]:
    wrapped.zero_grad()
    generator = torch.Generator().manual_seed(2)
    embed = wrapped.get_input_embeddings()
    ids = torch.randint(3, VOCAB, (3, 18), generator=generator)
    prefix, suffixes = embed(ids[0, :11]).detach(), embed(ids[:, 11:]).detach().requires_grad_()
    hidden = run(wrapped, prefix, suffixes, range(7))
    weights = torch.randn(hidden.shape, generator=generator)
    (hidden * weights).sum().backward()
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in trained.items()}
    return {"hidden": hidden.detach()} | gradients


def _merges(base: Path, backbone: Backbone) -> str:
    """Merge the adapter by the project's own command, and compare what the library loads of that with what it was."""
    root = base.parent / (backbone.quantized_modules and "nf4" or "plain")
    run = RunFacts(
        config={"training": {"precision": "fp32"}},
        model_config={"aus": [1], "prompt": "Evidence:<CT>"},
        base=base_identity(str(base), backbone.config.to_dict(), base),
        quantized_modules=backbone.quantized_modules,
    )
    model = _Trained(backbone.model)
    checkpoint = save_checkpoint(root / "checkpoints", 1, model=model, optimizer=None, state={}, run=run)
    expected = _logits(backbone.model)
    merge_llm(checkpoint, root / "merged", dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(
        root / "merged", dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    deviation = _deviation(_logits(merged), expected)
    return f"{YES} ({deviation:.0e})" if deviation <= TOLERANCE else f"fails: merged deviates by {deviation:.2g}"


class _Trained(nn.Module):
    """As much of a trained model as a checkpoint needs."""

    adapter_prefix = "llm"

    def __init__(self, llm: nn.Module) -> None:
        super().__init__()
        self.llm = llm
        self.head = nn.Linear(2, 2)

    def peft_model(self) -> nn.Module:
        """Return the LLM with LoRA."""
        return self.llm


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    ids = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))
    return model.eval()(input_ids=ids, use_cache=False).logits


def _deviation(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()
