"""One packed forward for many branches that share a static prefix, and the padded forward that it must equal.

K suffixes of S tokens behind one prefix of P tokens become one sequence of P + K*S tokens instead of K rows of P + S. A
suffix sees the prefix and, causally, itself; its position ids restart at P. Both paths are the same function, gradients
included; the padded one is the oracle of the tests and what `packing: off` runs. LoRA dropout differs between them.

Which mask an architecture needs is a property of the architecture, and some combinations are silently wrong (a boolean
mask with eager attention, one mask where each layer type wants its own, a window counted by index instead of by
position); so what is not in `MASK_RECIPES` is refused by name.

Letters: K suffixes (branches times clips), P prefix tokens, S suffix tokens, R readout positions, D LLM width.
"""

import contextlib
import functools
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.masking_utils import create_causal_mask

from aullm_dist.errors import UserError
from aullm_dist.model import prefix_attention

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

ATTENTIONS = ("prefix", "sdpa", "eager", "flex")
"""Attention implementations that run packed branches: `prefix` knows the layout, `flex` takes it as a block mask, the
others take a dense mask."""

LIBRARY_NAMES = {"prefix": prefix_attention.NAME, "flex": "flex_attention"}
"""Names by which transformers knows attentions, where they differ from ours."""

_MASKS_KEPT = 8

_FLOAT32_TOLERANCE = 1e-4
_ROUNDING_DRAWS = 4
_ROUNDING_FACTOR = 3.0
_LARGEST_TOLERANCE = 0.25

_REMEDY = "or set model.packing=false and model.attention=auto"


def check_packable(config: PretrainedConfig, attention: str) -> None:
    """Refuse a backbone or an attention implementation whose packed mask is not known to be right.

    Raises:
        UserError: an attention that ignores custom masks or that the backbone does not have, a model type outside
            `MASK_RECIPES`, layers that are neither full nor sliding attention, sliding layers without a window, chunked
            or bidirectional attention.
    """
    attention = next((ours for ours, theirs in LIBRARY_NAMES.items() if theirs == attention), attention)
    model_type = config.model_type
    if attention not in ATTENTIONS:
        why = " (flash attention ignores custom masks)" if "flash" in attention else ""
        allowed = ", ".join(ATTENTIONS)
        raise UserError(
            f"packing: attention {attention!r} cannot run packed branches{why}; allowed: {allowed}, {_REMEDY}"
        )
    if model_type not in MASK_RECIPES:
        raise UserError(
            f"packing: model type {model_type!r} has no mask recipe; allowed: {', '.join(MASK_RECIPES)}, {_REMEDY}"
        )
    known_types = set(layer_windows(config))
    if MASK_RECIPES[model_type] == "layer_types":
        known_types = {"full_attention", "sliding_attention"}
    other_layers = sorted(set(getattr(config, "layer_types", None) or ()) - known_types)
    if other_layers:
        raise UserError(
            f"packing: {model_type} backbone has layers of type {', '.join(other_layers)}; "
            f"allowed: {', '.join(sorted(known_types))}, {_REMEDY}"
        )
    for name, wrong in _odd_settings(config).items():
        raise UserError(f"packing: {model_type} backbone has {name}={wrong}; no mask recipe for it, {_REMEDY}")
    if attention == "sdpa" and not has_sdpa(config):
        raise UserError(
            f"packing: {model_type} has no sdpa attention (soft-capped scores); allowed: prefix, eager, flex, {_REMEDY}"
        )


def _odd_settings(config: PretrainedConfig) -> dict[str, object]:
    """Return settings under which the recipe of the model type would be wrong."""
    odd = {name: getattr(config, name, None) for name in ("attention_chunk_size", "use_bidirectional_attention")}
    found = {name: given for name, given in odd.items() if given}
    if getattr(config, "is_causal", True) is False:
        found["is_causal"] = False
    window = layer_windows(config).get("sliding_attention", 1)
    if window is None or window < 1:
        found["sliding_window"] = window
    return found


def has_sdpa(config: PretrainedConfig) -> bool:
    """Return whether the library runs this causal LM with sdpa; one with soft-capped scores it does not."""
    return AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa


def layer_windows(config: PretrainedConfig) -> dict[str, int | None]:
    """Return the layer types of a backbone in `MASK_RECIPES`, each with its sliding window; None sees everything."""
    recipe, window = MASK_RECIPES[config.model_type], getattr(config, "sliding_window", None)
    if recipe == "layer_types":
        return {name: window if name == "sliding_attention" else None for name in sorted(set(config.layer_types))}
    if recipe == "window" and window is not None:
        return {"sliding_attention": window}
    return {"full_attention": None}


def decoder_of(llm: nn.Module) -> nn.Module:
    """Return the decoder inside a causal LM, wrapped by PEFT or not: it ends in the final norm, before `lm_head`."""
    causal_lm = llm.get_base_model() if hasattr(llm, "get_base_model") else llm
    return causal_lm.base_model


def packed_hidden(
    llm: nn.Module,
    prefix_embeds: Tensor,
    suffix_embeds: Tensor,
    readout_positions: Sequence[int],
    *,
    rows: int = 1,
    multiple: int = 1,
) -> Tensor:
    """Run all suffixes behind one copy of the prefix per row.

    Args:
        llm: causal LM, wrapped by PEFT or not.
        prefix_embeds: [P, D], input embeddings of the static prefix.
        suffix_embeds: [K, S, D], the suffixes.
        readout_positions: R positions within a suffix.
        rows: packed rows to cut the suffixes into. More rows repeat the prefix more often and attend over shorter
            sequences.
        multiple: rows are filled up until the number of their suffixes is a multiple of this.

    Returns:
        [K, R, D], hidden states after the final norm.
    """
    num_suffixes, suffix_tokens, width = suffix_embeds.shape
    prefix_tokens = len(prefix_embeds)
    rows, per_row = rows_of(num_suffixes, rows, multiple)
    # What the fillers give is dropped, so they have no gradient either.
    fillers = suffix_embeds[:1].detach().expand(rows * per_row - num_suffixes, -1, -1)
    filled = torch.cat([suffix_embeds, fillers])
    prefix = prefix_embeds.expand(rows, prefix_tokens, width)
    sequence = torch.cat([prefix, filled.reshape(rows, per_row * suffix_tokens, width)], dim=1)
    shape = (prefix_tokens, suffix_tokens, per_row)
    positions, _ = _positions_and_segments(*shape, sequence.device)

    decoder = decoder_of(llm)
    if decoder.config._attn_implementation == prefix_attention.NAME:
        layout = {"prefix_tokens": prefix_tokens, "suffix_tokens": suffix_tokens}
    else:
        layout = {"attention_mask": _kept_masks(decoder.config, sequence, shape)}
    output = decoder(inputs_embeds=sequence, position_ids=positions.expand(rows, -1), use_cache=False, **layout)
    hidden = output.last_hidden_state[:, prefix_tokens:].reshape(rows * per_row, suffix_tokens, width)
    return _read_out(hidden[:num_suffixes], readout_positions)


def rows_of(num_suffixes: int, rows: int, multiple: int = 1) -> tuple[int, int]:
    """Return how many packed rows there are, no more than equal rows need, and the suffixes of each, fillers included.

    Args:
        num_suffixes: K.
        rows: rows that are wanted.
        multiple: what the number of suffixes of a row is a multiple of.
    """
    per_row = math.ceil(math.ceil(num_suffixes / rows) / multiple) * multiple
    return math.ceil(num_suffixes / per_row), per_row


def _kept_masks(config: PretrainedConfig, sequence: Tensor, shape: tuple[int, int, int]) -> object | dict[str, object]:
    """Return `_dense_masks` of packed rows of K suffixes; those of the last layouts are kept."""
    kept = _masks.setdefault(config, OrderedDict())
    key = (config._attn_implementation, shape, len(sequence), sequence.dtype, sequence.device)
    if key not in kept:
        kept[key] = _dense_masks(config, sequence, *_positions_and_segments(*shape, sequence.device))
        if len(kept) > _MASKS_KEPT:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


_masks: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _dense_masks(
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

    def visible(batch, head, query, key):
        same_branch = (segments[query] == segments[key]) | (segments[key] == -1)
        # The library's own window counts by index, and would put late suffixes out of sight of the prefix.
        return same_branch if window is None else same_branch & (positions[query] - positions[key] < window)

    if config._attn_implementation == LIBRARY_NAMES["flex"]:
        # Not the library's: it compiles what makes the mask, which takes far longer than making it.
        def causal(batch, head, query, key):
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


def padded_hidden(
    llm: nn.Module, prefix_embeds: Tensor, suffix_embeds: Tensor, readout_positions: Sequence[int]
) -> Tensor:
    """Run every suffix as a row of its own behind its own copy of the prefix: the reference of `packed_hidden`.

    All rows have P + S tokens, so there is nothing to pad and no mask but the causal one.

    Args:
        llm: causal LM, wrapped by PEFT or not.
        prefix_embeds: [P, D].
        suffix_embeds: [K, S, D].
        readout_positions: R positions within a suffix.

    Returns:
        [K, R, D], hidden states after the final norm.
    """
    rows = _padded_rows(prefix_embeds, suffix_embeds)
    return _rows_hidden(llm, rows, len(prefix_embeds), readout_positions)


def _padded_rows(prefix_embeds: Tensor, suffix_embeds: Tensor) -> Tensor:
    prefix = prefix_embeds.expand(len(suffix_embeds), *prefix_embeds.shape)
    return torch.cat([prefix, suffix_embeds], dim=1)


def _rows_hidden(llm: nn.Module, rows: Tensor, prefix_tokens: int, readout_positions: Sequence[int]) -> Tensor:
    output = decoder_of(llm)(inputs_embeds=rows, use_cache=False)
    return _read_out(output.last_hidden_state[:, prefix_tokens:], readout_positions)


def _read_out(hidden: Tensor, positions: Sequence[int]) -> Tensor:
    """Return the hidden states [K, R, D] at R positions of suffixes [K, S, D].

    Without an index tensor: one made of a list would be copied to the device, and the host would wait for that.
    """
    first, count = positions[0], len(positions)
    if list(positions) == list(range(first, first + count)):
        return hidden[:, first : first + count]
    return torch.stack([hidden[:, position] for position in positions], dim=1)


def per_branch_hidden(
    llm: nn.Module,
    prefix_embeds: Tensor,
    suffix_embeds: Tensor,
    readout_positions: Sequence[int],
    *,
    clips: int,
) -> Tensor:
    """Run one padded forward per branch of `clips` rows each: what a trainer without packing would do.

    Args:
        llm: causal LM, wrapped by PEFT or not.
        prefix_embeds: [P, D].
        suffix_embeds: [branches * clips, S, D], branch by branch.
        readout_positions: R positions within a suffix.
        clips: rows of one forward.

    Returns:
        [branches * clips, R, D], hidden states after the final norm.
    """
    forwards = [padded_hidden(llm, prefix_embeds, branch, readout_positions) for branch in suffix_embeds.split(clips)]
    return torch.cat(forwards)


@torch.no_grad()
def self_check(
    llm: nn.Module,
    prefix_embeds: Tensor,
    suffix_embeds: Tensor,
    readout_positions: Sequence[int],
    *,
    rows: int = 1,
    multiple: int = 1,
    tolerance: float | None = None,
) -> float:
    """Compare packed with padded hidden states on the real backbone, dropout off.

    The padded rows run with the library's own attention, so that prefix attention is not compared with itself. The
    deviation of a readout is the norm of the difference relative to the norm of the padded hidden state.

    In a type shorter than float32 two right answers differ by what rounding does to them, and how much that is depends
    on the backbone. So it is measured there: the padded rows run again with every input moved by up to one rounding
    error, which has all layers round anew. Packing may deviate 3 times as much as they do, and never by more than 0.25:
    beyond that nothing could be told (ours).

    Args:
        llm: causal LM, wrapped by PEFT or not.
        prefix_embeds: [P, D].
        suffix_embeds: [K, S, D] with K of at least 2: one suffix alone cannot leak into another.
        readout_positions: R positions within a suffix.
        rows: packed rows.
        multiple: as in `packed_hidden`.
        tolerance: largest deviation allowed; None means 1e-4 for float32, and as described for shorter types.

    Returns:
        The largest deviation over all readouts.

    Raises:
        UserError: the deviation is above the tolerance or not finite.
    """
    was_training = llm.training
    llm.eval()
    packed = packed_hidden(llm, prefix_embeds, suffix_embeds, readout_positions, rows=rows, multiple=multiple)
    with _library_attention(decoder_of(llm).config):
        padded = padded_hidden(llm, prefix_embeds, suffix_embeds, readout_positions)
        if tolerance is None:
            tolerance = _rounding_tolerance(llm, prefix_embeds, suffix_embeds, readout_positions, padded)
    llm.train(was_training)
    deviation = _largest_deviation(packed, padded)
    if not deviation <= tolerance:
        raise UserError(
            f"packing: {decoder_of(llm).config.model_type} backbone gives other hidden states packed than padded "
            f"(relative deviation {deviation:.2g}, allowed: {tolerance:.2g}); set model.packing=false"
        )
    return deviation


def _rounding_tolerance(
    llm: nn.Module, prefix_embeds: Tensor, suffix_embeds: Tensor, readout_positions: Sequence[int], padded: Tensor
) -> float:
    """Return how far packed hidden states may be from `padded` [K, R, D], both being right."""
    device = suffix_embeds.device
    dtype = suffix_embeds.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype == torch.float32:
        return _FLOAT32_TOLERANCE
    rows = _padded_rows(prefix_embeds, suffix_embeds)
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for _ in range(_ROUNDING_DRAWS):
        uniform = (2 * torch.rand(rows.shape, generator=generator) - 1).to(device)
        moved = (rows.float() * (1 + uniform * torch.finfo(dtype).eps / 2)).to(rows.dtype)
        again = _rows_hidden(llm, moved, len(prefix_embeds), readout_positions)
        largest = max(largest, _largest_deviation(again, padded))
    return min(_ROUNDING_FACTOR * largest, _LARGEST_TOLERANCE)


def _largest_deviation(hidden: Tensor, padded: Tensor) -> float:
    return ((hidden.float() - padded.float()).norm(dim=-1) / padded.float().norm(dim=-1)).max().item()


@contextlib.contextmanager
def _library_attention(config: PretrainedConfig) -> Iterator[None]:
    """Replace prefix and flex attention by sdpa, or by eager where the backbone has no sdpa."""
    before = config._attn_implementation
    if before in LIBRARY_NAMES.values():
        config._attn_implementation = "sdpa" if has_sdpa(config) else "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


@functools.lru_cache(maxsize=64)
def _positions_and_segments(
    prefix_tokens: int, suffix_tokens: int, num_suffixes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return position ids and segment numbers of one packed row, each [P + K*S]; the prefix is segment -1."""
    prefix = torch.arange(prefix_tokens, device=device)
    suffix = torch.arange(prefix_tokens, prefix_tokens + suffix_tokens, device=device)
    positions = torch.cat([prefix, suffix.repeat(num_suffixes)])
    numbers = torch.arange(num_suffixes, device=device).repeat_interleave(suffix_tokens)
    return positions, torch.cat([torch.full_like(prefix, -1), numbers])


def forget_positions() -> None:
    """Let go of kept positions: none without values may meet real tensors, nor real ones be taken for allocated."""
    _positions_and_segments.cache_clear()
