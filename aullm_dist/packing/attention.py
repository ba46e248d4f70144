"""Computes attention of a packed row: a causal prefix, and suffixes that see the prefix and themselves (ours).

A dense mask over a packed row spends (P + K*S)^2 scores of which a suffix needs S * (P + S). Here the prefix attends
to itself causally, and every suffix takes its scores against the prefix and against its own tokens alone; one softmax
runs over both. It is the same function as the dense mask, gradients included, with neither the mask nor the masked
scores. Sliding windows count positions, which restart at P in every suffix; soft-capped scores are those of Gemma 2;
attention sinks, one more logit per head that takes weight and gives nothing, are those of gpt-oss.

It is registered with transformers under `NAME`. A call without `prefix_tokens` is ordinary causal attention, so padded
rows run through the same backbone. The library builds no masks for an attention that it does not know, so window and
soft cap are this module's business there too, and what it does not know it refuses.

Letters: B rows, H query heads, J key-value heads, G = H / J query heads per key-value head, L = P + K*S tokens, K
suffixes of S tokens behind P prefix tokens, E head dimension, V that of the values (E but for latent attention).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from aullm_dist.errors import UserError

NAME = "aullm_prefix"

_WITHOUT_EFFECT = {"position_ids", "cache_position", "use_cache", "is_causal"}
"""What layers may pass on that changes nothing here; `is_causal` is checked."""


@dataclass(frozen=True, slots=True)
class _Form:
    """What a layer's softmax is made of besides its products."""

    scaling: float
    dropout: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    """[H], the logit of each head's sink."""


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    prefix_tokens: int | None = None,
    suffix_tokens: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend within one packed row, or causally when `prefix_tokens` is None.

    Args:
        module: the attention layer, as transformers passes it.
        query: [B, H, L, E], after the rotary embedding.
        key: [B, J, L, E].
        value: [B, J, L, V].
        attention_mask: must be None; the layout says it all.
        scaling: factor on the scores; None is `E ** -0.5`.
        dropout: dropout on the attention weights.
        sliding_window: a token sees keys less than this many positions back; None sees all.
        softcap: scaled scores become `softcap * tanh(scores / softcap)`; None leaves them.
        s_aux: [H], logits of the heads' attention sinks; None has none.
        prefix_tokens: P.
        suffix_tokens: S.
        **kwargs: whatever else the layer passes; refused unless it is known to have no effect.

    Returns:
        Contiguous output [B, L, H, V], and None for the weights.

    Raises:
        UserError: a mask, a key-value cache, attention that is not causal, or an argument that is not known here.
    """
    _check_call(module, query.shape[2] == key.shape[2], attention_mask, kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    form = _Form(scaling, dropout, sliding_window, softcap, s_aux)
    if prefix_tokens is None:
        return _causal(query, key, value, form).transpose(1, 2).contiguous(), None
    assert suffix_tokens is not None, "a layout has both lengths"
    prefix = _causal(query[:, :, :prefix_tokens], key[:, :, :prefix_tokens], value[:, :, :prefix_tokens], form)
    suffix = _suffixes(query, key, value, (prefix_tokens, suffix_tokens), form)
    return torch.cat([prefix, suffix], dim=2).transpose(1, 2).contiguous(), None


def _check_call(module: nn.Module, whole_rows: bool, attention_mask: Tensor | None, others: dict[str, object]) -> None:
    given = {name for name, value in others.items() if value is not None and value is not False}
    unknown = sorted(given - _WITHOUT_EFFECT)
    if attention_mask is not None:
        unknown.append("attention_mask")
    if not getattr(module, "is_causal", True) or others.get("is_causal") is False:
        unknown.append("is_causal=False")
    if not whole_rows:
        unknown.append("keys of a cache")
    if unknown:
        raise UserError(
            f"attention prefix: {type(module).__name__} passes {', '.join(unknown)}, which it does not know; "
            "set model.attention to sdpa or eager"
        )


def _causal(query: Tensor, key: Tensor, value: Tensor, form: _Form) -> Tensor:
    """Return the outputs [B, H, L, V] of rows whose tokens stand at positions 0 .. L-1."""
    length = query.shape[2]
    plain = form.softcap is None and form.sinks is None
    hidden: Tensor | None = None
    if not plain or (form.window is not None and form.window < length):
        hidden = _hidden(length, length, 0, form.window, query.device)
    if plain:
        return functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if hidden is None else ~hidden,
            dropout_p=form.dropout,
            is_causal=hidden is None,
            scale=form.scaling,
            enable_gqa=True,
        )
    assert hidden is not None
    rows, heads, _, width = query.shape
    groups = key.shape[1]
    flat = query.reshape(rows, groups, heads // groups * length, width)
    scores = _limited(flat @ key.transpose(-1, -2), form).view(rows, groups, -1, length, length)
    weights = _weights(scores.masked_fill(hidden, float("-inf")), form, query.dtype)
    return (weights.view(rows, groups, -1, length) @ value).reshape(rows, heads, length, value.shape[-1])


def _suffixes(query: Tensor, key: Tensor, value: Tensor, sizes: tuple[int, int], form: _Form) -> Tensor:
    """Return the suffixes' outputs [B, H, K*S, V] for sizes (P, S); nothing of the prefix is copied per suffix."""
    prefix_tokens, size = sizes
    window, value_width = form.window, value.shape[-1]
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    per_group, count = heads // groups, (length - prefix_tokens) // size
    # [B, J, G, K, S, E] for queries, [B, J, K, S, E] for keys and [B, J, K, S, V] for values.
    own_query = query[:, :, prefix_tokens:].reshape(rows, groups, per_group, count, size, width)
    own_key = key[:, :, prefix_tokens:].reshape(rows, groups, count, size, width)
    own_value = value[:, :, prefix_tokens:].reshape(rows, groups, count, size, value_width)
    # What lies outside the window of a suffix's first token lies outside that of all.
    first = 0 if window is None else max(0, prefix_tokens + 1 - window)
    seen_tokens = prefix_tokens - first
    seen_key, seen_value = key[:, :, first:prefix_tokens], value[:, :, first:prefix_tokens]
    # Queries of one key-value head fold into rows of one matrix product, against the prefix and suffix by suffix.
    flat = own_query.reshape(rows, groups, per_group * count * size, width)
    to_prefix = _limited(flat @ seen_key.transpose(-1, -2), form)
    to_prefix = to_prefix.view(rows, groups, per_group, count, size, seen_tokens)
    if window is not None and window < seen_tokens + size:
        to_prefix = to_prefix.masked_fill(_hidden(size, seen_tokens, seen_tokens, window, query.device), float("-inf"))
    by_suffix = own_query.transpose(2, 3).reshape(rows, groups, count, per_group * size, width)
    to_own = _limited(by_suffix @ own_key.transpose(-1, -2), form)
    to_own = to_own.view(rows, groups, count, per_group, size, size)
    to_own = to_own.masked_fill(_hidden(size, size, 0, window, query.device), float("-inf")).transpose(2, 3)
    weights = _weights(torch.cat([to_prefix, to_own], dim=-1), form, query.dtype)
    from_prefix, from_own = weights.split([seen_tokens, size], dim=-1)
    seen = from_prefix.reshape(rows, groups, per_group * count * size, seen_tokens) @ seen_value
    own = from_own.transpose(2, 3).reshape(rows, groups, count, per_group * size, size) @ own_value
    own = own.view(rows, groups, count, per_group, size, value_width).transpose(2, 3)
    return (seen.view_as(own) + own).reshape(rows, heads, count * size, value_width)


def _hidden(queries: int, keys: int, offset: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys a query must not see, bool [queries, keys]; query 0 stands `offset` tokens after key 0."""
    back = torch.arange(queries, device=device)[:, None] + offset - torch.arange(keys, device=device)
    return back < 0 if window is None else (back < 0) | (back >= window)


def _limited(products: Tensor, form: _Form) -> Tensor:
    """Return what `_weights` turns into scores; the cap comes before the mask, as tanh makes a mask of -inf finite."""
    if form.softcap is None:
        return products
    return torch.tanh(products.to(torch.promote_types(products.dtype, torch.float32)) * (form.scaling / form.softcap))


def _weights(limited: Tensor, form: _Form, dtype: torch.dtype) -> Tensor:
    """Return attention weights [B, J, G, ..., keys]; hidden entries of `limited` are -inf."""
    # Scaled in float32 at least: bfloat16 would round every query once more.
    scores = limited.to(torch.promote_types(dtype, torch.float32))
    scores = scores * (form.scaling if form.softcap is None else form.softcap)
    if form.sinks is not None:
        groups = limited.shape[1]
        sinks = form.sinks.to(scores.dtype).view(groups, -1, *(1,) * (scores.ndim - 3))
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)
    if form.sinks is not None:
        weights = weights[..., :-1]
    weights = weights.to(dtype)
    return functional.dropout(weights, form.dropout) if form.dropout else weights


AttentionInterface.register(NAME, prefix_attention)
