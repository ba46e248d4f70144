"""Prefix attention is the dense-mask attention of a packed row, windows, soft caps and gradients included."""

import pytest
import torch

from aullm_dist.errors import UserError
from aullm_dist.packing.attention import prefix_attention


def _inputs(
    rows: int, heads: int, groups: int, length: int, dtype: torch.dtype, value_width: int = 8
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, count, length, width) for count, width in ((heads, 8), (groups, 8), (groups, value_width))]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def _mask(length: int, prefix: int, suffix: int, window: int | None = None) -> torch.Tensor:
    index = torch.arange(length)
    segments = torch.where(index < prefix, -1, (index - prefix) // suffix)
    positions = torch.where(index < prefix, index, prefix + (index - prefix) % suffix)
    mask = (segments[:, None] == segments[None]) | (segments[None] == -1)
    back = positions[:, None] - positions[None]
    return mask & (index[:, None] >= index[None]) & (back < (length if window is None else window))


def _dense(query, key, value, prefix: int, suffix: int, window=None, softcap=None, sinks=None) -> torch.Tensor:
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~_mask(query.shape[2], prefix, suffix, window), float("-inf"))
    if sinks is not None:
        column = sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
        return (weights @ value).transpose(1, 2)
    return (torch.softmax(scores, dim=-1) @ value).transpose(1, 2)


def _assert_same_function(given, found, same, expected):
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for left, right in zip(given, same, strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-12)


def _twins(*sizes, **more):
    given = _inputs(*sizes, torch.float64, **more)
    return given, [tensor.detach().clone().requires_grad_() for tensor in given]


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 8, 11, 12, 13, 14, 99])
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "prefix", "suffix", "count"),
    [(1, 2, 2, 5, 3, 4), (2, 4, 2, 7, 1, 3), (3, 4, 1, 1, 4, 2), (1, 6, 3, 9, 5, 1)],
)
def test_output_and_gradients_equal_the_dense_mask(rows, heads, groups, prefix, suffix, count, window, softcap):
    given, same = _twins(rows, heads, groups, prefix + suffix * count)
    form = {"sliding_window": window, "softcap": softcap}
    found, _ = prefix_attention(torch.nn.Module(), *given, None, prefix_tokens=prefix, suffix_tokens=suffix, **form)
    _assert_same_function(given, found, same, _dense(*same, prefix, suffix, window, softcap))


@pytest.mark.parametrize("window", [None, 4, 9])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("value_width", [5, 8])
@pytest.mark.parametrize(("prefix", "suffix", "count"), [(5, 3, 4), (1, 4, 2), (12, 3, 0)])
def test_sinks_and_values_of_another_width_equal_the_dense_mask(prefix, suffix, count, value_width, softcap, window):
    given, same = _twins(2, 6, 3, prefix + suffix * count, value_width=value_width)
    sinks = torch.linspace(-1, 2, 6, dtype=torch.float64)
    given, same = ([*tensors, sinks.clone().requires_grad_()] for tensors in (given, same))
    layout = {"prefix_tokens": prefix, "suffix_tokens": suffix} if count else {}
    form = {"sliding_window": window, "softcap": softcap, "s_aux": given[3]}
    found, _ = prefix_attention(torch.nn.Module(), *given[:3], None, **layout, **form)
    assert found.is_contiguous()
    _assert_same_function(given, found, same, _dense(*same[:3], prefix, suffix, window, softcap, same[3]))


def _eager(query, key, value, prefix: int, suffix: int) -> torch.Tensor:
    """What transformers' eager attention does with a dense mask: products in the inputs' dtype, softmax in float32."""
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], dim=1) for tensor in (key, value))
    mask = _mask(query.shape[2], prefix, suffix)
    scores = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, float("-inf"))
    return (torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2)


def test_bfloat16_is_as_near_to_float64_as_eager_attention():
    exact = _inputs(2, 4, 2, 5 + 3 * 40, torch.float64)
    rounded = [tensor.detach().to(torch.bfloat16) for tensor in exact]
    truth = _dense(*(tensor.double() for tensor in rounded), 5, 3)
    found, _ = prefix_attention(torch.nn.Module(), *rounded, None, prefix_tokens=5, suffix_tokens=3)
    eager = _eager(*rounded, 5, 3)
    assert found.dtype == torch.bfloat16
    assert (found.double() - truth).norm() <= 1.2 * (eager.double() - truth).norm()


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 7])
def test_without_a_layout_it_is_causal_attention(window, softcap):
    given, same = _twins(2, 4, 2, 6)
    found, _ = prefix_attention(torch.nn.Module(), *given, None, sliding_window=window, softcap=softcap)
    _assert_same_function(given, found, same, _dense(*same, 6, 1, window, softcap))


def test_what_it_does_not_know_is_refused():
    query, key, value = _inputs(1, 2, 2, 6, torch.float64)
    module, bidirectional = torch.nn.Module(), torch.nn.Module()
    bidirectional.is_causal = False
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    prefix_attention(module, query, key, value, None, s_aux=None, position_ids=torch.arange(6))
    refused = [
        ("position_bias", lambda: prefix_attention(module, query, key, value, None, position_bias=torch.zeros(2))),
        ("attention_mask", lambda: prefix_attention(module, query, key, value, mask)),
        ("attention_mask", lambda: prefix_attention(module, query, key, value, mask, prefix_tokens=4, suffix_tokens=2)),
        ("is_causal=False", lambda: prefix_attention(module, query, key, value, None, is_causal=False)),
        ("is_causal=False", lambda: prefix_attention(bidirectional, query, key, value, None)),
        ("keys of a cache", lambda: prefix_attention(module, query[:, :, 5:], key, value, None)),
    ]
    for what, call in refused:
        with pytest.raises(UserError, match=f"attention prefix: Module passes {what}, which it does not know"):
            call()
