"""Tiny multimodal checkpoints around text decoders, as their makers' classes save them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.125,
}
_QWEN_TOWER = {"hidden_size": 32, "intermediate_size": 32, "depth": 1, "num_heads": 2, "out_hidden_size": 64}
_LATENT = {
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "head_dim": 8,
    "v_head_dim": 16,
}

# name: settings of the text decoder, settings of the wrapper, type of the text decoder
WRAPPERS: dict[str, tuple[dict, dict, str]] = {
    # Tied head; old names: `language_model.model.`
    "gemma3": (
        {"sliding_window": 6, "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention"]},
        {"vision_config": _TOWER | {"image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4},
        "gemma3_text",
    ),
    # A head of its own: `language_model.lm_head`
    "mistral3": (
        {"model_type": "mistral", "sliding_window": None},
        {
            "vision_config": _TOWER | {"model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 16},
            "tie_word_embeddings": False,
        },
        "mistral",
    ),
    # New names: `model.language_model.` and `lm_head`; recurrent layers
    "qwen3_5": (
        {
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
        {"vision_config": _QWEN_TOWER | {"num_position_embeddings": 16}},
        "qwen3_5_text",
    ),
    # Experts by themselves inside a wrapper
    "kimi_k25": (
        _LATENT
        | {"model_type": "deepseek_v3", "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
        | {"moe_intermediate_size": 64, "first_k_dense_replace": 1, "num_key_value_heads": 4},
        {"vision_config": _TOWER, "tie_word_embeddings": False},
        "deepseek_v3",
    ),
}


def write_wrapper(folder: Path, name: str, tokenizer_folder: Path) -> PreTrainedModel:
    """Write a multimodal checkpoint into `folder` and return its model."""
    text, settings, _ = WRAPPERS[name]
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = CONFIG_MAPPING[name](text_config=_TEXT | text | {"vocab_size": len(tokenizer)}, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    if name == "kimi_k25":
        # As published; transformers 5.23 calls layers of the text decoder blocks when it saves them.
        tensors = load_file(folder / "model.safetensors")
        published = {
            key.replace("language_model.model.blocks", "language_model.model.layers"): tensors[key] for key in tensors
        }
        save_file(published, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    return model.eval()
