"""Prefix attention is the dense-mask attention of a packed row, gradients included."""

import pytest
import torch
from torch.nn import functional

from aullm_dist.model.prefix_attention import prefix_attention


def _inputs(rows: int, heads: int, groups: int, length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, count, length, 8) for count in (heads, groups, groups)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def _mask(length: int, prefix: int, suffix: int) -> torch.Tensor:
    positions = torch.arange(length)
    segments = torch.where(positions < prefix, -1, (positions - prefix) // suffix)
    mask = (segments[:, None] == segments[None]) | (segments[None] == -1)
    return mask & (positions[:, None] >= positions[None])


def _dense(query, key, value, prefix: int, suffix: int) -> torch.Tensor:
    mask = _mask(query.shape[2], prefix, suffix)
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize(
    ("rows", "heads", "groups", "prefix", "suffix", "count"),
    [(1, 2, 2, 5, 3, 4), (2, 4, 2, 7, 1, 3), (3, 4, 1, 1, 4, 2), (1, 6, 3, 9, 5, 1)],
)
def test_output_and_gradients_equal_the_dense_mask(rows, heads, groups, prefix, suffix, count):
    length = prefix + suffix * count
    given = _inputs(rows, heads, groups, length, torch.float64)
    same = [tensor.detach().clone().requires_grad_() for tensor in given]
    found, _ = prefix_attention(
        torch.nn.Module(), *given, None, scaling=8**-0.5, prefix_tokens=prefix, suffix_tokens=suffix
    )
    expected = _dense(*same, prefix, suffix)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for left, right in zip(given, same, strict=True):
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-10, atol=1e-12)


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


def test_without_a_layout_it_is_causal_attention():
    query, key, value = _inputs(2, 4, 4, 6, torch.float64)
    module = torch.nn.Module()
    module.is_causal = True
    found, _ = prefix_attention(module, query, key, value, None, scaling=8**-0.5)
    expected = functional.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(found, expected)
