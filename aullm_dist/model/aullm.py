"""Implements AULLM++ as a whole: evidence construction, structure modelling, deduction.

Shapes: B clips, V views (clips and their counterfactual twins), G structures (a view with an edge mask), K branches (a
content token paired with an instruction token), A action units, E edges, D LLM width.
"""

from typing import Literal, NamedTuple

import torch
from aullm_kernels import resolve
from torch import Tensor, nn

from aullm_dist.data.views import Visual
from aullm_dist.errors import UserError
from aullm_dist.model.graph import AUGraph
from aullm_dist.model.projector import EvidenceProjector
from aullm_dist.model.reasoner import Reasoner
from aullm_dist.model.visual import VisualBackbone

Ablation = Literal["content", "instruction"]
Stage = Literal["evidence", "structure"]


class ModelOutput(NamedTuple):
    """What one forward pass gives; a tuple, because DeepSpeed finds tensors in tuples but not in our dataclasses.

    Attributes:
        logits: `[K, A]` fp32, one row per branch: the answer.
        graph_logits: `[G, A]` of the AU graph's nodes, in an answer in stages of evidence and nodes; None without a
            graph.
        evidence_logits: `[V, A]` of the evidence alone; None unless the answer is in stages.
    """

    logits: Tensor
    graph_logits: Tensor | None = None
    evidence_logits: Tensor | None = None

    def stage(self, stage: Stage, views: Tensor, structures: Tensor) -> Tensor:
        """Return the answer `[n, A]` of an earlier stage to branches of these views and structures, each `[n]`."""
        given, rows = (self.evidence_logits, views) if stage == "evidence" else (self.graph_logits, structures)
        assert given is not None, f"this answer has no stage {stage}"
        return given[rows]


class Explanation(NamedTuple):
    """What the model made of each clip on its way to the answer, for pictures and features; float32.

    Without an LLM only `logits` and `high` are there, without a graph neither `instruction`, `gaze`, `strengths`,
    `influence` nor `structure_logits`, and without an answer in stages no logits but the answer.

    Attributes:
        logits: `[V, A]`, the answer.
        high: `[V, F]`, the visual backbone's summary vector.
        content: `[V, D]`, content token.
        instruction: `[V, D]`, instruction token.
        hidden: `[V, D]`, the LLM's final hidden state that is read out (`per_au`: the mean of them).
        evidence: `[V, H, N]`, where the evidence heads look; cells in the order of `visual.cell_grid`, time first.
        gaze: `[V, A, N]`, where each AU's node looks.
        strengths: `[V, E]`, interaction strengths of the graph's edges.
        influence: `[V, E]`, what each edge weighs in the last layer, signed.
        evidence_logits: `[V, A]`, the answer of the evidence alone.
        structure_logits: `[V, A]`, the answer of evidence and structure, to which the deduction adds.
    """

    logits: Tensor
    high: Tensor
    content: Tensor | None = None
    instruction: Tensor | None = None
    hidden: Tensor | None = None
    evidence: Tensor | None = None
    gaze: Tensor | None = None
    strengths: Tensor | None = None
    influence: Tensor | None = None
    evidence_logits: Tensor | None = None
    structure_logits: Tensor | None = None


def mixed_precision(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Return the autocast region of a forward pass on `device`; None computes in the dtype of the parameters.

    It is part of the model and not of the trainer, so that every engine and an evaluation outside any engine compute
    the same function.
    """
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def check_kernels(requested: str) -> None:
    """Refuse an implementation of the kernels that cannot run, before anything is trained.

    Raises:
        UserError: `requested`, or the environment variable where that is `auto`, names none of this version's.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op in ("evidence_pool", "graph_attention"):
        try:
            resolve(op, requested, device)
        except ValueError as error:
            raise UserError(f"kernels: {error}") from error


class AULLM(nn.Module):
    """AULLM++: visual backbone, MGE-EFP, R-AUGNN, structured prompt, frozen LLM with LoRA, AU head.

    Args:
        visual: the visual backbone.
        projector: MGE-EFP, which makes the content token.
        graph: R-AUGNN, which makes the instruction token; None leaves it out (ablation).
        reasoner: prompt, LLM and read-out.
        autocast: dtype of mixed precision, None for none.
    """

    adapter_prefix = "reasoner.llm"

    def __init__(
        self,
        visual: VisualBackbone,
        projector: EvidenceProjector,
        graph: AUGraph | None,
        reasoner: Reasoner,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.autocast = autocast
        self.visual = visual
        self.projector = projector
        self.graph = graph
        self.reasoner = reasoner

    @property
    def stream(self) -> Visual:
        """What the views hold."""
        return self.visual.stream

    def peft_model(self) -> nn.Module:
        """Return the PEFT-wrapped LLM, whose adapter is saved for stock PEFT."""
        return self.reasoner.llm

    def forward(
        self,
        views: Tensor,
        view_index: Tensor,
        edge_mask: Tensor | None,
        branches: Tensor,
        ablate: Ablation | None = None,
    ) -> ModelOutput:
        """Answer every branch.

        Args:
            views: `[V, C, H, W]` what `data.views.view_of` makes of clips for the model's visual stream.
            view_index: `[G]` the view that each structure is built on.
            edge_mask: `[G, E]` edges present in each structure, or None without a graph.
            branches: `[K, 2]` (view, structure) of each branch.
            ablate: replaces all content or all instruction tokens by zeros, to measure what the answer owes to them.
        """
        with mixed_precision(views.device, self.autocast):
            return self._answer(views, view_index, edge_mask, branches, ablate)

    def explain(self, views: Tensor, edge_mask: Tensor | None = None) -> Explanation:
        """Answer each clip and return what led there; in evaluation mode, without gradients.

        Args:
            views: `[V, C, H, W]` what `data.views.view_of` makes of clips for the model's visual stream.
            edge_mask: `[V, E]` edges present in each clip's structure; None is the prior's for all.
        """
        index = torch.arange(len(views), device=views.device)
        with mixed_precision(views.device, self.autocast), torch.no_grad():
            cells, high = self.visual(views)
            evidence = self.projector(cells, high, return_attention=True)
            structure, said, earlier = None, evidence.logits, [evidence.logits, None]
            if self.graph is not None:
                structure = self.graph(cells, high, None, edge_mask, evidence=said, return_influence=True)
                said = earlier[1] = said if said is None else said + structure.logits
            instruction = structure.token if structure else None
            branches = index[:, None].expand(-1, 2)
            logits, hidden = self.reasoner(evidence.token, instruction, branches, return_hidden=True)
            logits = logits if said is None else said + logits
        graph = (None, None, None) if structure is None else (structure.gaze, structure.strengths, structure.influence)
        parts = (logits, high, evidence.token, instruction, hidden, evidence.attention, *graph, *earlier)
        return Explanation._make(part if part is None else part.float() for part in parts)

    def self_check(self) -> float:
        """Compare packed with padded branches on the real backbone, in the precision of the run."""
        with mixed_precision(self.reasoner.static_ids.device, self.autocast):
            return self.reasoner.self_check()

    def _answer(
        self,
        views: Tensor,
        view_index: Tensor,
        edge_mask: Tensor | None,
        branches: Tensor,
        ablate: Ablation | None,
    ) -> ModelOutput:
        cells, high = self.visual(views)
        evidence = self.projector(cells, high)
        content, said = evidence.token, evidence.logits
        # The logits of a stage are read of its token, and go with it, also to the graph, which is given them.
        if ablate == "content":
            content = torch.zeros_like(content)
            if self.projector.au_head is not None:
                said = self.projector.au_head(content)
        instruction, graph_logits = None, None
        if self.graph is not None:
            structure = self.graph(cells, high, view_index, edge_mask, evidence=said)
            instruction, graph_logits = structure.token, structure.logits
        if ablate == "instruction" and instruction is not None:
            instruction = torch.zeros_like(instruction)
            if said is not None and graph_logits is not None:
                graph_logits = torch.zeros_like(graph_logits)
        logits = self.reasoner(content, instruction, branches)
        if said is None:
            return ModelOutput(logits, graph_logits)
        # Each stage adds to what the one before it says.
        logits = logits + said[branches[:, 0]]
        if graph_logits is not None:
            logits = logits + graph_logits[branches[:, 1]]
            graph_logits = graph_logits + said[view_index]
        return ModelOutput(logits, graph_logits, said)
