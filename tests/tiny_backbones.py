"""Tiny configs of what people fine-tune besides the architectures of `tiny_architectures`, as the probe makes them."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aullm_dist.packing.shrink import shrink

# One or more of each kind: sinks, latent attention, layers without positions, two head sizes, experts, embeddings per
# layer, scaled queries, every recurrent layer.
SETTINGS: dict[str, dict[str, object]] = {
    "gpt_oss": {},
    "granite_swa": {},
    "deepseek_v3": {},
    "mimo_v2_flash": {},
    "afmoe": {},
    "gemma3n_text": {},
    "gemma4_text": {"num_kv_shared_layers": 10},
    "qwen3_moe": {},
    "smollm3": {},
    "ministral3": {},
    "phi3": {},
    "llama4_text": {},
    "qwen3_5_text": {},
    "qwen3_next": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_hidden_layers": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention"] * 31 + ["full_attention"]},
    "falcon_h1": {},
    "nemotron_h": {},
    "olmo_hybrid": {},
    "hunyuan_v1_moe": {"head_dim": 128},
}
HYBRIDS = ("qwen3_5_text", "qwen3_next", "lfm2", "granitemoehybrid", "falcon_h1", "nemotron_h")


def full_config(name: str) -> PretrainedConfig:
    """Return a config of released size."""
    return CONFIG_MAPPING[name](**SETTINGS.get(name, {}))


def small_config(name: str) -> PretrainedConfig:
    """Return the config at tiny size."""
    return shrink(full_config(name))


def write_any(folder: Path, name: str, tokenizer_folder: Path | None = None, **changes: object) -> None:
    """Write a tiny checkpoint of any type, as its library class saves it, with a tokenizer if there is one.

    Args:
        folder: where to.
        name: model type.
        tokenizer_folder: of a tokenizer that the vocabulary then fits.
        changes: settings of the config; those that the type does not have are left out.
    """
    config = small_config(name)
    for key, value in changes.items():
        if getattr(config, key, None):
            setattr(config, key, value)
    write_config(folder, config, tokenizer_folder)


def write_config(folder: Path, config: PretrainedConfig, tokenizer_folder: Path | None = None) -> None:
    """Write a tiny checkpoint of a config, as `write_any`."""
    if tokenizer_folder is not None:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        config.vocab_size, config.pad_token_id = len(tokenizer), tokenizer.pad_token_id
        tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            # Memory that nobody has written to, experts of some types for one.
            if not parameter.isfinite().all() or parameter.abs().max() > 1e3 or parameter.abs().max() == 0:
                parameter.data.normal_(std=0.1)
        for buffer in model.buffers():
            # A router's bias is zero at first, which would hide one that got lost.
            if buffer.is_floating_point() and not buffer.any():
                buffer.data.normal_(std=0.1)
    model.save_pretrained(folder)
