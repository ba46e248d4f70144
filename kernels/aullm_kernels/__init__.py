"""Implements the two hot functions of AULLM++, usable without aullm_dist.

`evidence_pool` reads texture cells into evidence, mean and region rows; `graph_attention` is one layer of relational
attention over a small typed graph. `evidence_attention` and `graph_weights` give the weights behind them, for pictures.
Which implementation runs is decided in `aullm_kernels.dispatch`. This package imports the standard library and torch,
and nothing else.
"""

from aullm_kernels.dispatch import resolve
from aullm_kernels.edges import EdgeTable
from aullm_kernels.ops import evidence_attention, evidence_pool, graph_attention, graph_weights

__all__ = [
    "EdgeTable",
    "evidence_attention",
    "evidence_pool",
    "graph_attention",
    "graph_weights",
    "resolve",
]
