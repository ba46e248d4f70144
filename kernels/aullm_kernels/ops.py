"""Provides the public functions: they check their arguments, choose an implementation and call it.

`triton` and `interpret` are the same code, compiled or interpreted. An implementation takes the arguments of its twin
in `reference.py`, already checked.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from aullm_kernels import functions, reference
from aullm_kernels.dispatch import resolve
from aullm_kernels.edges import EdgeTable

_IMPLEMENTATIONS: dict[str, dict[str, Any]] = {
    name: {"torch": getattr(reference, name), "triton": kernels, "interpret": kernels}
    for name, kernels in (("evidence_pool", functions.evidence_pool), ("graph_attention", functions.graph_attention))
}
# Index tensors whose values were found in range, with their version: a look at values on a GPU would stall it at
# every step.
_checked_indices: WeakIdKeyDictionary = WeakIdKeyDictionary()


def evidence_pool(
    cells: Tensor,
    queries: Tensor,
    regions: Tensor,
    valid: Tensor | None = None,
    join: Tensor | None = None,
    *,
    num_regions: int = 9,
    implementation: str = "auto",
) -> Tensor:
    """Pool the texture cells of each clip into evidence rows, a mean row and region rows.

    Row h < H is `sum_n softmax_n(cells_n . queries_h / sqrt(C)) cells_n`, row H the mean of the cells, row H+1+r the
    mean of the cells of region r; all over valid cells. A row without any valid cell is 0, with zero gradients.

    Args:
        cells: `[B, N, C]`.
        queries: Queries in cell space, `[B, H, C]`; H may be 0.
        regions: Region of each cell, `[N]` int64 in `0..num_regions-1`.
        valid: Which cells count, `[B, N]` bool; None means all.
        join: What follows the rows in one join with them, `[B, J]`; None returns the rows alone.
        num_regions: Number of regions `R`.
        implementation: `auto`, `triton`, `torch` or `interpret`.

    Returns:
        `[B, H+1+R, C]` in the type of `cells`, or the join `[B, (H+1+R)*C + J]` in the wider type of `cells` and
        `join`; low precision inputs are accumulated in float32.

    Raises:
        ValueError: An argument has a wrong shape, type, device or value, or the implementation cannot run.
    """
    _check_evidence(cells, queries, valid)
    _check_tensor("regions", regions, (cells.shape[1],), torch.int64, cells.device)
    if join is not None:
        _check_tensor("join", join, (cells.shape[0], "J"), None, cells.device)
    if num_regions < 1:
        raise ValueError(f"num_regions is {num_regions}, allowed is 1 and up")
    _check_range("regions", regions, num_regions)
    chosen, _ = resolve(
        "evidence_pool",
        implementation,
        cells.device,
        sizes={"rows": queries.shape[1] + 1 + num_regions, "channels": cells.shape[2]},
        dtypes=_dtypes(cells, queries),
    )
    return _IMPLEMENTATIONS["evidence_pool"][chosen](cells, queries, regions, valid, join, num_regions=num_regions)


def evidence_attention(cells: Tensor, queries: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the weights `[B, H, N]` with which `evidence_pool` sums the cells into its evidence rows, for pictures.

    They are always computed in plain PyTorch, in float32 or float64. Arguments and errors as in `evidence_pool`.
    """
    _check_evidence(cells, queries, valid)
    return reference.evidence_attention(cells, queries, valid)


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
    implementation: str = "auto",
) -> Tensor:
    """One layer of relational attention on the shared, typed edges of a small graph, for many branches at once.

    Per head, edge e = (j -> i, r) of branch g scores `s_e = a . leaky_relu(xl_i + xr_j + rel_r) + strength[g, e]`;
    alpha is the softmax over node i's incoming, unmasked edges, and `out_i = sum_e gate_r alpha_e xr_j`. A node
    without such an edge gets exactly 0, with zero gradients.

    Args:
        xl: Features of the receiving nodes, `[V, A, H, F]`.
        xr: Features of the sending nodes, `[V, A, H, F]`.
        relation_embedding: Term of each relation in the score, `[R, H, F]`.
        attention: Score vector `a`, `[H, F]`.
        gate: Sign and size of a relation's messages, `[R, H]`, used as it comes (the caller has applied tanh).
        edges: The edges, on the same device.
        strength: Added to the score of each branch's edges, `[G, E]`; None means 0.
        mask: Which edges a branch has, `[G, E]` bool; None means all.
        branch_index: Feature row of each branch, `[G]` int64 in `0..V-1`; None means G = V, one branch per row. On a
            GPU a value out of range is a device-side assertion instead of a ValueError.
        negative_slope: Slope of the leaky ReLU below 0.
        implementation: `auto`, `triton`, `torch` or `interpret`.

    Returns:
        `[G, A, H, F]` in the type of `xl`; low precision inputs are accumulated in float32.

    Raises:
        ValueError: An argument has a wrong shape, type, device or value, or the implementation cannot run.
    """
    features, relations = _check_graph(xl, xr, relation_embedding, attention, gate, edges, strength, mask, branch_index)
    chosen, _ = resolve(
        "graph_attention",
        implementation,
        xl.device,
        sizes={"features": features, "degree": edges.incoming.shape[1], "relations": relations},
        dtypes=_dtypes(xl, xr, relation_embedding, attention, gate, strength),
    )
    return _IMPLEMENTATIONS["graph_attention"][chosen](
        xl,
        xr,
        relation_embedding,
        attention,
        gate,
        edges,
        strength,
        mask,
        branch_index=branch_index,
        negative_slope=negative_slope,
    )


def graph_weights(
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
    """Return the weights `gate_r alpha_e` `[G, H, E]` with which `graph_attention` sums messages, for pictures.

    A masked edge weighs 0. They are always computed in plain PyTorch, in float32 or float64. Arguments and errors as in
    `graph_attention`.
    """
    _check_graph(xl, xr, relation_embedding, attention, gate, edges, strength, mask, branch_index)
    with reference.full_precision(xl.device):
        weights, _ = reference.incoming_weights(
            xl, xr, relation_embedding, attention, gate, edges, strength, mask, branch_index, negative_slope
        )
        return reference.edge_weights(weights, edges)


def _check_graph(
    xl: Tensor,
    xr: Tensor,
    relation_embedding: Tensor,
    attention: Tensor,
    gate: Tensor,
    edges: EdgeTable,
    strength: Tensor | None,
    mask: Tensor | None,
    branch_index: Tensor | None,
) -> tuple[int, int]:
    """Refuse arguments of `graph_attention` that do not fit; return the features F and the relations R."""
    if not isinstance(edges, EdgeTable):
        raise ValueError(f"edges is {type(edges).__name__}, allowed is an EdgeTable")
    _check_tensor("xl", xl, ("V", edges.num_nodes, "H", "F"), None, edges.device)
    rows, _, heads, features = xl.shape
    _check_tensor("xr", xr, tuple(xl.shape), None, xl.device)
    _check_tensor("relation_embedding", relation_embedding, ("R", heads, features), None, xl.device)
    _check_tensor("attention", attention, (heads, features), None, xl.device)
    relations = relation_embedding.shape[0]
    if relations < edges.min_relations:
        raise ValueError(
            f"relation_embedding has {relations} relations, allowed are {edges.min_relations} or more, as edges has"
        )
    _check_tensor("gate", gate, (relations, heads), None, xl.device)
    branches = rows
    if branch_index is not None:
        _check_tensor("branch_index", branch_index, ("G",), torch.int64, xl.device)
        _check_range("branch_index", branch_index, rows, fresh=True)
        branches = branch_index.shape[0]
    if strength is not None:
        _check_tensor("strength", strength, (branches, edges.num_edges), None, xl.device)
    if mask is not None:
        _check_tensor("mask", mask, (branches, edges.num_edges), torch.bool, xl.device)
    return features, relations


def _dtypes(*tensors: Tensor | None) -> tuple[torch.dtype, ...]:
    return tuple(tensor.dtype for tensor in tensors if tensor is not None)


def _check_evidence(cells: Tensor, queries: Tensor, valid: Tensor | None) -> None:
    _check_tensor("cells", cells, ("B", "N", "C"), None, None)
    _check_tensor("queries", queries, (cells.shape[0], "H", cells.shape[2]), None, cells.device)
    if cells.shape[1] < 1 or cells.shape[2] < 1:
        raise ValueError(f"cells is {list(cells.shape)}, allowed is at least one cell and one channel")
    if valid is not None:
        _check_tensor("valid", valid, tuple(cells.shape[:2]), torch.bool, cells.device)


def _check_tensor(
    name: str, value: Any, shape: tuple[int | str, ...], dtype: torch.dtype | None, device: torch.device | None
) -> None:
    """Refuse what is not a tensor of this shape (a letter is any size), type (None: floating point) and device."""
    wanted = str(dtype or "floating point").removeprefix("torch.")
    allowed = f"{wanted} [{', '.join(map(str, shape))}]" + (f" on {device}" if device is not None else "")
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is {type(value).__name__}, allowed is {allowed}")
    fits = value.ndim == len(shape) and all(
        isinstance(s, str) or s == n for s, n in zip(shape, value.shape, strict=True)
    )
    fits = fits and (value.is_floating_point() if dtype is None else value.dtype == dtype)
    if not fits or (device is not None and value.device != device):
        given = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
        raise ValueError(f"{name} is {given}, allowed is {allowed}")


def _check_range(name: str, index: Tensor, size: int, *, fresh: bool = False) -> None:
    """Refuse index values outside `0..size-1`; a tensor is looked at once per version of its values.

    One that is `fresh` in every step is checked by the GPU itself, which ends the process with an assertion: the host
    would wait for the values.
    """
    if torch.compiler.is_compiling() or index.is_meta or index.numel() == 0:
        return
    if _checked_indices.get(index) == (index._version, size):
        return
    if fresh and index.is_cuda:
        torch._assert_async(((index >= 0) & (index < size)).all())
        return
    # Through numpy where that is possible: in a profile an item of a tensor looks like a wait for the device. Tensors
    # of shapes alone are of subclasses, which have no numpy.
    values = index.numpy() if index.is_cpu and type(index) is Tensor else index
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= size:
        raise ValueError(f"{name} has values {low}..{high}, allowed are 0..{size - 1}")
    _checked_indices[index] = (index._version, size)
