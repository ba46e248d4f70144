"""Allocates what the kernels read and fill, for a launch and for a trace alike.

Shape letters as in `reference.py`; J is the width of what is joined, P the programs that sum parameter gradients.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aullm_kernels.tables import FAMILY, families, tile

SMALLEST_TILE = 16


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor has it, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def evidence_outputs(
    cells: Tensor, queries: Tensor, join: Tensor | None, num_regions: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result `[B, (H+1+R)*C + J]`, the evidence rows in full precision and the rows' statistics.

    The statistics are `[B, 2, rows]`: the largest score and one over the sum of weights of each row of the tile.
    """
    batch, _, channels = cells.shape
    heads = queries.shape[1]
    num_rows = heads + 1 + num_regions
    acc = accumulation_dtype(cells, queries)
    width = num_rows * channels
    dtype = cells.dtype
    if join is not None:
        width, dtype = width + join.shape[1], torch.promote_types(cells.dtype, join.dtype)
    padded = max(SMALLEST_TILE, 1 << (num_rows - 1).bit_length())
    return (
        cells.new_empty(batch, width, dtype=dtype),
        cells.new_empty(batch, heads, channels, dtype=acc),
        cells.new_empty(batch, 2, padded, dtype=acc),
    )


@dataclass(frozen=True, slots=True)
class Branches:
    """What tells the branches of `graph_attention` apart.

    Attributes:
        strength: `[G, E]` added to the scores, or None.
        mask: `[G, E]` bool, or None.
        order: Branches sorted by their feature row, `[G]` int64; None where branch g uses row g.
        starts: Where each row's branches start in `order`, `[V+1]` int64.
    """

    strength: Tensor | None
    mask: Tensor | None
    order: Tensor | None
    starts: Tensor | None

    def pointers(self) -> tuple[Tensor | None, ...]:
        """Return the tensors in the order of the kernels' arguments."""
        mask = None if self.mask is None else self.mask.view(torch.uint8)
        return self.strength, mask, self.order, self.starts

    def strides(self) -> tuple[int, ...]:
        """Return the strides of strength and mask, 0 for one that is absent."""
        return tuple(s for t in (self.strength, self.mask) for s in ((0, 0) if t is None else t.stride()))

    def flags(self) -> dict[str, bool]:
        """Return the compile-time arguments that say what is there."""
        return {
            "SHARED": self.order is not None,
            "HAS_STRENGTH": self.strength is not None,
            "HAS_MASK": self.mask is not None,
        }


def sort_branches(branch_index: Tensor | None, num_rows: int) -> tuple[Tensor | None, Tensor | None]:
    """Return `order` and `starts` of `Branches` for a branch's feature rows; no value is read on the host."""
    if branch_index is None:
        return None, None
    rows, order = torch.sort(branch_index, stable=True)
    starts = torch.searchsorted(rows, torch.arange(num_rows + 1, device=rows.device))
    return order, starts


@dataclass(frozen=True, slots=True)
class GraphGradients:
    """Buffers of the backward pass of `graph_attention`.

    Attributes:
        d_xl: `[V, A, H, F]`.
        d_xr: `[V, A, H, F]`.
        d_relation: Partial sums `[P, tiles, R, H, F]`.
        d_attention: Partial sums `[P, tiles, H, F]`.
        d_gate: Partial sums `[P, tiles, R, H]`.
        d_score: Gradient of each branch's scores, `[G, H, E]`.
        d_total: The same summed over the branches of a row, `[V, H, E]`; `d_score` itself where each has one.
        weight: Gated weight of each edge, `[G, H, E]`.
    """

    d_xl: Tensor
    d_xr: Tensor
    d_relation: Tensor
    d_attention: Tensor
    d_gate: Tensor
    d_score: Tensor
    d_total: Tensor
    weight: Tensor

    def of_targets(self) -> tuple[Tensor, ...]:
        """Return what the pass over incoming edges fills, in the order of its arguments."""
        return self.d_xl, self.d_relation, self.d_attention, self.d_gate, self.d_score, self.d_total, self.weight


def graph_gradients(
    xl: Tensor,
    xr: Tensor,
    relations: int,
    num_branches: int,
    num_edges: int,
    degree: int,
    acc: torch.dtype,
    shared: bool,
) -> GraphGradients:
    """Allocate the buffers of the backward pass."""
    rows, nodes, heads, features = xl.shape
    block = tile("graph_attention_target", {"features": features, "degree": degree}).block
    parts = (min(rows, families()[FAMILY]["programs"]), math.ceil(nodes / block))
    d_score = xl.new_empty(num_branches, heads, num_edges, dtype=acc)
    return GraphGradients(
        d_xl=torch.empty_like(xl, memory_format=torch.contiguous_format),
        d_xr=torch.empty_like(xr, memory_format=torch.contiguous_format),
        d_relation=xl.new_empty(*parts, relations, heads, features, dtype=acc),
        d_attention=xl.new_empty(*parts, heads, features, dtype=acc),
        d_gate=xl.new_empty(*parts, relations, heads, dtype=acc),
        d_score=d_score,
        d_total=xl.new_empty(rows, heads, num_edges, dtype=acc) if shared else d_score,
        weight=torch.empty_like(d_score),
    )
