"""Builds dense and block masks of packed rows for the attentions that do not know the layout.

Which mask an architecture needs is a property of the architecture, and some combinations are silently wrong (a boolean
mask with eager attention, one mask where each layer type wants its own, a window counted by index instead of by
position); so what is not in `MASK_RECIPES` is refused by name.
"""

from collections import OrderedDict

from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PretrainedConfig
from transformers.masking_utils import create_causal_mask

from aullm_dist.packing.implementations import LIBRARY_NAMES
from aullm_dist.packing.layout import positions_and_segments

MASK_RECIPES: dict[str, str] = {
    "llama": "full",
    "mistral": "window",
    "qwen2": "layer_types",
    "qwen3": "layer_types",
    "gemma2": "layer_types",
    "gemma3_text": "layer_types",
}
"""Model type -> mask recipe, as its modelling file in transformers takes masks. `full`: one mask for all layers, no
window. `window`: one mask for all layers, with `config.sliding_window` in it where that is set. `layer_types`: one mask
per type in `config.layer_types`, of which `sliding_attention` has the window."""

_MASKS_KEPT = 8


def layer_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """Return the layer types of a backbone in `MASK_RECIPES`, each with its sliding window; None sees everything."""
    recipe, window = MASK_RECIPES[config.model_type], getattr(config, "sliding_window", None)
    if recipe == "layer_types":
        return {name: window if name == "sliding_attention" else None for name in sorted(set(config.layer_types))}
    if recipe == "window" and window is not None:
        return {"sliding_attention": window}
    return {"full_attention": None}


def kept_masks(config: PretrainedConfig, sequence: Tensor, shape: tuple[int, int, int]) -> object | dict[str, object]:
    """Return `dense_masks` of packed rows of K suffixes; those of the last layouts are kept."""
    kept = _masks.setdefault(config, OrderedDict())
    key = (config._attn_implementation, shape, len(sequence), sequence.dtype, sequence.device)
    if key not in kept:
        kept[key] = dense_masks(config, sequence, *positions_and_segments(*shape, sequence.device))
        if len(kept) > _MASKS_KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


_masks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def dense_masks(
    config: PretrainedConfig, sequence: Tensor, positions: Tensor, segments: Tensor
) -> object | dict[str, object]:
    """Return what the model takes as `attention_mask` for packed rows: one mask, or one per layer type."""
    windows = layer_windows(config)
    made = {window: _dense_mask(config, sequence, positions, segments, window) for window in set(windows.values())}
    masks = {layer_type: made[window] for layer_type, window in windows.items()}
    return masks if MASK_RECIPES[config.model_type] == "layer_types" else next(iter(masks.values()))


def _dense_mask(
    config: PretrainedConfig, sequence: Tensor, positions: Tensor, segments: Tensor, window: int | None
) -> object:
    """Return one mask of a packed row in the form that the attention implementation wants: a tensor or a BlockMask."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same_branch = (segments[query] == segments[key]) | (segments[key] == -1)
        # The library's own window counts by index, and would put late suffixes out of sight of the prefix.
        return same_branch if window is None else same_branch & (positions[query] - positions[key] < window)

    if config._attn_implementation == LIBRARY_NAMES["flex"]:
        # Not the library's: it compiles what makes the mask, which takes far longer than making it.
        def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & visible(batch, head, query, key)

        return create_block_mask(causal, None, None, len(positions), len(positions), positions.device)
    # The library adds the causal part, and knows the form: boolean for sdpa, additive in the embeddings' dtype for
    # eager.
    return create_causal_mask(
        config=config,
        inputs_embeds=sequence,
        attention_mask=None,
        past_key_values=None,
        position_ids=None,
        and_mask_function=visible,
    )
