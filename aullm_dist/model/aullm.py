"""AULLM++ assembled: evidence construction, structure modelling, deduction; and the same seam without an LLM.

Shapes: B clips, V views (clips and their counterfactual twins), G structures (a view with an edge mask), K branches (a
content token paired with an instruction token), A action units, E edges, D LLM width.
"""

from typing import Literal, NamedTuple

import torch
from aullm_kernels import resolve
from torch import Tensor, nn

from aullm_dist.errors import UserError
from aullm_dist.model.graph import AUGraph
from aullm_dist.model.projector import EvidenceProjector
from aullm_dist.model.reasoner import Reasoner
from aullm_dist.model.visual import LedCnn, VisualBackbone

Ablation = Literal["content", "instruction"]


class ModelOutput(NamedTuple):
    """What one forward pass gives; a tuple, because DeepSpeed finds tensors in tuples but not in our dataclasses.

    Attributes:
        logits: `[K, A]` fp32, one row per branch.
        graph_logits: `[G, A]` auxiliary logits of the AU graph's nodes; None without a graph.
    """

    logits: Tensor
    graph_logits: Tensor | None = None


class Explanation(NamedTuple):
    """What the model made of each clip on its way to the answer, for pictures and features; float32.

    Without an LLM only `logits` and `high` are there, without a graph neither `instruction`, `gaze`, `strengths` nor
    `influence`.

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
    """AULLM++: LED and 3D-CNN, MGE-EFP, R-AUGNN, structured prompt, frozen LLM with LoRA, AU head.

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
            views: `[V, T, H, W]` gray clips in 0..1.
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
            views: `[V, T, H, W]` gray clips in 0..1.
            edge_mask: `[V, E]` edges present in each clip's structure; None is the prior's for all.
        """
        index = torch.arange(len(views), device=views.device)
        with mixed_precision(views.device, self.autocast), torch.no_grad():
            cells, high = self.visual(views)
            content, evidence = self.projector(cells, high, return_attention=True)
            structure = None
            if self.graph is not None:
                structure = self.graph(cells, high, None, edge_mask, return_influence=True)
            instruction = structure.token if structure else None
            branches = index[:, None].expand(-1, 2)
            logits, hidden = self.reasoner(content, instruction, branches, return_hidden=True)
        graph = () if structure is None else (structure.gaze, structure.strengths, structure.influence)
        parts = (logits, high, content, instruction, hidden, evidence, *graph)
        return Explanation(*(part if part is None else part.float() for part in parts))

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
        content = self.projector(cells, high)
        instruction, graph_logits = None, None
        if self.graph is not None:
            structure = self.graph(cells, high, view_index, edge_mask)
            instruction, graph_logits = structure.token, structure.logits
        if ablate == "content":
            content = torch.zeros_like(content)
        elif ablate == "instruction" and instruction is not None:
            instruction = torch.zeros_like(instruction)
        return ModelOutput(self.reasoner(content, instruction, branches), graph_logits)


class LedCnnBaseline(nn.Module):
    """The no-LLM baseline `led_cnn` behind the same call: visual backbone and a linear head."""

    adapter_prefix = ""
    graph = None

    def __init__(self, network: LedCnn, *, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast = autocast
        self.network = network

    def peft_model(self) -> None:
        """There is no LLM, hence no adapter."""
        return None

    def forward(
        self,
        views: Tensor,
        view_index: Tensor,
        edge_mask: Tensor | None,
        branches: Tensor,
        ablate: Ablation | None = None,
    ) -> ModelOutput:
        """Answer every branch from its view alone; arguments as in `AULLM.forward`."""
        with mixed_precision(views.device, self.autocast):
            return ModelOutput(self.network(views)[branches[:, 0]].float())

    def explain(self, views: Tensor, edge_mask: Tensor | None = None) -> Explanation:
        """Answer each clip and return its summary vector; arguments as in `AULLM.explain`."""
        with mixed_precision(views.device, self.autocast), torch.no_grad():
            _, high = self.network.visual(views)
            return Explanation(self.network.head(high).float(), high.float())
