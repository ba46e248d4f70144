"""Implements R-AUGNN (ours): a small graph over the AUs becomes the instruction token.

The paper names this part and what it is for; its equations are not public, so the form here is this project's own.
Every AU is a node: a learned embedding plus what the visual features say of that AU. Relational attention runs over a
sparse, typed prior; each clip has its own interaction strengths, each relation a signed gate, and a counterfactual
branch its own edges.

Shape letters: V views, N cells, C channels, G branches (structures), A action units, E edges, H heads, F features per
head, D LLM width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from aullm_kernels import EdgeTable, graph_attention, graph_weights
from torch import Tensor, nn

from aullm_dist.errors import UserError
from aullm_dist.facs import AU_REGIONS
from aullm_dist.model.projector import ScaledToken, TokenHead
from aullm_dist.model.relations import AURelations

# First gates per relation before tanh: an antagonist's messages start negative, the rest positive by their specificity.
_FIRST_GATES = {"co-occur": 0.5, "antagonist": -0.5, "subset": 0.25, "region": 0.25, "self": 1.0}
# Height of a facial region's centre in an upright face crop, 0 at the top; only where a node's gaze starts.
_REGION_HEIGHTS = {"brow": 0.25, "eye": 0.35, "cheek": 0.55, "nose": 0.5, "mouth": 0.75, "chin": 0.9}
_GAZE_SPREAD = 0.3


class GraphOutput(NamedTuple):
    """What the graph says of each branch.

    Attributes:
        token: Instruction token, `[G, D]`.
        logits: AU logits `[G, A]` float32. Where the graph is given those of the evidence, what it adds to them, read
            of the token; otherwise an auxiliary answer of the nodes.
        strengths: Interaction strength of each edge before the softmax over a node's edges, `[G, E]`.
        influence: What each edge weighs in the last layer: its share of what its node receives, times the gate of its
            relation, mean over the heads, `[G, E]`; negative where a relation's gate is. Only on request.
        gaze: Where each AU's node looks, `[V, A, N]`.
    """

    token: Tensor
    logits: Tensor
    strengths: Tensor
    influence: Tensor | None
    gaze: Tensor


def first_gaze(aus: tuple[int, ...], cell_grid: tuple[int, int, int]) -> Tensor:
    """Return the first log-weight of each cell for each AU, `[A, N]`: highest at the height of its facial region."""
    time, rows, columns = cell_grid
    height = (torch.arange(rows) + 0.5) / rows
    gaze = torch.zeros(len(aus), time, rows, columns)
    for node, au in enumerate(aus):
        if au in AU_REGIONS:
            distance = (height - _REGION_HEIGHTS[AU_REGIONS[au]]) / _GAZE_SPREAD
            gaze[node] = (-0.5 * distance**2)[None, :, None]
    return gaze.flatten(1)


def project_names(names: Tensor, width: int) -> Tensor:
    """Project the LLM's embeddings of the AUs' names `[A, D]` to node embeddings `[A, width]` of root mean square 1.

    The projection is random but always the same, so that it depends on neither rank nor seed. What all names share is
    taken out first: words such as "raiser" and the common direction of LLM embeddings tell no AU from another.
    """
    generator = torch.Generator().manual_seed(0)
    names = names.detach().float().cpu()
    if names.shape[0] > 1:
        names = names - names.mean(dim=0)
    return F.rms_norm(names @ torch.randn(names.shape[1], width, generator=generator), (width,))


class RelationalLayer(nn.Module):
    """One pre-norm residual layer of relational attention.

    Args:
        width: Features of a node, divisible by `heads`.
        heads: Attention heads H.
        relation_names: Relation types, in the order of their indices.
        dropout: Dropout on the update.
        implementation: Implementation of `graph_attention`.
    """

    def __init__(
        self, width: int, heads: int, relation_names: tuple[str, ...], dropout: float, implementation: str
    ) -> None:
        """Build the layer; gates start with the sign of their relation."""
        super().__init__()
        features = width // heads
        self.heads = heads
        self.implementation = implementation
        self.norm = nn.LayerNorm(width)
        self.receive = nn.Linear(width, width)
        self.send = nn.Linear(width, width)
        self.relation_embedding = nn.Parameter(0.1 * torch.randn(len(relation_names), heads, features))
        self.attention = nn.Parameter(torch.randn(heads, features) * features**-0.5)
        first_gates = torch.tensor([_FIRST_GATES[name] for name in relation_names])
        self.gate = nn.Parameter(first_gates[:, None].repeat(1, heads))
        self.update = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        nodes: Tensor,
        edges: EdgeTable,
        strength: Tensor,
        mask: Tensor,
        branch_index: Tensor | None,
        *,
        return_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return updated nodes `[G, A, width]` from nodes `[V, A, width]` (or `[G, ...]` without `branch_index`).

        The second result is what each edge weighs, mean over the heads, `[G, E]`; None unless `return_weights`.
        """
        normed = self.norm(nodes)
        inputs = (
            self.receive(normed).unflatten(2, (self.heads, -1)),
            self.send(normed).unflatten(2, (self.heads, -1)),
            self.relation_embedding,
            self.attention,
            torch.tanh(self.gate),
            edges,
            strength,
            mask,
        )
        message = graph_attention(*inputs, branch_index=branch_index, implementation=self.implementation)
        weights = graph_weights(*inputs, branch_index=branch_index).mean(dim=1) if return_weights else None
        if branch_index is not None:
            nodes = nodes.index_select(0, branch_index)
        return nodes + self.dropout(self.update(message.flatten(2))), weights


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSizes:
    """Sizes around and inside of the graph."""

    cell_dim: int
    """Channels C of a cell."""
    high_dim: int
    """Width of the summary vector."""
    llm_dim: int
    """Width D of the LLM."""
    cell_grid: tuple[int, int, int] = (2, 9, 9)
    """Grid (time, rows, columns) of the cells."""
    width: int = 64
    """Features of a node."""
    heads: int = 4
    """Attention heads, of the layers and of the readout."""
    layers: int = 2
    """Relational layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphStart:
    """What the graph starts from."""

    au_embedding: Tensor | None = None
    """The LLM's embedding of each AU's FACS name, `[A, D]`; None starts from random embeddings."""
    embedding_rms: float = 1.0
    """Root mean square of the LLM's embeddings."""
    edge_strength: np.ndarray | None = None
    """First value of each edge's learned strength, `[E]` (`relations.training_statistics`); None is 0."""


class AUGraph(nn.Module):
    """R-AUGNN: texture cells and summary vector -> instruction token, auxiliary AU logits, interaction strengths.

    A node starts as its embedding, plus the cells pooled by that AU's own gaze (a learned query and a learned map over
    the face), plus a read-out of the summary vector for that AU. An edge's strength in one clip is a product of both
    end nodes' features plus a learned term; the first layer's features are computed once per view and shared by its
    branches.

    Args:
        relations: Prior over the vocabulary; it decides A and E.
        sizes: Of what comes in and goes out, and of the graph itself.
        start: First values that are not drawn; None has none.
        dropout: Dropout in the layers and before the readout.
        implementation: Implementation of `graph_attention`.
        amends: Whether the nodes are given the AU logits of the evidence and add to them, at first nothing; the answer
            is then read of the token, at first `2 tanh(evidence / 2)` and noise.

    Raises:
        UserError: `width` is not divisible by `heads`, or `layers` is below 1.
    """

    prior_mask: Tensor

    def __init__(
        self,
        relations: AURelations,
        sizes: GraphSizes,
        start: GraphStart | None = None,
        *,
        dropout: float = 0.1,
        implementation: str = "auto",
        amends: bool = False,
    ) -> None:
        """Build nodes, layers and readout for one vocabulary."""
        super().__init__()
        start = start or GraphStart()
        width, heads, layers = sizes.width, sizes.heads, sizes.layers
        cell_dim, high_dim, llm_dim = sizes.cell_dim, sizes.high_dim, sizes.llm_dim
        if heads < 1 or width % heads:
            raise UserError(f"graph width {width} with {heads} heads: allowed is a width divisible by the heads")
        if layers < 1:
            raise UserError(f"graph layers: {layers}, allowed is 1 and up")
        num_aus = len(relations.aus)
        self._edges = relations.edge_table()
        self.register_buffer("prior_mask", torch.from_numpy(relations.prior_mask.copy()), persistent=False)
        if start.au_embedding is None:
            embedding = torch.randn(num_aus, width)
        else:
            embedding = project_names(start.au_embedding, width)
        self.au_embedding = nn.Parameter(embedding)
        self.gaze_query = nn.Parameter(torch.randn(num_aus, cell_dim))
        self.gaze = nn.Parameter(first_gaze(relations.aus, sizes.cell_grid))
        self.read_cells = nn.Linear(cell_dim, width)
        self.read_high = nn.Linear(high_dim, num_aus * width)
        self.input_norm = nn.LayerNorm(width)
        self.strength_target = nn.Linear(width, width // heads, bias=False)
        self.strength_source = nn.Linear(width, width // heads, bias=False)
        first = torch.zeros(relations.num_edges)
        if start.edge_strength is not None:
            first = torch.as_tensor(start.edge_strength, dtype=torch.float32).clone()
            assert first.shape == (relations.num_edges,), first.shape
        self.edge_strength = nn.Parameter(first)
        self.layers = nn.ModuleList(
            RelationalLayer(width, heads, relations.names, dropout, implementation) for _ in range(layers)
        )

        self.output_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.read_evidence = nn.Parameter(torch.randn(width)) if amends else None
        self.au_head = nn.Parameter(torch.randn(num_aus, width) * width**-0.5)
        self.au_bias = nn.Parameter(torch.zeros(num_aus))
        self.readout_score = nn.Linear(width, heads)
        self.readout_value = nn.Linear(width, heads * width)
        # What the token says when no AU is active; the sum over nodes is then near 0.
        self.no_au = nn.Parameter(torch.randn(heads * width) * 0.02)
        self.token_norm = nn.LayerNorm(heads * width)
        self.readout = nn.Linear(heads * width, llm_dim, bias=False)
        self.scale = ScaledToken(start.embedding_rms)
        self.around = nn.Linear(num_aus, llm_dim, bias=False) if amends else None
        self.answer = TokenHead(llm_dim, num_aus, start.embedding_rms, bias=False) if amends else None
        if self.around is not None and self.answer is not None:
            self._start_from_what_is_said(self.around, self.answer)

    def _start_from_what_is_said(self, around: nn.Linear, answer: TokenHead) -> None:
        """Have the nodes add nothing at first, the token hold what they are given, and the answer read it there.

        From heads that start at 0 the answer of the structure came to f1_macro 74 to 82 where the evidence had 95, and
        cost the sum of both 1 to 3 points (docs/model.md). Columns that are orthogonal are read without each other.
        """
        llm_dim, num_aus = around.weight.shape
        with torch.no_grad():
            nn.init.orthogonal_(around.weight)
            around.weight.mul_((llm_dim / num_aus) ** 0.5)
            answer.weight.copy_(around.weight.t() * (2 * num_aus / answer.REFERENCE_WIDTH))
            self.au_head.zero_()

    @property
    def num_edges(self) -> int:
        """Number of edges E, candidates for rewiring included."""
        return self._edges.num_edges

    def edges(self) -> EdgeTable:
        """Return the edges on the device of the module."""
        device = self.prior_mask.device
        if self._edges.device != device:
            self._edges = self._edges.to(device)
        return self._edges

    def cell_attention(self, cells: Tensor) -> Tensor:
        """Return where each AU's node looks, `[V, A, N]`, for cells `[V, N, C]`."""
        scores = (cells @ self.gaze_query.to(cells.dtype).t()).transpose(1, 2) * cells.shape[2] ** -0.5
        return torch.softmax(scores + self.gaze, dim=-1)

    def _nodes(self, cells: Tensor, high: Tensor, gaze: Tensor, evidence: Tensor | None) -> Tensor:
        summary = self.read_high(high).unflatten(1, self.au_embedding.shape)
        nodes = self.au_embedding + self.read_cells(gaze.to(cells.dtype) @ cells) + summary
        if self.read_evidence is not None:
            assert evidence is not None, "this graph adds to the logits of the evidence, which are missing"
            nodes = nodes + torch.tanh(0.5 * evidence).unsqueeze(-1) * self.read_evidence
        return self.input_norm(nodes)

    def _strengths(self, nodes: Tensor, edges: EdgeTable) -> Tensor:
        target, source = self.strength_target(nodes), self.strength_source(nodes)
        pairs = target @ source.transpose(1, 2) * target.shape[2] ** -0.5
        return pairs.flatten(1).index_select(1, edges.target * edges.num_nodes + edges.source) + self.edge_strength

    def forward(
        self,
        cells: Tensor,
        high: Tensor,
        view_index: Tensor | None = None,
        edge_mask: Tensor | None = None,
        *,
        evidence: Tensor | None = None,
        return_influence: bool = False,
    ) -> GraphOutput:
        """Run the graph for every branch.

        Args:
            cells: Texture cells of the views, `[V, N, C]`.
            high: Summary vectors of the views, `[V, high_dim]`.
            view_index: View of each branch, `[G]` int64; None is one branch per view.
            edge_mask: Edges that each branch has, `[G, E]` bool; None is the prior for all.
            evidence: AU logits of the views' evidence, `[V, A]` float32, for a graph that amends them.
            return_influence: also return what each edge weighs in the last layer, for pictures.
        """
        edges, gaze = self.edges(), self.cell_attention(cells)
        nodes = self._nodes(cells, high, gaze, evidence)
        strengths = self._strengths(nodes, edges)
        if view_index is not None:
            strengths = strengths.index_select(0, view_index)
        if edge_mask is None:
            edge_mask = self.prior_mask.expand(strengths.shape[0], -1)
        influence = None
        for depth, layer in enumerate(self.layers):
            last = return_influence and depth == len(self.layers) - 1
            index = view_index if depth == 0 else None
            nodes, influence = layer(nodes, edges, strengths, edge_mask, index, return_weights=last)
        nodes = self.output_norm(nodes)
        # Logits of a few units lose too much in bfloat16.
        with torch.autocast(nodes.device.type, enabled=False):
            logits = (self.dropout(nodes).to(self.au_head.dtype) * self.au_head).sum(-1) + self.au_bias
            if evidence is not None:
                logits = logits + (evidence if view_index is None else evidence.index_select(0, view_index))
        token = self._token(self.dropout(nodes), logits)
        added = logits if self.answer is None else self.answer(token)
        return GraphOutput(token, added, strengths, influence, gaze)

    def _token(self, nodes: Tensor, logits: Tensor) -> Tensor:
        """Sum a nonlinear view of each node, weighted per head and by how active that AU is found (`logits`).

        Without the activity nearly all of the token is the same for every clip, because the AU embeddings are: 1 to 6 %
        of its variance then lies between clips, and the LLM learns to pass it over.
        """
        weights = torch.softmax(self.readout_score(nodes), dim=1) * torch.sigmoid(logits).unsqueeze(-1)
        values = F.gelu(self.readout_value(nodes)).unflatten(2, (weights.shape[2], -1))
        pooled = (weights.unsqueeze(-1) * values).sum(1).flatten(1)
        token = self.readout(self.token_norm(pooled + self.no_au))
        if self.around is not None:
            token = token + self.around(torch.tanh(0.5 * logits).to(token.dtype))
        return self.scale(token)
