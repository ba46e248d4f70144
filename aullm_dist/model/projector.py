"""Implements MGE-EFP (ours): multi-granularity evidence becomes the content token at the scale of the LLM's embeddings.

The paper names this part and what it is for; its equations are not public, so the form here is this project's own. The
summary vector asks H questions of the texture cells; what the cells answer, their mean and the means of a fixed 3x3
grid over the face are joined with the summary, and a gated MLP takes the join to the LLM's width. With an answer in
stages the join also reaches the token by a linear map, and a linear head reads the token: the first answer, to which
the later stages add.

Shape letters: V clips, N cells, C channels, H heads, R regions, J join width, A action units, D LLM width.
"""

from typing import Any, Literal, NamedTuple, get_args

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

    rms: Tensor

    def __init__(self, rms: float) -> None:
        """Keep `rms` with the weights: a checkpoint is read back at the scale that it was trained at."""
        super().__init__()
        self.register_buffer("rms", torch.tensor(float(rms)))

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` `[..., D]`; float32 or wider."""
        x = x if x.dtype == torch.float64 else x.float()
        return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.rms


class TokenHead(nn.Linear):
    """A linear head over the AUs on a soft token, `[..., D]` -> `[..., A]` float32; of a zero token the bias or 0.

    It reads the token at a scale that falls with the width: a step of AdamW then moves the logits as far in a wide LLM
    as in a narrow one.

    Args:
        llm_dim: Width D of the LLM.
        num_aus: Number of action units A.
        rms: Root mean square of a token.
        bias: Whether an AU has logits of its own without a token.
    """

    REFERENCE_WIDTH = 128

    def __init__(self, llm_dim: int, num_aus: int, rms: float, *, bias: bool = True) -> None:
        super().__init__(llm_dim, num_aus, bias=bias)
        self.gain = self.REFERENCE_WIDTH / (rms * llm_dim)

    def forward(self, token: Tensor) -> Tensor:
        """Return the logits of soft tokens."""
        # Logits of a few units lose too much in bfloat16.
        with torch.autocast(token.device.type, enabled=False):
            return super().forward(token.to(self.weight.dtype) * self.gain)


class EvidenceOutput(NamedTuple):
    """What the evidence says of each view.

    Attributes:
        token: content token, `[V, D]`, each row with the root mean square `embedding_rms`.
        logits: AU logits that the head reads of the token, `[V, A]` float32; None where the projector has no head.
        attention: where the evidence heads look, `[V, H, N]`, H = 0 where there are none. Only on request.
    """

    token: Tensor
    logits: Tensor | None
    attention: Tensor | None = None


class EvidenceJoin(nn.Module):
    """The join of MGE-EFP: texture cells and summary vector -> `[V, J]`.

    Args:
        cell_dim: Channels C of a cell.
        high_dim: Width of the summary vector.
        cell_grid: Grid (time, rows, columns) of the cells.
        heads: Evidence heads H.
        evidence: `full`; or an ablation: `mid_only` (no summary, the questions are learned constants), `high_only`
            (no cells), `no_attention` (mean and region means, but no evidence heads).
        dropout: Dropout on the join.
        implementation: Implementation of `evidence_pool`.

    Raises:
        UserError: `evidence` is unknown, or `heads` is below 1.
    """

    regions: Tensor

    def __init__(
        self,
        cell_dim: int,
        high_dim: int,
        *,
        cell_grid: tuple[int, int, int] = (2, 9, 9),
        heads: int = 4,
        evidence: Evidence = "full",
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
        self.join_dim = (self.heads + 1 + NUM_REGIONS) * cell_dim * uses_cells + high_dim * uses_high
        self.norm = nn.LayerNorm(self.join_dim)
        self.dropout = nn.Dropout(dropout)

    def queries(self, high: Tensor) -> Tensor:
        """Return the questions `[V, H, C]` that summary vectors `[V, high_dim]` ask of the cells."""
        if self.query is not None:
            return self.query(high).unflatten(1, (self.heads, self.cell_dim))
        if self.constant_query is not None:
            return self.constant_query.expand(high.shape[0], -1, -1)
        return high.new_zeros(high.shape[0], 0, self.cell_dim)

    def join(self, cells: Tensor, high: Tensor, queries: Tensor) -> Tensor:
        """Return the normalised join `[V, J]` of cells `[V, N, C]`, summary `[V, high_dim]` and questions."""
        join = high
        if self.evidence != "high_only":
            join = evidence_pool(
                cells,
                queries,
                self.regions,
                join=None if self.evidence == "mid_only" else high,
                num_regions=NUM_REGIONS,
                implementation=self.implementation,
            ).flatten(1)
        return self.dropout(self.norm(join))

    def forward(self, cells: Tensor, high: Tensor) -> Tensor:
        """Return the join `[V, J]`, for a head of its own (the baseline `evidence`)."""
        return self.join(cells, high, self.queries(high))


class EvidenceProjector(EvidenceJoin):
    """MGE-EFP: texture cells and summary vector -> content token `[V, D]`, and AU logits `[V, A]` on request.

    Args:
        cell_dim: Channels C of a cell.
        high_dim: Width of the summary vector.
        llm_dim: Width D of the LLM.
        num_aus: Number of action units A, for a linear head on the token; None builds no head.
        hidden: Width of the gated MLP; None takes that of the join.
        embedding_rms: Root mean square of the LLM's embeddings.
        options: Those of `EvidenceJoin`.

    Raises:
        UserError: as `EvidenceJoin`.
    """

    def __init__(
        self,
        cell_dim: int,
        high_dim: int,
        llm_dim: int,
        *,
        num_aus: int | None = None,
        hidden: int | None = None,
        embedding_rms: float = 1.0,
        **options: Any,
    ) -> None:
        """Build join, gated MLP and head."""
        super().__init__(cell_dim, high_dim, **options)
        hidden = hidden or self.join_dim
        self.gate_up = nn.Linear(self.join_dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, llm_dim, bias=False)
        self.scale = ScaledToken(embedding_rms)
        # What a head can read of the join it can read of the token then: the gated MLP alone loses much of it.
        self.around = None if num_aus is None else nn.Linear(self.join_dim, llm_dim, bias=False)
        self.au_head = None if num_aus is None else TokenHead(llm_dim, num_aus, embedding_rms)

    def forward(  # type: ignore[override]  # modules are called by their class, never as an EvidenceJoin
        self, cells: Tensor, high: Tensor, *, return_attention: bool = False
    ) -> EvidenceOutput:
        """Return the content token and, where there is a head, the answer of the evidence alone.

        Args:
            cells: Texture cells, `[V, N, C]`.
            high: Summary vector, `[V, high_dim]`.
            return_attention: also return where the evidence heads look.
        """
        queries = self.queries(high)
        joined = self.join(cells, high, queries)
        gate, up = self.gate_up(joined).chunk(2, dim=1)
        token = self.down(F.silu(gate) * up)
        if self.around is not None:
            token = token + self.around(joined)
        token = self.scale(token)
        logits = None if self.au_head is None else self.au_head(token)
        return EvidenceOutput(token, logits, evidence_attention(cells, queries) if return_attention else None)
