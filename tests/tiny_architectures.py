"""One tiny backbone per architecture that packs, with windows shorter than the prompt, and the demo's tokenizer."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WIDTH = 32
WINDOW = 6
_ALTERNATING = ["sliding_attention", "full_attention"]

# name: model type, its own settings, attentions that may run it packed
ARCHITECTURES = {
    "llama": ("llama", {}, ("prefix", "sdpa", "eager")),
    "mistral": ("mistral", {"sliding_window": WINDOW}, ("prefix", "sdpa", "eager")),
    "mistral_full": ("mistral", {"sliding_window": None}, ("prefix", "sdpa", "eager")),
    "qwen2": ("qwen2", {}, ("prefix", "sdpa", "eager")),
    "qwen2_window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
        ("prefix", "sdpa", "eager"),
    ),
    "qwen3": ("qwen3", {"head_dim": 16}, ("prefix", "sdpa", "eager")),
    "qwen3_window": (
        "qwen3",
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 0},
        ("prefix", "sdpa", "eager"),
    ),
    # A cap of 1 bends the scores of random weights; the released 50 would leave them as they are.
    "gemma2": (
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": WINDOW,
            "layer_types": _ALTERNATING,
            "attn_logit_softcapping": 1.0,
        },
        ("prefix", "eager"),
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW, "layer_types": _ALTERNATING},
        ("prefix", "sdpa", "eager"),
    ),
}
WINDOWED = [name for name, (_, settings, _) in ARCHITECTURES.items() if settings.get("sliding_window")]
CASES = [(name, attention) for name, (_, _, attentions) in ARCHITECTURES.items() for attention in attentions]


def write_backbone(folder: Path, name: str, tokenizer_folder: Path) -> Path:
    """Write config, random weights and tokenizer of `name` into `folder` and return it."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = tiny_config(name, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        # Fresh norms are the identity, which would hide a norm in the wrong place.
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_config(name: str, **changes: object) -> PretrainedConfig:
    """Return the config of two layers of width 32 with two query heads on one key-value head."""
    model_type, settings, _ = ARCHITECTURES[name]
    common = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "initializer_range": WIDTH**-0.5,
    }
    return CONFIG_MAPPING[model_type](**(common | settings | changes))
