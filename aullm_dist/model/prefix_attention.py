"""Attention of a packed row as what it is: a causal prefix, and suffixes that see the prefix and themselves (ours).

A dense mask over a packed row spends (P + K*S)^2 scores of which a suffix needs S * (P + S). Here the prefix attends
to itself causally, and every suffix takes its scores against the prefix and against its own tokens alone; one softmax
runs over both. It is the same function as the dense mask, gradients included, with neither the mask nor the masked
scores.

It is registered with transformers under `NAME`. A call without `prefix_tokens` is ordinary causal attention, so padded
rows run through the same backbone.

Letters: B rows, H query heads, J key-value heads, G = H / J query heads per key-value head, L = P + K*S tokens, K
suffixes of S tokens behind P prefix tokens, E head dimension.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

NAME = "aullm_prefix"


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefix_tokens: int | None = None,
    suffix_tokens: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attend within one packed row, or causally when `prefix_tokens` is None.

    Args:
        module: the attention layer, as transformers passes it.
        query: [B, H, L, E], after the rotary embedding.
        key: [B, J, L, E].
        value: [B, J, L, E].
        attention_mask: must be None for a packed row; the layout says it all.
        scaling: factor on the scores; None is `E ** -0.5`.
        dropout: dropout on the attention weights.
        prefix_tokens: P.
        suffix_tokens: S.
        **kwargs: whatever else the model passes; given on to the causal path.

    Returns:
        Output [B, L, H, E], and None for the weights.
    """
    if prefix_tokens is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    assert attention_mask is None, "a packed row has no mask of its own"
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    prefix = functional.scaled_dot_product_attention(
        query[:, :, :prefix_tokens],
        key[:, :, :prefix_tokens],
        value[:, :, :prefix_tokens],
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=True,
    )
    suffix = _suffixes(query, key, value, prefix_tokens, suffix_tokens, scaling, dropout)
    return torch.cat([prefix, suffix], dim=2).transpose(1, 2), None


def _suffixes(
    query: Tensor, key: Tensor, value: Tensor, prefix_tokens: int, size: int, scaling: float, dropout: float
) -> Tensor:
    """Return the suffixes' outputs [B, H, K*S, E]; nothing of the prefix is copied per suffix."""
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    per_group, count = heads // groups, (length - prefix_tokens) // size
    # [B, J, G, K, S, E] for queries and [B, J, K, S, E] for keys and values.
    own_query = query[:, :, prefix_tokens:].reshape(rows, groups, per_group, count, size, width)
    own_key = key[:, :, prefix_tokens:].reshape(rows, groups, count, size, width)
    own_value = value[:, :, prefix_tokens:].reshape(rows, groups, count, size, width)
    # Queries of one key-value head fold into rows of one matrix product, against the prefix and suffix by suffix.
    flat = own_query.reshape(rows, groups, per_group * count * size, width)
    to_prefix = flat @ key[:, :, :prefix_tokens].transpose(-1, -2)
    by_suffix = own_query.transpose(2, 3).reshape(rows, groups, count, per_group * size, width)
    to_own = (by_suffix @ own_key.transpose(-1, -2)).view(rows, groups, count, per_group, size, size)
    later = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    to_own = to_own.masked_fill(later, float("-inf")).transpose(2, 3)
    scores = torch.cat([to_prefix.view(rows, groups, per_group, count, size, prefix_tokens), to_own], dim=-1)
    # Scaled in float32 at least: bfloat16 would round every query once more.
    scores = scores.to(torch.promote_types(query.dtype, torch.float32)) * scaling
    weights = torch.softmax(scores, dim=-1).to(query.dtype)
    if dropout:
        weights = functional.dropout(weights, dropout)
    from_prefix, from_own = weights.split([prefix_tokens, size], dim=-1)
    seen = from_prefix.reshape(rows, groups, per_group * count * size, prefix_tokens) @ value[:, :, :prefix_tokens]
    own = from_own.transpose(2, 3).reshape(rows, groups, count, per_group * size, size) @ own_value
    own = own.view(rows, groups, count, per_group, size, width).transpose(2, 3)
    return (seen.view_as(own) + own).reshape(rows, heads, count * size, width)


AttentionInterface.register(NAME, prefix_attention)
