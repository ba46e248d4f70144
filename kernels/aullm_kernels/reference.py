"""Implements the ops in plain PyTorch: the CPU path, the fallback and the oracle of every other implementation.

Arguments are those of the public functions in `aullm_kernels.ops`, which check them first; nothing is checked here.
Inputs of low precision are computed in float32 and the result returns to the type of the first argument.

Shape letters: B clips, N cells, C channels, H heads, R regions or relations, G branches, A nodes, K incoming edges, F
features.
"""

import math
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor

from aullm_kernels.buffers import accumulation_dtype
from aullm_kernels.edges import EdgeTable


def full_precision(device: torch.device) -> AbstractContextManager:
    """Keep an autocast region of the caller from lowering the matrix products in here."""
    return torch.autocast(device.type, enabled=False)


def _masked_softmax(scores: Tensor, keep: Tensor) -> Tensor:
    """Softmax over the last dimension's kept entries; a row with none gives zeros and zero gradients."""
    some = keep.any(dim=-1, keepdim=True)
    # A row of -inf would give NaN in the backward pass even if it were zeroed afterwards, so such a row gets finite
    # scores.
    scores = scores.masked_fill(~keep & some, -math.inf).masked_fill(~some, 0.0)
    return scores.softmax(dim=-1) * keep


def evidence_attention(cells: Tensor, queries: Tensor, valid: Tensor | None = None) -> Tensor:
    """Reference of `aullm_kernels.evidence_attention`."""
    with full_precision(cells.device):
        dtype = accumulation_dtype(cells, queries)
        cells, queries = cells.to(dtype), queries.to(dtype)
        if valid is not None:
            cells = cells.masked_fill(~valid[:, :, None], 0.0)
        return _evidence_weights(cells, queries, valid)


def _evidence_weights(cells: Tensor, queries: Tensor, valid: Tensor | None) -> Tensor:
    scores = queries @ cells.transpose(1, 2) / math.sqrt(cells.shape[-1])
    return scores.softmax(dim=-1) if valid is None else _masked_softmax(scores, valid[:, None, :])


def evidence_pool(
    cells: Tensor,
    queries: Tensor,
    regions: Tensor,
    valid: Tensor | None = None,
    join: Tensor | None = None,
    *,
    num_regions: int = 9,
) -> Tensor:
    """Reference of `aullm_kernels.evidence_pool`."""
    output_dtype = cells.dtype if join is None else torch.promote_types(cells.dtype, join.dtype)
    with full_precision(cells.device):
        dtype = accumulation_dtype(cells, queries)
        cells, queries = cells.to(dtype), queries.to(dtype)
        present = cells.new_ones(cells.shape[0], 1, cells.shape[1])
        if valid is not None:
            # What an invalid cell holds, NaN included, must not reach a sum.
            cells = cells.masked_fill(~valid[:, :, None], 0.0)
            present = valid[:, None, :].to(dtype)
        # Not F.one_hot, which looks at the values first.
        member = (regions == torch.arange(num_regions, device=regions.device)[:, None]).to(dtype) * present
        mean_weights = torch.cat([present, member], dim=1)
        mean_weights = mean_weights / mean_weights.sum(dim=-1, keepdim=True).clamp(min=1.0)
        weights = torch.cat([_evidence_weights(cells, queries, valid), mean_weights], dim=1)
        rows = (weights @ cells).to(output_dtype)
        return rows if join is None else torch.cat([rows.flatten(1), join.to(output_dtype)], dim=1)


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
    """Reference of `aullm_kernels.graph_attention`."""
    with full_precision(xl.device):
        weight_GAHK, neighbour_GAKHF = incoming_weights(
            xl, xr, relation_embedding, attention, gate, edges, strength, mask, branch_index, negative_slope
        )
        return torch.einsum("gahk,gakhf->gahf", weight_GAHK, neighbour_GAKHF).to(xl.dtype)


def incoming_weights(
    xl: Tensor,
    xr: Tensor,
    relation_embedding: Tensor,
    attention: Tensor,
    gate: Tensor,
    edges: EdgeTable,
    strength: Tensor | None,
    mask: Tensor | None,
    branch_index: Tensor | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor]:
    """Return the gated weights `[G, A, H, K]` of the incoming edges and what they weigh, `[G, A, K, H, F]`."""
    dtype = accumulation_dtype(xl, xr, relation_embedding, attention, gate, strength)
    xl, xr, relation_embedding, attention, gate = (t.to(dtype) for t in (xl, xr, relation_embedding, attention, gate))
    # Free slots read edge 0, and are masked below; without edges there are no slots at all.
    slot_AK = edges.incoming.clamp(min=0)
    relation_AK = edges.relation[slot_AK]
    neighbour_VAKHF = xr.index_select(1, edges.source[slot_AK].flatten()).unflatten(1, slot_AK.shape)
    z_VAKHF = xl[:, :, None] + neighbour_VAKHF + relation_embedding[relation_AK]
    score_VAHK = (F.leaky_relu(z_VAKHF, negative_slope) * attention).sum(-1).transpose(2, 3)
    keep = (edges.incoming >= 0)[None, :, None, :]
    if branch_index is not None:
        score_VAHK = score_VAHK.index_select(0, branch_index)
        neighbour_VAKHF = neighbour_VAKHF.index_select(0, branch_index)
    if strength is not None:
        score_VAHK = score_VAHK + strength.to(dtype)[:, slot_AK][:, :, None, :]
    if mask is not None:
        keep = keep & mask[:, slot_AK][:, :, None, :]
    return _masked_softmax(score_VAHK, keep) * gate[relation_AK].transpose(1, 2), neighbour_VAKHF


def edge_weights(weight_GAHK: Tensor, edges: EdgeTable) -> Tensor:
    """Return the weights of incoming edges by edge, `[G, H, E]`."""
    # Free slots go to one edge too many: to leave them out, the host would wait for their number.
    slot_AK = edges.incoming.masked_fill(edges.incoming < 0, edges.num_edges)
    weight_GHE = weight_GAHK.new_zeros(*weight_GAHK.shape[::2], edges.num_edges + 1)
    weight_GHE = weight_GHE.index_copy(2, slot_AK.flatten(), weight_GAHK.transpose(1, 2).flatten(2))
    return weight_GHE[:, :, : edges.num_edges]
