"""Builds a model from a configuration, and the recipes that turn clips into its batches."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aullm_dist.checkpoint.base_identity import base_identity
from aullm_dist.config import UNSAID, Config, function_settings
from aullm_dist.distributed import engine_state
from aullm_dist.llm.backbone import Backbone, BackboneOptions, embedding_rms, load_backbone, mean_embeddings
from aullm_dist.llm.files import present_folder
from aullm_dist.llm.pieces.placement import Placement
from aullm_dist.log import get_logger
from aullm_dist.model.assembly import BuiltModel, assemble, autocast_of
from aullm_dist.model.aullm import Stage, check_kernels
from aullm_dist.model.counterfactual import branching
from aullm_dist.model.networks import NetworkAlone, build_network, stream_of
from aullm_dist.model.prompt import Prompt, build_prompt
from aullm_dist.model.relations import build_relations, sample_structure_edit
from aullm_dist.training.batches import ClipRecipe

logger = get_logger(__name__)

_TOPICS = {"lora": "LoRA"}


@dataclass(slots=True)
class SharedLLM:
    """An LLM that `build_model` loads once and builds the models of several runs on, one of them in use at a time.

    LoRA is part of it, with the first values of the run that loaded it (`llm.lora.lora_values` gives those of others).
    """

    backbone: Backbone | None = None
    """None before it is loaded."""
    scale: float = 0.0
    """Root mean square of its embeddings."""
    names: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    """Its mean embeddings of the AUs' names, by AUs."""
    prompts: set[str] = field(default_factory=set)
    """Prompts that were built for it."""


def build_model(
    config: Config,
    aus: tuple[int, ...],
    llm_path: str | Path,
    placement: Placement | None = None,
    *,
    device: torch.device | None = None,
    llm: SharedLLM | None = None,
) -> BuiltModel:
    """Build the model of a run with weights drawn from `training.seed`.

    Args:
        config: the run's configuration.
        aus: AU numbers in the order of the head's units.
        llm_path: folder or Hugging Face name of the backbone; ignored for `llm: none`.
        placement: how several processes share the backbone while it loads; None for one process.
        device: where one process puts an NF4 backbone at once; None takes the current GPU, if there is one.
        llm: shared with other runs. The processes need each other to load it, and for AUs that are new to it.

    Raises:
        UserError: the backbone cannot be loaded or the sizes do not fit.
    """
    check_kernels(config.model.kernels)
    torch.manual_seed(config.training.seed)
    model = config.model
    model_config: dict[str, Any] = {"aus": list(aus), **function_settings(config)}
    if model.llm == "none":
        network = build_network(config, len(aus))
        # Checkpoints of the LED stream, older ones among them, do not name it.
        stream = stream_of(network)
        described = {"kind": model.network, **model_config, **({} if stream == "led" else {"visual": stream})}
        if model.network == "evidence":
            described |= {"evidence": model.evidence, "evidence_heads": model.evidence_heads}
        return BuiltModel(NetworkAlone(network, autocast=autocast_of(config)), described)
    model_config["kind"] = "aullm"
    # Nor do those say how they answer that were written before there were stages.
    for key, before in UNSAID.items():
        if model_config[key] == before:
            del model_config[key]
    llm = SharedLLM() if llm is None else llm
    if llm.backbone is None:
        llm.backbone = _load_backbone(config, llm_path, placement, device)
    backbone = llm.backbone
    # Once more: how much loading draws depends on how it is done.
    torch.manual_seed(config.training.seed)
    prompt = build_prompt(aus, backbone.tokenizer, readout=model.readout, use_structure=model.structure)
    if prompt.text not in llm.prompts:
        llm.prompts.add(prompt.text)
        logger.info(
            "Prompt: %d prefix tokens shared by all branches, %d per branch", prompt.prefix_tokens, prompt.suffix_tokens
        )
    relations = build_relations(aus) if model.structure else None
    _measure(llm, backbone, prompt)
    network = assemble(config, backbone, prompt, relations, scale=llm.scale, names=llm.names[prompt.aus])
    # Types and prior are no parameters: without them a changed prior would load as another function silently.
    model_config |= {"prompt": prompt.text, "relations": relations.describe() if relations else None}
    if relations is None:
        model_config["graph"] = None
    return BuiltModel(
        network,
        model_config,
        base_identity(str(llm_path), backbone.config.to_dict(), present_folder(llm_path)),
        relations,
        ("content", "instruction") if relations else ("content",),
        _stages_of(config),
        network.reasoner.num_tokens,
        backbone.quantized_modules,
    )


def _measure(llm: SharedLLM, backbone: Backbone, prompt: Prompt) -> None:
    """Take scale and first values of what meets the LLM from its embeddings, once: engines have to gather them."""
    if prompt.aus in llm.names:
        return
    model: Any = backbone.model
    with engine_state.gathered(model.get_input_embeddings().parameters()):
        llm.scale = llm.scale or embedding_rms(model)
        llm.names[prompt.aus] = mean_embeddings(model, prompt.name_ids)


def _stages_of(config: Config) -> tuple[Stage, ...]:
    if config.model.answer == "deduction":
        return ()
    return ("evidence", "structure") if config.model.structure else ("evidence",)


def _load_backbone(
    config: Config, llm_path: str | Path, placement: Placement | None, device: torch.device | None
) -> Backbone:
    model = config.model
    backbone = load_backbone(
        llm_path,
        BackboneOptions(
            dtype=torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
            attention=model.attention,
            packing=model.packing,
            trust_remote_code=model.trust_remote_code,
            lora_rank=model.lora_rank,
            lora_alpha=model.lora_alpha,
            lora_dropout=model.lora_dropout,
            lora_targets=model.lora_targets[0] if model.lora_targets == ("all-linear",) else model.lora_targets,
            quantization=model.quantization,
            activation_checkpointing=model.activation_checkpointing,
            compilation=model.compile,
            static_lengths=model.suffix_multiple > 1,
            device=device,
            seed=config.training.seed,
        ),
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
        neutral_share=data.neutral_share,
        chances=chances,
        prior_mask=relations.prior_mask if relations else None,
        edit_structure=partial(sample_structure_edit, relations, counterfactual.structure_edges) if relations else None,
        contradiction=crossed,
        seed=config.training.seed,
        visual=stream_of(built.model),
    )


def evaluation_recipe(config: Config, built: BuiltModel) -> ClipRecipe:
    """Return how held-out clips become tensors: whole, unaltered, factual only."""
    prior_mask = built.relations.prior_mask if built.relations else None
    return ClipRecipe(num_frames=config.data.num_frames, prior_mask=prior_mask, visual=stream_of(built.model))
