"""Builds AULLM++ at the sizes of its backbone LLM."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from aullm_dist.config import Config
from aullm_dist.llm.backbone import Backbone, embedding_rms, mean_embeddings
from aullm_dist.llm.identity import BaseIdentity
from aullm_dist.model.aullm import AULLM, Ablation, Stage
from aullm_dist.model.graph import AUGraph, GraphSizes, GraphStart
from aullm_dist.model.projector import EvidenceProjector
from aullm_dist.model.prompt import Prompt
from aullm_dist.model.reasoner import Reasoner
from aullm_dist.model.relations import AURelations
from aullm_dist.model.visual import VisualBackbone


@dataclass(slots=True)
class BuiltModel:
    """A model and what the trainer must know of it.

    Attributes:
        model: `AULLM` or `NetworkAlone`; on the CPU, but for an LLM that was loaded onto its device.
        model_config: what defines its function; stored in checkpoints and compared at resume.
        base: identity of the LLM; None for the baseline.
        relations: the AU graph's edges; None without a graph.
        soft_tokens: kinds of soft tokens that the LLM is given.
        stages: stages before the last whose answers a forward pass gives as well.
        tokens: LLM tokens computed for a number of branches.
        quantized_modules: linear layers of the plain LLM that hold 4-bit weights.
    """

    model: nn.Module
    model_config: dict[str, Any]
    base: BaseIdentity | None = None
    relations: AURelations | None = None
    soft_tokens: tuple[Ablation, ...] = ()
    stages: tuple[Stage, ...] = ()
    tokens: Callable[[int], int] = field(default=lambda branches: 0)
    quantized_modules: tuple[str, ...] = ()


def assemble(
    config: Config,
    backbone: Backbone,
    prompt: Prompt,
    relations: AURelations | None,
    *,
    scale: float | None = None,
    names: Tensor | None = None,
) -> AULLM:
    """Put visual backbone, projector, graph and reasoner together.

    Args:
        config: the run's configuration.
        backbone: the LLM.
        prompt: built with its tokenizer.
        relations: the AU graph's edges; None leaves the graph out.
        scale: root mean square of the LLM's embeddings; None takes it from the weights.
        names: the LLM's mean embeddings of the AUs' names, [A, D]; None takes them from the weights.
    """
    data, model = config.data, config.model
    visual = VisualBackbone(data.num_frames, data.size, dropout=model.dropout, visual=model.visual)
    scale = embedding_rms(backbone.model) if scale is None else scale
    stages = model.answer == "stages"
    projector = EvidenceProjector(
        visual.cell_dim,
        visual.feature_dim,
        backbone.hidden_size,
        embedding_rms=scale,
        num_aus=len(prompt.aus) if stages else None,
        cell_grid=visual.cell_grid,
        heads=model.evidence_heads,
        evidence=model.evidence,
        dropout=model.dropout,
        implementation=model.kernels,
    )
    graph = None
    if relations is not None:
        graph = AUGraph(
            relations,
            GraphSizes(
                cell_dim=visual.cell_dim,
                high_dim=visual.feature_dim,
                llm_dim=backbone.hidden_size,
                cell_grid=visual.cell_grid,
                width=model.graph_width,
                heads=model.graph_heads,
                layers=model.graph_layers,
            ),
            GraphStart(
                au_embedding=mean_embeddings(backbone.model, prompt.name_ids) if names is None else names,
                embedding_rms=scale,
            ),
            dropout=model.dropout,
            implementation=model.kernels,
            amends=stages,
        )
    reasoner = Reasoner(
        backbone,
        prompt,
        packing=model.packing,
        suffixes_per_row=model.suffixes_per_row,
        suffix_multiple=model.suffix_multiple,
        scale=scale,
        names=names,
        amends=stages,
    )
    return AULLM(visual, projector, graph, reasoner, autocast=autocast_of(config))


def autocast_of(config: Config) -> torch.dtype | None:
    """Return the dtype of mixed precision of a run, None for none."""
    return torch.bfloat16 if config.training.precision == "bf16" else None
