"""Defines the kernels with their gradients. Inputs are saved as they came: under ZeRO-3 a parameter must be saved
itself, for a copy of it would stay whole between forward and backward pass.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aullm_kernels import library
from aullm_kernels.edges import EdgeTable


class EvidencePool(torch.autograd.Function):
    """`evidence_pool` with the result flat, `[B, (H+1+R)*C + J]`."""

    @staticmethod
    def forward(
        ctx: Any,
        cells: Tensor,
        queries: Tensor,
        regions: Tensor,
        valid: Tensor | None,
        join: Tensor | None,
        num_regions: int,
    ) -> Tensor:
        """Pool, and keep the evidence rows in full precision."""
        out, pooled, stats = library.evidence_pool_forward(cells, queries, regions, valid, join, num_regions)
        ctx.save_for_backward(cells, queries, regions, valid, pooled, stats)
        ctx.num_regions = num_regions
        ctx.join = None if join is None else (join.shape[1], join.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of cells, queries and join."""
        cells, queries, regions, valid, pooled, stats = ctx.saved_tensors
        d_cells, d_queries, d_join = None, None, None
        if ctx.needs_input_grad[4]:
            width, dtype = ctx.join
            d_join = grad[:, grad.shape[1] - width :].to(dtype)
        need = ctx.needs_input_grad[:2]
        if any(need):
            found = library.evidence_pool_backward(
                grad, cells, queries, regions, valid, pooled, stats, ctx.num_regions, *need
            )
            d_cells, d_queries = (g if wanted else None for g, wanted in zip(found, need, strict=True))
        return d_cells, d_queries, None, None, d_join, None


class GraphAttention(torch.autograd.Function):
    """`graph_attention` of at least one edge."""

    @staticmethod
    def forward(
        ctx: Any,
        xl: Tensor,
        xr: Tensor,
        relation_embedding: Tensor,
        attention: Tensor,
        gate: Tensor,
        incoming: Tensor,
        outgoing: Tensor,
        strength: Tensor | None,
        mask: Tensor | None,
        branch_index: Tensor | None,
        num_edges: int,
        slope: float,
    ) -> Tensor:
        """Attend; nothing but the inputs is saved."""
        inputs = (xl, xr, relation_embedding, attention, gate)
        ctx.save_for_backward(*inputs, incoming, outgoing, strength, mask, branch_index)
        ctx.num_edges, ctx.slope = num_edges, slope
        return library.graph_attention_forward(*inputs, incoming, strength, mask, branch_index, slope)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of features, parameters and strength."""
        found = library.graph_attention_backward(grad, *ctx.saved_tensors, ctx.num_edges, ctx.slope)
        d_strength = found[5] if ctx.needs_input_grad[7] else None
        return *found[:5], None, None, d_strength, None, None, None, None


def evidence_pool(
    cells: Tensor,
    queries: Tensor,
    regions: Tensor,
    valid: Tensor | None = None,
    join: Tensor | None = None,
    *,
    num_regions: int,
) -> Tensor:
    """Twin of `reference.evidence_pool` in Triton."""
    flat = EvidencePool.apply(cells, queries, regions, valid, join, num_regions)
    return flat if join is not None else flat.unflatten(1, (queries.shape[1] + 1 + num_regions, cells.shape[2]))


def graph_attention(
    xl: Tensor,
    xr: Tensor,
    relation_embedding: Tensor,
    attention: Tensor,
    gate: Tensor,
    edges: EdgeTable,
    strength: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    branch_index: Tensor | None = None,
    negative_slope: float = 0.2,
) -> Tensor:
    """Twin of `reference.graph_attention` in Triton."""
    return GraphAttention.apply(
        xl,
        xr,
        relation_embedding,
        attention,
        gate,
        edges.incoming_slots,
        edges.outgoing_slots,
        strength,
        mask,
        branch_index,
        edges.num_edges,
        negative_slope,
    )
