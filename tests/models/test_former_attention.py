"""The six types with mask recipes give the bits they gave before prefix attention knew more: old runs repeat."""

from dataclasses import replace

import pytest
import torch
from tiny_architectures import ARCHITECTURES, WIDTH, write_backbone
from torch.nn import functional
from transformers import AttentionInterface, AutoModelForCausalLM

from aullm_dist.packing import attention as prefix_attention
from aullm_dist.packing.forward import decoder_of, packed_hidden


@pytest.fixture(scope="module")
def folders(tiny_llm, tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    return {name: write_backbone(root / name, name, tiny_llm) for name in ARCHITECTURES}


def _former_attention(module, query, key, value, attention_mask, *, scaling=None, dropout=0.0, sliding_window=None,
                      softcap=None, prefix_tokens=None, suffix_tokens=None, **kwargs):  # fmt: skip
    """What prefix attention computed before it knew sinks and values of another width, operation by operation.

    Kept as it was written: every type that it served must go on with the very same bits.
    """
    assert attention_mask is None
    assert value.shape[-1] == query.shape[-1]
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling

    def hidden(queries, keys, offset):
        back = torch.arange(queries)[:, None] + offset - torch.arange(keys)
        return back < 0 if sliding_window is None else (back < 0) | (back >= sliding_window)

    def limited(products):
        if softcap is None:
            return products
        return torch.tanh(products.to(torch.promote_types(products.dtype, torch.float32)) * (scaling / softcap))

    def weigh(scores):
        scores = scores.to(torch.promote_types(query.dtype, torch.float32))
        return torch.softmax(scores * (scaling if softcap is None else softcap), dim=-1).to(query.dtype)

    def causal(query, key, value):
        length = query.shape[2]
        unseen = None
        if softcap is not None or (sliding_window is not None and sliding_window < length):
            unseen = hidden(length, length, 0)
        if softcap is None:
            mask = None if unseen is None else ~unseen
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=unseen is None, scale=scaling, enable_gqa=True
            )
        rows, heads, _, width = query.shape
        groups = key.shape[1]
        flat = query.reshape(rows, groups, heads // groups * length, width)
        scores = limited(flat @ key.transpose(-1, -2)).view(rows, groups, -1, length, length)
        weights = weigh(scores.masked_fill(unseen, float("-inf")))
        return (weights.view(rows, groups, -1, length) @ value).reshape(rows, heads, length, width)

    def suffixes(query, key, value, prefix, size):
        rows, heads, length, width = query.shape
        groups = key.shape[1]
        per_group, count = heads // groups, (length - prefix) // size
        own_query = query[:, :, prefix:].reshape(rows, groups, per_group, count, size, width)
        own_key = key[:, :, prefix:].reshape(rows, groups, count, size, width)
        own_value = value[:, :, prefix:].reshape(rows, groups, count, size, width)
        first = 0 if sliding_window is None else max(0, prefix + 1 - sliding_window)
        seen_tokens = prefix - first
        flat = own_query.reshape(rows, groups, per_group * count * size, width)
        to_prefix = limited(flat @ key[:, :, first:prefix].transpose(-1, -2))
        to_prefix = to_prefix.view(rows, groups, per_group, count, size, seen_tokens)
        if sliding_window is not None and sliding_window < seen_tokens + size:
            to_prefix = to_prefix.masked_fill(hidden(size, seen_tokens, seen_tokens), float("-inf"))
        by_suffix = own_query.transpose(2, 3).reshape(rows, groups, count, per_group * size, width)
        to_own = limited(by_suffix @ own_key.transpose(-1, -2)).view(rows, groups, count, per_group, size, size)
        to_own = to_own.masked_fill(hidden(size, size, 0), float("-inf")).transpose(2, 3)
        from_prefix, from_own = weigh(torch.cat([to_prefix, to_own], dim=-1)).split([seen_tokens, size], dim=-1)
        seen = from_prefix.reshape(rows, groups, per_group * count * size, seen_tokens) @ value[:, :, first:prefix]
        own = from_own.transpose(2, 3).reshape(rows, groups, count, per_group * size, size) @ own_value
        own = own.view(rows, groups, count, per_group, size, width).transpose(2, 3)
        return (seen.view_as(own) + own).reshape(rows, heads, count * size, width)

    if prefix_tokens is None:
        return causal(query, key, value).transpose(1, 2).contiguous(), None
    begin = (part[:, :, :prefix_tokens] for part in (query, key, value))
    parts = [causal(*begin), suffixes(query, key, value, prefix_tokens, suffix_tokens)]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("former_prefix", _former_attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_hidden_states_are_bit_for_bit_what_they_were(folders, name, dtype):
    """The same operations in the same order: another order of sums would already change the last bits."""
    model = AutoModelForCausalLM.from_pretrained(folders[name], dtype=dtype, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(5)
    prefix, suffixes = torch.randn(13, WIDTH, generator=generator), torch.randn(5, 7, WIDTH, generator=generator)
    prefix, suffixes = (part.to(dtype).requires_grad_() for part in (prefix, suffixes))
    found = []
    for implementation in (prefix_attention.NAME, "former_prefix"):
        decoder = decoder_of(model)
        # The packed forward takes the layout's road for prefix attention alone.
        decoder.config._attn_implementation = implementation
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prefix_attention, "NAME", implementation)
            hidden = packed_hidden(model, prefix, suffixes, range(7), rows=2)
        gradients = torch.autograd.grad(hidden.float().square().sum(), [prefix, suffixes])
        found.append([hidden.detach(), *gradients])
    assert [torch.equal(*pair) for pair in zip(*found, strict=True)] == [True, True, True]


def test_the_former_attention_would_notice_another_order_of_sums(folders, monkeypatch):
    """The comparison above can fail: weights that are normalised after their product differ in the last bits."""
    weigh = prefix_attention._weights
    changed = lambda limited, form, dtype: weigh(limited * 3.0, replace(form, scaling=form.scaling / 3.0), dtype)  # noqa: E731
    monkeypatch.setattr(prefix_attention, "_weights", changed)
    with pytest.raises(AssertionError):
        test_packed_hidden_states_are_bit_for_bit_what_they_were(folders, "llama", torch.float32)
