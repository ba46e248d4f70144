"""Shrinks a backbone's own architecture: its config with sizes cut and every flag kept.

What decides whether packed branches equal padded rows is what the modelling code does, not how wide it is. So sizes
become small numbers that keep their relations (heads that share keys still do, latent attention keeps its parts,
windows are shorter than the text of the probe), and of the layers those stay that differ in any setting.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import transformers
from transformers import PretrainedConfig

VOCAB = 96
WINDOW = 5
"""Positions of sliding windows, and keys of sparse attention: fewer than the probe's texts have."""
_HEADS = 4
_HEAD_DIM = 32
_WIDTH = 64

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")
_LAYER_LISTS = ("layers_block_type", "layer_types")
_DIVIDED = "num_kv_shared_layers"
_OWN_SETTINGS = "per_layer_config"
"""Layer -> settings that it has instead of the common ones (Gemma 4: heads of another width)."""
_STACK = "num_layers_per_stack"
_FIRST_DENSE = ("first_k_dense_replace", "num_dense_layers")
_LAYER_INDICES = ("mlp_only_layers", "full_attn_idxs", "moe_layers", "hybrid_layer_ids")
_PERIODS = ("attn_layer_period", "expert_layer_period", "layer_group_size", "n_layers_per_attn_res_block")

_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_dim", "emb_dim", "lru_width"), _WIDTH),
    **dict.fromkeys(("word_embed_proj_dim", "input_embedding_size", "output_embedding_size"), _WIDTH),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCAB),
    **dict.fromkeys(("intermediate_size", "intermediate_size_mlp", "n_inner", "ffn_dim", "dff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "ffn_hidden_size", "dense_intermediate_size", "dim_ff"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_experts_intermediate_size", "router_hidden_size", "hc_lowrank"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), _HEADS),
    **dict.fromkeys(("decoder_attention_heads", "swa_num_attention_heads", "index_n_heads"), _HEADS),
    **dict.fromkeys(("head_dim", "swa_head_dim", "d_head", "kv_channels", "dim_head"), _HEAD_DIM),
    **dict.fromkeys(("attention_head_dim", "qk_nope_head_dim", "v_head_dim", "rotary_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "laurel_rank", "hidden_size_per_layer_input", "adapter_rank"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank", "d_rel"), 16),
    **dict.fromkeys(("index_head_dim", "swa_v_head_dim", "rel_extent", "ple_embed_dim"), 16),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_headdim",), 16),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), WINDOW),
    **dict.fromkeys(("window_size", "keep_window_size", "index_topk"), WINDOW),
    "query_pre_attn_scalar": _HEAD_DIM,
}
"""Name of a size in any config -> its value at tiny size."""

_AT_MOST: dict[str, int] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts"), 2),
    **dict.fromkeys(("num_expert_group", "n_group", "zero_expert_num", "split_ngram_parts"), 2),
    **dict.fromkeys(("topk_group", "index_topk_blocks"), 1),
    "linear_num_key_heads": 2,
    "index_block_size": 4,
    "ngram_vocab_size_base": VOCAB,
}
"""Name of a count -> its value at tiny size, unless it is smaller already."""

_KEY_VALUE_HEADS = ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "num_query_groups")
_GLOBAL_KEY_VALUE_HEADS = "num_global_key_value_heads"
_WIDTH_AND_HEADS = (("hidden_size", "d_model"), ("num_attention_heads", "n_head"))
_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "quantization_config")
_RUNTIME = ("use_cache", "attn_implementation", "_attn_implementation", "output_attentions", "return_dict")


def shrink(config: PretrainedConfig, *, keep_layers: bool = False) -> PretrainedConfig:
    """Return the config of the same architecture at tiny size.

    Args:
        config: of a text decoder.
        keep_layers: whether it keeps all layers instead of one of each kind.

    Raises:
        ValueError: it holds the configs of other models.
        Exception: what the config's own class raises for sizes that it does not accept.
    """
    if type(config).sub_configs:
        raise ValueError(f"its config holds {', '.join(type(config).sub_configs)}")
    values = {name: copy.deepcopy(value) for name, value in config.to_dict().items() if name not in _VOLATILE}
    heads_before = {name: values[name] for name in _SIZES if "head" in name and isinstance(values.get(name), int)}
    if not keep_layers:
        _cut_layers(values)
    square = _heads_make_the_width(values)
    for name in _SIZES.keys() & values.keys():
        values[name] = _cut(values[name], _SIZES[name])
    for name in _AT_MOST.keys() & values.keys():
        values[name] = _cut(values[name], min(_AT_MOST[name], values[name] or 0))
    if square:
        values["head_dim" if "head_dim" in values else "d_head"] = _WIDTH // _HEADS
    _cut_heads(values, heads_before)
    _cut_recurrent(values)
    _cut_rotary(values)
    for name in list(values):
        if name.endswith("_token_id"):
            # Which words they are makes no difference; whether there is one for padding does.
            values[name] = None if values[name] is None else int(name != "pad_token_id")
    if "initializer_range" in values:
        values["initializer_range"] = _WIDTH**-0.5
    return type(config).from_dict(values)


def key_of(config: PretrainedConfig) -> str:
    """Return what tells architectures apart: a hash of a config without its runtime settings, and of the library."""
    values = {name: value for name, value in config.to_dict().items() if name not in (*_VOLATILE, *_RUNTIME)}
    text = json.dumps([transformers.__version__, values], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class KeyedConfig:
    """A config that equals another of the same architecture, by `key_of`: what a cache of findings is asked with."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self._key = key_of(config)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KeyedConfig) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)


def _cut(value: Any, small: int) -> Any:
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return small if value > 0 else value
    if isinstance(value, list):
        return [_cut(entry, small) for entry in value]
    return value


def layer_kinds(config: PretrainedConfig) -> list[tuple[str, ...]]:
    """Return what tells the layers of a decoder apart, for each: layers of equal entries do the same.

    Raises:
        ValueError: the config has no number of layers under a name that is known, or says by periods what they are.
    """
    values = config.to_dict()
    return [tuple(map(str, kind)) for kind in _kinds(values, _known_count(config, values))]


def keep_layers(config: PretrainedConfig, layers: Sequence[int]) -> PretrainedConfig:
    """Return the config with these layers alone, in their order; one may be named twice.

    Args:
        config: of a text decoder.
        layers: numbers of its layers, ascending.

    Raises:
        ValueError: see `layer_kinds`.
    """
    values = copy.deepcopy(config.to_dict())
    _keep(values, _known_count(config, values), list(layers))
    return type(config).from_dict(values)


def _known_count(config: PretrainedConfig, values: dict[str, Any]) -> int:
    count = _count(values)
    if count is None or any(isinstance(values.get(name), int) for name in _PERIODS):
        raise ValueError(f"layers of a {config.model_type} config cannot be distinguished")
    return count


def _count(values: dict[str, Any]) -> int | None:
    """Return the number of layers, which some configs say by the length of a list alone."""
    named = (values[name] for name in _LAYER_COUNTS if isinstance(values.get(name), int))
    listed = (len(values[name]) for name in _LAYER_LISTS if isinstance(values.get(name), list))
    return next(named, next(listed, None))


def _per_layer(values: dict[str, Any], count: int) -> list[str]:
    """Return the names of the lists with an entry per layer."""
    return [
        name
        for name, value in values.items()
        if isinstance(value, list) and len(value) == count > 1 and name not in _LAYER_INDICES
    ]


def _own(values: dict[str, Any]) -> dict[int, Any]:
    return {int(layer): entry for layer, entry in (values.get(_OWN_SETTINGS) or {}).items()}


def _kinds(values: dict[str, Any], count: int) -> list[tuple[Any, ...]]:
    per_layer, own = _per_layer(values, count), _own(values)
    return [
        (
            repr(own.get(layer)),
            *(repr(values[name][layer]) for name in per_layer),
            layer >= count - (values.get(_DIVIDED) or 0),
            *(layer < (values.get(name) or 0) for name in _FIRST_DENSE),
            *(layer in (values.get(name) or ()) for name in _LAYER_INDICES),
        )
        for layer in range(count)
    ]


def _cut_layers(values: dict[str, Any]) -> None:
    """Keep one layer of each kind, and the last; lists with an entry per layer keep the entries of those."""
    count = _count(values)
    if count is None:
        return
    if isinstance(values.get(_STACK), int):
        # Layers that run again and again: the class counts how often, from those of one stack.
        values |= {"num_hidden_layers": min(values[_STACK], 2), _STACK: None}
        return
    kinds = _kinds(values, count)
    first = {kind: layer for layer, kind in reversed(list(enumerate(kinds)))}
    kept = {*first.values(), count - 1}
    periods = [values[name] for name in _PERIODS if isinstance(values.get(name), int)]
    kept |= set(range(min(max(periods, default=0) + 1, count))) if periods else set()
    if len(kept) == 1:
        kept |= {0, max(count - 1, 0)}
    _keep(values, count, sorted(kept))
    for new, entry in _own(values).items():
        values[_OWN_SETTINGS][new] = {name: _cut_own(name, value, values.get(name)) for name, value in entry.items()}


def _keep(values: dict[str, Any], count: int, layers: Sequence[int]) -> None:
    """Leave the settings of some of `count` layers, as those of a decoder of these layers alone."""
    own = _own(values)
    for name in _per_layer(values, count):
        values[name] = [values[name][layer] for layer in layers]
    if own:
        values[_OWN_SETTINGS] = {new: own[layer] for new, layer in enumerate(layers) if layer in own}
    if values.get(_DIVIDED):
        values[_DIVIDED] = sum(layer >= count - values[_DIVIDED] for layer in layers)
    for name in _FIRST_DENSE:
        if values.get(name):
            values[name] = sum(layer < values[name] for layer in layers)
    for name in _LAYER_INDICES:
        if isinstance(values.get(name), list):
            values[name] = [new for new, layer in enumerate(layers) if layer in values[name]]
    for name in _LAYER_COUNTS:
        if values.get(name) == count:
            values[name] = len(layers)


def _heads_make_the_width(values: dict[str, Any]) -> bool:
    """Return whether the heads together are as wide as the model, which some modelling code takes for granted."""
    width, heads = (values.get(name, values.get(other)) for name, other in _WIDTH_AND_HEADS)
    head = values.get("head_dim", values.get("d_head"))
    if not (isinstance(width, int) and isinstance(heads, int) and isinstance(head, int)):
        return False
    return width == heads * head


def _cut_own(name: str, value: Any, common: Any) -> Any:
    """Cut a setting that one layer has for itself: larger or smaller than the others' as before."""
    small = _SIZES.get(name) or _AT_MOST.get(name)
    if small is None or not isinstance(value, int) or not isinstance(common, int) or value == common:
        return value if small is None else _cut(value, small)
    return small * 2 if value > common else small // 2


def _cut_heads(values: dict[str, Any], before: dict[str, int]) -> None:
    """Keep whether queries share keys: all, some, or none of them."""
    queries = next((before[name] for name in ("num_attention_heads", "n_head", "n_heads") if name in before), None)
    for name in (*_KEY_VALUE_HEADS, _GLOBAL_KEY_VALUE_HEADS):
        value = values.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and queries is not None:
            values[name] = _HEADS if value >= queries else min(value, 2)
        elif isinstance(value, list):
            values[name] = [min(entry, 2) for entry in value]
    per_layer = values.get("num_attention_heads_per_layer")
    if isinstance(per_layer, list):
        values["num_attention_heads_per_layer"] = [_HEADS] * len(per_layer)
    if isinstance(values.get("qk_rope_head_dim"), int):
        values["qk_head_dim"] = values["qk_rope_head_dim"] + values.get("qk_nope_head_dim", 0)
        if isinstance(values.get("head_dim"), int):
            values["head_dim"] = values["qk_rope_head_dim"]
    if values.get("num_key_value_heads") is not None and "kv_lora_rank" in values:
        values["num_key_value_heads"] = values.get("num_attention_heads")
    for name in ("n_group", "num_expert_group"):
        if values.get(name) == 1:
            values["topk_group"] = 1


def _cut_recurrent(values: dict[str, Any]) -> None:
    """Keep Mamba's rule that heads times their width make the inner width."""
    width = values.get("hidden_size")
    if not isinstance(width, int):
        return
    expand = values.get("mamba_expand") or values.get("expand") or 2
    inner = int(expand * width)
    for heads, size, groups in (
        ("mamba_n_heads", "mamba_d_head", "mamba_n_groups"),
        ("mamba_num_heads", "mamba_head_dim", "n_groups"),
        ("n_mamba_heads", "mamba_headdim", "mamba_ngroups"),
        ("num_heads", "head_dim", "n_groups"),
    ):
        if heads in values and size in values and (heads != "num_heads" or "state_size" in values):
            values[heads] = max(inner // values[size], 1)
            if isinstance(values.get(groups), int):
                values[groups] = min(values[groups], 2)
            if "mamba_d_ssm" in values:
                values["mamba_d_ssm"] = values[heads] * values[size]
    if "attention_hidden_size" in values:
        factor = 2 if values.get("model_type", "").startswith("zamba") else 1
        values["attention_hidden_size"] = factor * width
        if "attention_head_dim" in values:
            values["attention_head_dim"] = factor * width // _HEADS


def _cut_rotary(values: dict[str, Any]) -> None:
    """Cut lists of rotary frequencies to the heads' new width."""
    for name in ("rope_parameters", "rope_scaling"):
        settings = values.get(name)
        if isinstance(settings, dict):
            for nested in (settings, *(entry for entry in settings.values() if isinstance(entry, dict))):
                _cut_frequencies(nested, _rotary_pairs(values, nested))


def _rotary_pairs(values: dict[str, Any], settings: dict[str, Any]) -> int:
    width = values.get("head_dim") or values.get("hidden_size", _WIDTH) // _HEADS
    width = values.get("qk_rope_head_dim") or width
    factor = settings.get("partial_rotary_factor") or values.get("partial_rotary_factor") or 1.0
    return int(width * factor) // 2


def _cut_frequencies(settings: dict[str, Any], pairs: int) -> None:
    for name in ("short_factor", "long_factor"):
        if isinstance(settings.get(name), list):
            settings[name] = settings[name][:pairs]
    sections = settings.get("mrope_section")
    if isinstance(sections, list) and sum(sections):
        small = [section * pairs // sum(sections) for section in sections]
        small[0] += pairs - sum(small)
        settings["mrope_section"] = small
