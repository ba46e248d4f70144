"""FLOP formulas of the operators: importing this module teaches them to `torch.utils.flop_counter`.

A module of its own, because torch's counter imports triton. A multiply-add counts as two. `evidence_pool`: scores and
sums of every row forward; both once more backward, and the products that the wanted gradients take. `graph_attention`:
per slot and feature 6 for a feature row and 2 for a branch forward, 16 and 4 backward.
"""

import math

import torch
from torch.utils.flop_counter import register_flop_formula

from aullm_kernels import library  # noqa: F401 - defines the operators


@register_flop_formula(torch.ops.aullm.evidence_pool_forward)
def _(cells_shape, queries_shape, regions_shape, valid_shape, join_shape, num_regions, **_) -> int:
    return 4 * (queries_shape[1] + 1 + num_regions) * math.prod(cells_shape)


@register_flop_formula(torch.ops.aullm.evidence_pool_backward)
def _(grad, cells, queries, regions, valid, pooled, stats, num_regions, need_d_cells, need_d_queries, **_) -> int:
    return (4 + 4 * need_d_cells + 2 * need_d_queries) * (queries[1] + 1 + num_regions) * math.prod(cells)


@register_flop_formula(torch.ops.aullm.graph_attention_forward)
def _(xl, xr, relation_embedding, attention, gate, incoming, strength, mask, branch_index, *_, **__) -> int:
    return _graph_flops(xl, incoming, branch_index, 6, 2)


@register_flop_formula(torch.ops.aullm.graph_attention_backward)
def _(grad, xl, xr, relation_embedding, attention, gate, incoming, outgoing, strength, mask, branch_index, *_, **__):
    return _graph_flops(xl, incoming, branch_index, 16, 4)


def _graph_flops(xl, incoming, branch_index, per_row: int, per_branch: int) -> int:
    branches = xl[0] if branch_index is None else branch_index[0]
    return (per_row * xl[0] + per_branch * branches) * incoming[1] * math.prod(xl[1:])
