"""Describes a release in its config.json: what must be known to build its model, and to use it."""

from typing import Any

from aullm_dist.checkpoint.store import MODULES_CONFIG_FILE
from aullm_dist.config import release_settings
from aullm_dist.files import read_json
from aullm_dist.model.prompt import Prompt
from aullm_dist.release.layout import Format
from aullm_dist.release.origin import Origin, find_marks


def describe(origin: Origin, prompt: Prompt, format: Format) -> dict[str, Any]:
    """Return the contents of config.json.

    Args:
        origin: the checkpoint.
        prompt: built with the tokenizer of its LLM.
        format: of the release.
    """
    config, thresholds = origin.config, origin.thresholds
    function = read_json(origin.folder / MODULES_CONFIG_FILE)
    # What decides the function and the shapes; how it is computed, and where the LLM is, are for whoever loads it.
    settings = release_settings(config)
    if format == "merged":
        settings["model"]["quantization"] = "none"
        function["quantization"] = "none"
    return {
        "model_type": "aullm",
        "architectures": ["AULLMModel"],
        "format": format,
        "aus": list(origin.aus),
        "thresholds": {f"AU{au}": thresholds.values[au] for au in origin.aus},
        "threshold_policy": thresholds.policy,
        "preprocessing": {
            "num_frames": config.data.num_frames,
            "size": config.data.size,
            "crop": origin.preparation.crop,
        },
        "corpora": list(origin.preparation.corpora),
        "caveats": find_marks(config, origin.preparation),
        "prompt": prompt_facts(prompt),
        "base": origin.base.to_json(),
        "function": function,
        "settings": settings,
    }


def prompt_facts(prompt: Prompt) -> dict[str, Any]:
    """Return the prompt as a release records it: for people, and as the token ids that the model was trained with."""
    return {
        "text": prompt.text,
        "prefix_ids": list(prompt.prefix_ids),
        "structure_ids": list(prompt.structure_ids),
        "question_ids": list(prompt.question_ids),
    }
