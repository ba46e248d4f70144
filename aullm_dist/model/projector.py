"""MGE-EFP (ours): multi-granularity evidence becomes the content token at the scale of the LLM's embeddings.

The paper names this part and what it is for; its equations are not public, so the form here is this project's own. The
summary vector asks H questions of the texture cells; what the cells answer, their mean and the means of a fixed 3x3
grid over the face are joined with the summary, and a gated MLP takes the join to the LLM's width.

Shape letters: V clips, N cells, C channels, H heads, R regions, D LLM width.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from aullm_kernels import evidence_attention, evidence_pool
from torch import Tensor, nn

from aullm_dist.errors import UserError

Evidence = Literal["full", "mid_only", "high_only", "no_attention"]

_SIDE = 3
NUM_REGIONS = _SIDE * _SIDE


def region_index(cell_grid: tuple[int, int, int]) -> Tensor:
    """Return the region of each cell, `[N]` int64: a 3x3 grid over rows and columns, the same at all times."""
    time, rows, columns = cell_grid
    row = torch.arange(rows) * _SIDE // rows
    column = torch.arange(columns) * _SIDE // columns
    return (row[:, None] * _SIDE + column).flatten().repeat(time)


class ScaledToken(nn.Module):
    """Scale each vector to a fixed root mean square, that of the LLM's own embeddings.

    A soft token far larger than the words drowns them, a far smaller one is lost; the first norm of the LLM hides this
    from its first layer only.

    Args:
        rms: Target root mean square.
    """

    def __init__(self, rms: float) -> None:
        """Keep `rms` with the weights: a checkpoint is read back at the scale that it was trained at."""
        super().__init__()
        self.register_buffer("rms", torch.tensor(float(rms)))

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` `[..., D]`; float32 or wider."""
        x = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.rms


class EvidenceProjector(nn.Module):
    """MGE-EFP: texture cells and summary vector -> content token `[V, D]`.

    Args:
        cell_dim: Channels C of a cell.
        high_dim: Width of the summary vector.
        llm_dim: Width D of the LLM.
        cell_grid: Grid (time, rows, columns) of the cells.
        heads: Evidence heads H.
        evidence: `full`; or an ablation: `mid_only` (no summary, the questions are learned constants), `high_only`
            (no cells),
            `no_attention` (mean and region means, but no evidence heads).
        hidden: Width of the gated MLP; None takes that of the join.
        embedding_rms: Root mean square of the LLM's embeddings.
        dropout: Dropout on the join.
        implementation: Implementation of `evidence_pool`.

    Raises:
        UserError: `evidence` is unknown, or `heads` is below 1.
    """

    def __init__(
        self,
        cell_dim: int,
        high_dim: int,
        llm_dim: int,
        *,
        cell_grid: tuple[int, int, int] = (2, 9, 9),
        heads: int = 4,
        evidence: Evidence = "full",
        hidden: int | None = None,
        embedding_rms: float = 1.0,
        dropout: float = 0.1,
        implementation: str = "auto",
    ) -> None:
        """Build the parts that the chosen kinds of evidence need, and no others."""
        super().__init__()
        if evidence not in get_args(Evidence):
            raise UserError(f"evidence is {evidence!r}, allowed are {', '.join(get_args(Evidence))}")
        if heads < 1:
            raise UserError(f"evidence heads: {heads}, allowed is 1 and up")
        self.evidence = evidence
        self.implementation = implementation
        self.heads = heads if evidence in ("full", "mid_only") else 0
        self.cell_dim = cell_dim
        self.register_buffer("regions", region_index(cell_grid), persistent=False)
        self.query, self.constant_query = None, None
        if evidence == "full":
            # Outputs of the order of 1 from the normalised summary, so that the heads differ from the first step.
            self.query = nn.Linear(high_dim, heads * cell_dim)
            nn.init.normal_(self.query.weight, std=high_dim**-0.5)
        elif evidence == "mid_only":
            self.constant_query = nn.Parameter(torch.randn(heads, cell_dim))
        uses_cells, uses_high = evidence != "high_only", evidence != "mid_only"
        join_dim = (self.heads + 1 + NUM_REGIONS) * cell_dim * uses_cells + high_dim * uses_high
        hidden = hidden or join_dim
        self.norm = nn.LayerNorm(join_dim)
        self.dropout = nn.Dropout(dropout)
        self.gate_up = nn.Linear(join_dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, llm_dim, bias=False)
        self.scale = ScaledToken(embedding_rms)

    def _queries(self, high: Tensor) -> Tensor:
        if self.query is not None:
            return self.query(high).unflatten(1, (self.heads, self.cell_dim))
        if self.constant_query is not None:
            return self.constant_query.expand(high.shape[0], -1, -1)
        return high.new_zeros(high.shape[0], 0, self.cell_dim)

    def forward(self, cells: Tensor, high: Tensor, *, return_attention: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return the content token.

        Args:
            cells: Texture cells, `[V, N, C]`.
            high: Summary vector, `[V, high_dim]`.
            return_attention: also return where the evidence heads look.

        Returns:
            `[V, D]`, each row with the root mean square `embedding_rms`; with `return_attention` also `[V, H, N]`, with
            H = 0 where there are no evidence heads.
        """
        join, queries = high, self._queries(high)
        if self.evidence != "high_only":
            join = evidence_pool(
                cells,
                queries,
                self.regions,
                join=None if self.evidence == "mid_only" else high,
                num_regions=NUM_REGIONS,
                implementation=self.implementation,
            ).flatten(1)
        joined = self.dropout(self.norm(join))
        gate, up = self.gate_up(joined).chunk(2, dim=1)
        token = self.scale(self.down(F.silu(gate) * up))
        return (token, evidence_attention(cells, queries)) if return_attention else token
