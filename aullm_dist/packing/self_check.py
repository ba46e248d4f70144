"""Compares packed with padded hidden states on the real backbone, at the start of a run (the self-check)."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from aullm_dist.errors import UserError
from aullm_dist.packing.forward import decoder_of, packed_hidden, padded_rows, rows_hidden
from aullm_dist.packing.implementations import LIBRARY_NAMES, has_sdpa

_FLOAT32_TOLERANCE = 1e-4
_ROUNDING_DRAWS = 4
_ROUNDING_FACTOR = 3.0
_LARGEST_TOLERANCE = 0.25


@torch.no_grad()
def self_check(
    llm: nn.Module,
    prefix_embeds: Tensor,
    suffix_embeds: Tensor,
    readout_positions: Sequence[int],
    *,
    rows: int = 1,
    multiple: int = 1,
    ids: Tensor | None = None,
    tolerance: float | None = None,
) -> float:
    """Compare packed with padded hidden states on the real backbone, dropout off.

    The padded rows run with the library's own attention, so that prefix attention is not compared with itself. The
    deviation of a readout is the norm of the difference relative to the norm of the padded hidden state.

    In a type shorter than float32 two right answers differ by what rounding does to them, and how much that is depends
    on the backbone. So it is measured there: the padded rows run again with every input moved by up to one rounding
    error, which has all layers round again. Packing may deviate 3 times as much as they do, and never by more than
    0.25: beyond that nothing could be concluded (ours).

    Args:
        llm: causal LM, wrapped by PEFT or not.
        prefix_embeds: [P, D].
        suffix_embeds: [K, S, D] with K of at least 2: one suffix alone cannot leak into another.
        readout_positions: R positions within a suffix.
        rows: packed rows.
        multiple: as in `packed_hidden`.
        ids: as in `packed_hidden`.
        tolerance: largest deviation allowed; None means 1e-4 for float32, and as described for shorter types.

    Returns:
        The largest deviation over all readouts.

    Raises:
        UserError: the deviation is above the tolerance, or hidden states are not finite.
    """
    was_training = llm.training
    llm.eval()
    packed = packed_hidden(llm, prefix_embeds, suffix_embeds, readout_positions, rows=rows, multiple=multiple, ids=ids)
    with _library_attention(decoder_of(llm).config):
        run_rows = functools.partial(
            rows_hidden, llm, prefix_tokens=len(prefix_embeds), readout_positions=readout_positions, ids=ids
        )
        rows_embeds = padded_rows(prefix_embeds, suffix_embeds)
        padded = run_rows(rows=rows_embeds)
        if tolerance is None:
            tolerance = _rounding_tolerance(run_rows, rows_embeds, padded)
    llm.train(was_training)
    if not padded.isfinite().all():
        raise UserError(
            f"backbone: {decoder_of(llm).config.model_type} gives hidden states that are not finite for the prompt, "
            "packed or not; allowed: a base whose hidden states are finite numbers in the precision of the run"
        )
    deviation = _largest_deviation(packed, padded)
    if not deviation <= tolerance:
        raise UserError(
            f"packing: {decoder_of(llm).config.model_type} backbone gives other hidden states packed than padded "
            f"(relative deviation {deviation:.2g}, allowed: {tolerance:.2g}); set model.packing=false"
        )
    return deviation


def _rounding_tolerance(run_rows: Callable[..., Tensor], rows: Tensor, padded: Tensor) -> float:
    """Return how far packed hidden states may be from `padded` [K, R, D] of rows [K, P + S, D], both being right."""
    device = rows.device
    dtype = rows.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype == torch.float32:
        return _FLOAT32_TOLERANCE
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    for _ in range(_ROUNDING_DRAWS):
        uniform = (2 * torch.rand(rows.shape, generator=generator) - 1).to(device)
        moved = (rows.float() * (1 + uniform * torch.finfo(dtype).eps / 2)).to(rows.dtype)
        again = run_rows(rows=moved)
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
