"""Registers the FLOP formulas of the operators with `torch.utils.flop_counter`, when it is imported.

A module of its own, because torch's counter imports triton. A multiply-add counts as two. `evidence_pool`: scores and
sums of every row forward; both once more backward, and the products that the wanted gradients take. `graph_attention`:
per slot and feature 6 for a feature row and 2 for a branch forward, 16 and 4 backward.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from aullm_kernels import library  # noqa: F401 - defines the operators

Shape = Sequence[int]


@register_flop_formula(torch.ops.aullm.evidence_pool_forward)
def _(cells: Shape, queries: Shape, regions: Shape, valid: Shape, join: Shape, num_regions: int, **_: Any) -> int:
    return 4 * (queries[1] + 1 + num_regions) * math.prod(cells)


@register_flop_formula(torch.ops.aullm.evidence_pool_backward)
def _(grad: Shape, cells: Shape, queries: Shape, *rest: Any, **_: Any) -> int:
    num_regions, need_d_cells, need_d_queries = rest[-3:]
    return (4 + 4 * need_d_cells + 2 * need_d_queries) * (queries[1] + 1 + num_regions) * math.prod(cells)


@register_flop_formula(torch.ops.aullm.graph_attention_forward)
def _(*inputs: Any, **_: Any) -> int:  # as `library._GRAPH` and `_BRANCHES` list them
    xl, incoming, branch_index = inputs[0], inputs[5], inputs[8]
    return _graph_flops(xl, incoming, branch_index, 6, 2)


@register_flop_formula(torch.ops.aullm.graph_attention_backward)
def _(*inputs: Any, **_: Any) -> int:
    xl, incoming, branch_index = inputs[1], inputs[6], inputs[10]
    return _graph_flops(xl, incoming, branch_index, 16, 4)


def _graph_flops(xl: Shape, incoming: Shape, branch_index: Shape | None, per_row: int, per_branch: int) -> int:
    branches = xl[0] if branch_index is None else branch_index[0]
    return (per_row * xl[0] + per_branch * branches) * incoming[1] * math.prod(xl[1:])
