"""Lays suffixes out in packed rows: how many rows, which positions, which readouts.

Letters: K suffixes, P prefix tokens, S suffix tokens, R readout positions, D LLM width.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of(num_suffixes: int, rows: int, multiple: int = 1) -> tuple[int, int]:
    """Return how many packed rows there are, no more than equal rows need, and the suffixes of each, fillers included.

    Args:
        num_suffixes: K.
        rows: rows that are wanted.
        multiple: what the number of suffixes of a row is a multiple of.
    """
    per_row = math.ceil(math.ceil(num_suffixes / rows) / multiple) * multiple
    return math.ceil(num_suffixes / per_row), per_row


def read_out(hidden: Tensor, positions: Sequence[int]) -> Tensor:
    """Return the hidden states [K, R, D] at R positions of suffixes [K, S, D].

    Without an index tensor: one made of a list would be copied to the device, and the host would wait for that.
    """
    first, count = positions[0], len(positions)
    if list(positions) == list(range(first, first + count)):
        return hidden[:, first : first + count]
    return torch.stack([hidden[:, position] for position in positions], dim=1)


@functools.lru_cache(maxsize=64)
def positions_and_segments(
    prefix_tokens: int, suffix_tokens: int, num_suffixes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return position ids and segment numbers of one packed row, each [P + K*S]; the prefix is segment -1."""
    prefix = torch.arange(prefix_tokens, device=device)
    suffix = torch.arange(prefix_tokens, prefix_tokens + suffix_tokens, device=device)
    positions = torch.cat([prefix, suffix.repeat(num_suffixes)])
    numbers = torch.arange(num_suffixes, device=device).repeat_interleave(suffix_tokens)
    return positions, torch.cat([torch.full_like(prefix, -1), numbers])


def forget_positions() -> None:
    """Release kept positions: none on the meta device may meet real tensors, nor real ones be taken for allocated."""
    positions_and_segments.cache_clear()
