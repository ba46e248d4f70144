"""Registers the kernels as torch operators `aullm::*`, with shapes for tracing; Triton is imported at a launch.

Autograd is not registered here: `functions.py` puts it around the operators, which is what tracing, checkpointing and
the interpreter agree on. Outputs that nobody needs are empty tensors, because an operator's results have a fixed
number.
"""

from typing import Any

import torch
from torch import Tensor

from aullm_kernels.buffers import (
    Branches,
    accumulation_dtype,
    evidence_outputs,
    graph_gradients,
    sort_branches,
)

_LIBRARY = torch.library.Library("aullm", "DEF")
_BRANCHES = "Tensor? strength, Tensor? mask, Tensor? branch_index"
_GRAPH = "Tensor xl, Tensor xr, Tensor relation_embedding, Tensor attention, Tensor gate"
_LIBRARY.define(
    "evidence_pool_forward(Tensor cells, Tensor queries, Tensor regions, Tensor? valid, Tensor? join, int num_regions) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "evidence_pool_backward(Tensor grad, Tensor cells, Tensor queries, Tensor regions, Tensor? valid, Tensor pooled, "
    "Tensor stats, int num_regions, bool need_d_cells, bool need_d_queries) -> (Tensor, Tensor)"
)
_LIBRARY.define(f"graph_attention_forward({_GRAPH}, Tensor incoming, {_BRANCHES}, float slope) -> Tensor")
_LIBRARY.define(
    f"graph_attention_backward(Tensor grad, {_GRAPH}, Tensor incoming, Tensor outgoing, {_BRANCHES}, int num_edges, "
    "float slope) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
evidence_pool_forward = torch.ops.aullm.evidence_pool_forward.default
evidence_pool_backward = torch.ops.aullm.evidence_pool_backward.default
graph_attention_forward = torch.ops.aullm.graph_attention_forward.default
graph_attention_backward = torch.ops.aullm.graph_attention_backward.default


def _evidence_pool_forward(
    cells: Tensor, queries: Tensor, regions: Tensor, valid: Tensor | None, join: Tensor | None, num_regions: int
) -> tuple[Tensor, Tensor, Tensor]:
    from aullm_kernels import evidence_kernels

    outputs = evidence_outputs(cells, queries, join, num_regions)
    evidence_kernels.forward(outputs, cells, queries, regions, valid, join, num_regions)
    return outputs


def _evidence_pool_gradients(
    cells: Tensor, queries: Tensor, need_d_cells: bool, need_d_queries: bool
) -> tuple[Tensor, Tensor]:
    # As cells lie in memory: those of a convolution have their channels first.
    d_cells = torch.empty_like(cells) if need_d_cells else cells.new_empty(0)
    d_queries = torch.empty_like(queries, memory_format=torch.contiguous_format)
    return d_cells, d_queries if need_d_queries else queries.new_empty(0)


def _evidence_pool_backward(
    grad: Tensor,
    cells: Tensor,
    queries: Tensor,
    regions: Tensor,
    valid: Tensor | None,
    pooled: Tensor,
    stats: Tensor,
    num_regions: int,
    need_d_cells: bool,
    need_d_queries: bool,
) -> tuple[Tensor, Tensor]:
    from aullm_kernels import evidence_kernels

    gradients = _evidence_pool_gradients(cells, queries, need_d_cells, need_d_queries)
    wanted = (gradients[0] if need_d_cells else None, gradients[1] if need_d_queries else None)
    evidence_kernels.backward(wanted, grad, cells, queries, regions, valid, pooled, stats, num_regions)
    return gradients


def _graph_attention_output(xl: Tensor, branch_index: Tensor | None) -> Tensor:
    return xl.new_empty(xl.shape[0] if branch_index is None else branch_index.shape[0], *xl.shape[1:])


def _graph_attention_forward(
    xl: Tensor,
    xr: Tensor,
    relation_embedding: Tensor,
    attention: Tensor,
    gate: Tensor,
    incoming: Tensor,
    strength: Tensor | None,
    mask: Tensor | None,
    branch_index: Tensor | None,
    slope: float,
) -> Tensor:
    from aullm_kernels import graph_kernels

    out = _graph_attention_output(xl, branch_index)
    branches = Branches(strength, mask, *sort_branches(branch_index, xl.shape[0]))
    graph_kernels.forward(out, xl, xr, relation_embedding, attention, gate, incoming, branches, slope)
    return out


def _graph_attention_backward(
    grad: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from aullm_kernels import graph_kernels

    buffers = graph_gradients(
        xl,
        xr,
        relation_embedding.shape[0],
        grad.shape[0],
        num_edges,
        incoming.shape[1],
        accumulation_dtype(xl, xr, relation_embedding, attention, gate, strength),
        shared=branch_index is not None,
    )
    branches = Branches(strength, mask, *sort_branches(branch_index, xl.shape[0]))
    graph_kernels.backward(
        buffers, grad, xl, xr, relation_embedding, attention, gate, incoming, outgoing, branches, slope
    )
    return (
        buffers.d_xl,
        buffers.d_xr,
        buffers.d_relation.sum((0, 1)).to(relation_embedding.dtype),
        buffers.d_attention.sum((0, 1)).to(attention.dtype),
        buffers.d_gate.sum((0, 1)).to(gate.dtype),
        xl.new_empty(0) if strength is None else buffers.d_score.sum(1).to(strength.dtype),
    )


EAGER = {
    "evidence_pool_forward": _evidence_pool_forward,
    "evidence_pool_backward": _evidence_pool_backward,
    "graph_attention_forward": _graph_attention_forward,
    "graph_attention_backward": _graph_attention_backward,
}
"""What runs for tensors with memory, by the operator's name."""

for _name, _run in EAGER.items():
    for _device in ("CUDA", "CPU"):
        _LIBRARY.impl(_name, _run, _device)


@torch.library.register_fake("aullm::evidence_pool_forward", lib=_LIBRARY)
def _(
    cells: Tensor, queries: Tensor, regions: Tensor, valid: Tensor | None, join: Tensor | None, num_regions: int
) -> tuple[Tensor, Tensor, Tensor]:
    return evidence_outputs(cells, queries, join, num_regions)


@torch.library.register_fake("aullm::evidence_pool_backward", lib=_LIBRARY)
def _(grad: Tensor, cells: Tensor, queries: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_d_cells, need_d_queries = rest[-2:]
    return _evidence_pool_gradients(cells, queries, need_d_cells, need_d_queries)


@torch.library.register_fake("aullm::graph_attention_forward", lib=_LIBRARY)
def _(*inputs: Any) -> Tensor:
    xl, _, _, _, _, _, _, _, branch_index, _ = inputs
    return _graph_attention_output(xl, branch_index)


@torch.library.register_fake("aullm::graph_attention_backward", lib=_LIBRARY)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _, xl, xr, relation_embedding, attention, gate, _, _, strength, *_ = arguments
    inputs = (xl, xr, relation_embedding, attention, gate)
    gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)
    last = xl.new_empty(0) if strength is None else torch.empty_like(strength, memory_format=torch.contiguous_format)
    return (*gradients, last)
