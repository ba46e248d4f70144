"""From a configuration to a model, and the recipes that turn clips into its batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aullm_dist.config import Config
from aullm_dist.log import get_logger
from aullm_dist.model.assembly import assemble, autocast_of
from aullm_dist.model.aullm import Ablation, LedCnnBaseline, check_kernels
from aullm_dist.model.counterfactual import branching
from aullm_dist.model.llm import Backbone, load_backbone
from aullm_dist.model.llm_files import present_folder
from aullm_dist.model.piecewise import Placement
from aullm_dist.model.prompt import build_prompt
from aullm_dist.model.relations import AURelations, build_relations, sample_structure_edit
from aullm_dist.model.visual import LedCnn
from aullm_dist.training import engine_state
from aullm_dist.training.base_identity import base_identity
from aullm_dist.training.batches import ClipRecipe

logger = get_logger(__name__)

_TOPICS = {"lora": "LoRA"}


@dataclass(slots=True)
class BuiltModel:
    """A model and what the trainer must know of it.

    Attributes:
        model: `AULLM` or `LedCnnBaseline`; on the CPU, but for an LLM that was loaded onto its device.
        model_config: what defines its function; stored in checkpoints and compared at resume.
        base: identity of the LLM; None for the baseline.
        relations: the AU graph's edges; None without a graph.
        soft_tokens: kinds of soft tokens that the LLM is given.
        tokens: LLM tokens computed for a number of branches.
        quantized_modules: linear layers of the plain LLM that hold 4-bit weights.
    """

    model: nn.Module
    model_config: dict[str, Any]
    base: Mapping[str, Any] | None = None
    relations: AURelations | None = None
    soft_tokens: tuple[Ablation, ...] = ()
    tokens: Callable[[int], int] = field(default=lambda branches: 0)
    quantized_modules: tuple[str, ...] = ()


def build_model(
    config: Config, aus: tuple[int, ...], llm_path: str | Path, placement: Placement | None = None
) -> BuiltModel:
    """Build the model of a run with weights drawn from `training.seed`.

    Args:
        config: the run's configuration.
        aus: AU numbers in the order of the head's units.
        llm_path: folder or Hugging Face name of the backbone; ignored for `llm: none`.
        placement: how several processes share the backbone while it loads; None for one process.

    Raises:
        UserError: the backbone cannot be loaded or the sizes do not fit.
    """
    check_kernels(config.model.kernels)
    torch.manual_seed(config.training.seed)
    data, model = config.data, config.model
    visual_config = {"aus": list(aus), "num_frames": data.num_frames, "image_size": data.size}
    if model.llm == "none":
        network = LedCnn(len(aus), data.num_frames, data.size, dropout=model.dropout)
        return BuiltModel(LedCnnBaseline(network, autocast=autocast_of(config)), {**visual_config, "kind": "led_cnn"})
    backbone = _load_backbone(config, llm_path, placement)
    # Once more: how much loading draws depends on how it is done.
    torch.manual_seed(config.training.seed)
    prompt = build_prompt(aus, backbone.tokenizer, readout=model.readout, use_structure=model.structure)
    logger.info(
        "Prompt: %d prefix tokens shared by all branches, %d per branch", prompt.prefix_tokens, prompt.suffix_tokens
    )
    relations = build_relations(aus) if model.structure else None
    # Scale and first values of what meets the LLM are taken from its embeddings.
    with engine_state.gathered(backbone.model.get_input_embeddings().parameters()):
        network = assemble(config, backbone, prompt, relations)
    model_config = {
        **visual_config,
        "kind": "aullm",
        # The same LLM in 4 bits is another function, which an adapter trained beside the other does not fit.
        "quantization": model.quantization,
        "prompt": prompt.text,
        "readout": model.readout,
        "evidence": model.evidence,
        "evidence_heads": model.evidence_heads,
        "structure": model.structure,
        "graph": [model.graph_width, model.graph_heads, model.graph_layers] if model.structure else None,
        # Types and prior are no parameters: without them a changed prior would load as another function in silence.
        "relations": relations.describe() if relations else None,
    }
    return BuiltModel(
        network,
        model_config,
        base_identity(str(llm_path), backbone.config.to_dict(), present_folder(llm_path)),
        relations,
        ("content", "instruction") if relations else ("content",),
        network.reasoner.num_tokens,
        backbone.quantized_modules,
    )


def _load_backbone(config: Config, llm_path: str | Path, placement: Placement | None) -> Backbone:
    model = config.model
    backbone = load_backbone(
        llm_path,
        dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        attention=model.attention,
        packing=model.packing,
        trust_remote_code=model.trust_remote_code,
        lora_rank=model.lora_rank,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        lora_targets=model.lora_targets[0] if model.lora_targets == ["all-linear"] else model.lora_targets,
        quantization=model.quantization,
        activation_checkpointing=model.activation_checkpointing,
        compilation=model.compile,
        static_lengths=model.suffix_multiple > 1,
        seed=config.training.seed,
        placement=placement,
    )
    for topic, reason in backbone.reasons.items():
        logger.info("%s: %s", _TOPICS.get(topic, topic.replace("_", " ").capitalize()), reason)
    return backbone


def training_recipe(config: Config, built: BuiltModel) -> ClipRecipe:
    """Return how training clips become tensors, interventions included, and say which are on."""
    data, counterfactual, relations = config.data, config.counterfactual, built.relations
    chances, crossed = branching(config, has_graph=relations is not None)
    possible = chances.names if chances.branches else ()
    if possible:
        logger.info(
            "CCR: %d per clip of %s; crossed pairs %s",
            chances.branches,
            ", ".join(possible),
            "with each neutral twin" if crossed else "off (they need the graph, a neutral twin and a weight)",
        )
    else:
        logger.info("CCR: off")
    return ClipRecipe(
        num_frames=data.num_frames,
        cut_fraction=data.cut_fraction if data.augment else 0.0,
        augment=data.augment,
        chances=chances,
        prior_mask=relations.prior_mask if relations else None,
        edit_structure=partial(sample_structure_edit, relations, counterfactual.structure_edges) if relations else None,
        contradiction=crossed,
        seed=config.training.seed,
    )


def evaluation_recipe(config: Config, built: BuiltModel) -> ClipRecipe:
    """Return how held-out clips become tensors: whole, unaltered, factual only."""
    prior_mask = built.relations.prior_mask if built.relations else None
    return ClipRecipe(num_frames=config.data.num_frames, prior_mask=prior_mask)
