"""Checks the fixed, typed, directed edges of a small graph once, and lays them out for gathering."""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class EdgeTable:
    """Directed, typed edges `source -> target` over `num_nodes` nodes; several edges may join the same two nodes.

    The edges are also kept as one row of incoming edges per node (ELL), because all attention is over those rows: a
    node's row has as many slots as the busiest node has incoming edges, and free slots hold -1.

    Args:
        target: Node that an edge ends in, `[E]` int64 in `0..num_nodes-1`.
        source: Node that an edge comes from, `[E]` int64 in `0..num_nodes-1`.
        relation: Type of an edge, `[E]` int64, 0 or more.
        num_nodes: Number of nodes `A`.

    Raises:
        ValueError: A column has a wrong type, length, device or a value out of range.
    """

    target: Tensor
    source: Tensor
    relation: Tensor
    num_nodes: int
    incoming: Tensor = field(init=False, repr=False)
    """Edge id of each slot, `[A, K]` int64, -1 where the slot is free."""
    incoming_slots: Tensor = field(init=False, repr=False)
    """Edge id, source and relation of each slot, `[3, K, A]` int32, -1 where it is free: what the kernels read."""
    outgoing_slots: Tensor = field(init=False, repr=False)
    """The same of outgoing edges: edge id, target and relation, `[3, L, A]` int32."""
    min_relations: int = field(init=False)
    """The smallest number of relation types that covers `relation`."""

    def __post_init__(self) -> None:
        """Check the columns and lay out `incoming`."""
        num_nodes: object = self.num_nodes  # a caller may not have checked its types
        if not isinstance(num_nodes, int) or num_nodes < 1:
            raise ValueError(f"num_nodes is {self.num_nodes!r}, allowed is an integer from 1 up")
        for name in ("target", "source", "relation"):
            self._check_column(name)
        incoming = _edge_rows(self.target, self.num_nodes)
        outgoing = _edge_rows(self.source, self.num_nodes)
        object.__setattr__(self, "incoming", incoming.to(self.target.device))
        object.__setattr__(self, "incoming_slots", _slots(incoming, self.source, self.relation))
        object.__setattr__(self, "outgoing_slots", _slots(outgoing, self.target, self.relation))
        object.__setattr__(self, "min_relations", int(self.relation.max()) + 1 if self.num_edges else 0)

    def _check_column(self, name: str) -> None:
        column = getattr(self, name)
        if not isinstance(column, Tensor) or column.dtype != torch.int64 or column.ndim != 1:
            given = f"{column.dtype} {list(column.shape)}" if isinstance(column, Tensor) else type(column).__name__
            raise ValueError(f"{name} is {given}, allowed is an int64 tensor [E]")
        if column.shape != self.target.shape or column.device != self.target.device:
            raise ValueError(
                f"{name} is {list(column.shape)} on {column.device}, allowed is the shape and device of target: "
                f"{list(self.target.shape)} on {self.target.device}"
            )
        if column.numel() == 0:
            return
        low, high = int(column.min()), int(column.max())
        if low < 0 or (name != "relation" and high >= self.num_nodes):
            allowed = "0 and up" if name == "relation" else f"0..{self.num_nodes - 1}"
            raise ValueError(f"{name} has values {low}..{high}, allowed are {allowed}")

    @property
    def num_edges(self) -> int:
        """Number of edges `E`."""
        return self.target.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the columns."""
        return self.target.device

    def to(self, device: torch.device | str) -> "EdgeTable":
        """Return this table with its tensors on `device`, without checking them again."""
        moved = object.__new__(EdgeTable)
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            object.__setattr__(moved, item.name, value.to(device) if isinstance(value, Tensor) else value)
        return moved


def _edge_rows(node: Tensor, num_nodes: int) -> Tensor:
    """Lay the edges out in one row per node, `[A, K]` int64 on the host; `node` is the one an edge belongs to."""
    nodes = node.tolist()
    degree = [0] * num_nodes
    slots = []
    for index in nodes:
        slots.append(degree[index])
        degree[index] += 1
    rows = torch.full((num_nodes, max(degree)), -1, dtype=torch.int64)
    rows[nodes, slots] = torch.arange(len(nodes))
    return rows


def _slots(rows: Tensor, other: Tensor, relation: Tensor) -> Tensor:
    """Return edge, other node and relation of each slot `[3, K, A]` int32; nodes last, as a tile reads them."""
    free = rows < 0
    columns = (rows, *(torch.cat([c.cpu(), c.new_zeros(1, device="cpu")])[rows] for c in (other, relation)))
    stacked = torch.stack([column.masked_fill(free, -1).t() for column in columns])
    return stacked.to(torch.int32).contiguous().to(other.device)
