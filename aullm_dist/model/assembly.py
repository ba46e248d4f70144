"""AULLM++ put together at the sizes of its backbone LLM."""

import torch
from torch import Tensor

from aullm_dist.config import Config
from aullm_dist.model.aullm import AULLM
from aullm_dist.model.graph import AUGraph
from aullm_dist.model.llm import Backbone, embedding_rms, mean_embeddings
from aullm_dist.model.projector import EvidenceProjector
from aullm_dist.model.prompt import Prompt
from aullm_dist.model.reasoner import Reasoner
from aullm_dist.model.relations import AURelations
from aullm_dist.model.visual import VisualBackbone


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
    visual = VisualBackbone(data.num_frames, data.size, dropout=model.dropout)
    scale = embedding_rms(backbone.model) if scale is None else scale
    common = {
        "cell_grid": visual.cell_grid,
        "embedding_rms": scale,
        "dropout": model.dropout,
        "implementation": model.kernels,
    }
    sizes = (visual.cell_dim, visual.feature_dim, backbone.hidden_size)
    projector = EvidenceProjector(*sizes, heads=model.evidence_heads, evidence=model.evidence, **common)
    graph = None
    if relations is not None:
        graph = AUGraph(
            relations,
            *sizes,
            width=model.graph_width,
            heads=model.graph_heads,
            layers=model.graph_layers,
            au_embedding_init=mean_embeddings(backbone.model, prompt.name_ids) if names is None else names,
            **common,
        )
    reasoner = Reasoner(
        backbone,
        prompt,
        packing=model.packing,
        suffixes_per_row=model.suffixes_per_row,
        suffix_multiple=model.suffix_multiple,
        scale=scale,
        names=names,
    )
    return AULLM(visual, projector, graph, reasoner, autocast=autocast_of(config))


def autocast_of(config: Config) -> torch.dtype | None:
    """Return the dtype of mixed precision of a run, None for none."""
    return torch.bfloat16 if config.training.precision == "bf16" else None
