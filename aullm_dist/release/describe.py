"""config.json of a release: what must be known to build its model, and to use it."""

import json
from typing import Any

from aullm_dist.model.prompt import Prompt
from aullm_dist.release.layout import Format
from aullm_dist.release.origin import Origin
from aullm_dist.training.checkpoint import MODULES_CONFIG_FILE

# What decides the function and the shapes; how it is computed, and where the LLM is, are for whoever loads it.
_SETTINGS = (
    "quantization",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "readout",
    "packing",
    "suffixes_per_row",
    "evidence",
    "evidence_heads",
    "structure",
    "graph_width",
    "graph_heads",
    "graph_layers",
)


def describe(origin: Origin, prompt: Prompt, format: Format) -> dict[str, Any]:
    """Return the contents of config.json.

    Args:
        origin: the checkpoint.
        prompt: built with the tokenizer of its LLM.
        format: of the release.
    """
    config, thresholds = origin.config, origin.thresholds
    function = json.loads((origin.folder / MODULES_CONFIG_FILE).read_bytes())
    settings = {key: getattr(config.model, key) for key in _SETTINGS}
    if format == "merged":
        settings["quantization"] = "none"
        function["quantization"] = "none"
    shape = {"num_frames": config.data.num_frames, "size": config.data.size}
    return {
        "model_type": "aullm",
        "architectures": ["AULLMModel"],
        "format": format,
        "aus": list(origin.aus),
        "thresholds": {f"AU{au}": thresholds.values[au] for au in origin.aus},
        "threshold_policy": thresholds.policy,
        "preprocessing": {**shape, "crop": origin.preparation.crop},
        "corpora": list(origin.preparation.corpora),
        "prompt": prompt_facts(prompt),
        "base": origin.manifest["base"],
        "function": function,
        "settings": {
            "model": settings,
            "data": {**shape, "crops": list(config.data.crops)},
            "training": {"precision": config.training.precision},
        },
    }


def prompt_facts(prompt: Prompt) -> dict[str, Any]:
    """Return the prompt as a release records it: for people, and as the token ids that the model was trained with."""
    return {
        "text": prompt.text,
        "prefix_ids": list(prompt.prefix_ids),
        "structure_ids": list(prompt.structure_ids),
        "question_ids": list(prompt.question_ids),
    }
