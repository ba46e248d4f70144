"""An LLM's architecture as the run file gives it: a config without files, with which a config on disk must agree.

`model.architecture` carries the fields of a published config.json that say how large the LLM is and what its layers do.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aullm_dist.config import ModelConfig
from aullm_dist.errors import UserError
from aullm_dist.model.llm_files import load_config
from aullm_dist.model.packing import MASK_RECIPES
from aullm_dist.model.tiny import tiny_parts

_KEY = "model.architecture"
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""What every architecture must give: the library's defaults are some released model's."""


def config_of(model: ModelConfig) -> PretrainedConfig:
    """Return the config of the run's LLM: from the local folder, the run file, or that of the tiny backbone.

    Nothing is downloaded. A folder and the run file must agree (`refuse_other_architecture`).

    Raises:
        UserError: there is neither, or `model.architecture` describes no decoder.
    """
    if model.llm == "tiny":
        return tiny_parts(model.llm_architecture, hidden=model.llm_hidden, layers=model.llm_layers)[0]
    folder = Path(model.llm).expanduser()
    if (folder / "config.json").is_file():
        config = load_config(str(folder), {"trust_remote_code": model.trust_remote_code, "local_files_only": True})
        refuse_other_architecture(model, config)
        return config
    if model.architecture is None:
        raise UserError(
            f"{_KEY} is not given and {model.llm} is no local folder with config.json; allowed: the fields of its "
            f"config.json (model_type, {', '.join(_SIZES)}, ...), or a local folder in model.llm"
        )
    return described(model.architecture)


def described(architecture: Mapping[str, Any]) -> PretrainedConfig:
    """Return the config that `model.architecture` describes.

    Raises:
        UserError: a field is missing, unknown or of a wrong type, or the model type is not one of `MASK_RECIPES`.
    """
    fields = dict(architecture)
    model_type = fields.pop("model_type", None)
    if model_type not in MASK_RECIPES:
        raise UserError(f"{_KEY}.model_type is {model_type!r}; allowed: {', '.join(MASK_RECIPES)}")
    missing = [name for name in _SIZES if name not in fields]
    if missing:
        raise UserError(f"{_KEY} lacks {', '.join(missing)}; give the values of the LLM's config.json")
    known = CONFIG_MAPPING[model_type]().to_dict()
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"{_KEY}.{name} is no field of a {model_type} config; give those of the LLM's config.json")
        if name in _SIZES and (type(value) is not int or value < 1):
            raise UserError(f"{_KEY}.{name} is {value!r}; allowed: a whole number from 1")
    try:
        return AutoConfig.for_model(model_type, **fields)
    except (TypeError, ValueError) as error:
        # The library's own checks, say of heads that do not divide the width.
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{_KEY} is refused by transformers ({reason})") from error


def check_architecture(model: ModelConfig, llm_path: str) -> None:
    """Refuse an LLM that a run is about to load if `model.architecture` does not describe it.

    Raises:
        UserError: there is none, or a field differs.
    """
    if model.architecture is None:
        return
    is_local = Path(llm_path).expanduser().is_dir()
    config = load_config(llm_path, {"trust_remote_code": model.trust_remote_code, "local_files_only": is_local})
    refuse_other_architecture(model, config)


def refuse_other_architecture(model: ModelConfig, config: PretrainedConfig) -> None:
    """Refuse a config found on disk that differs from `model.architecture`; without one there is nothing to compare.

    Raises:
        UserError: naming the first field that differs.
    """
    if model.architecture is None or model.llm in ("tiny", "none"):
        return
    expected, found = described(model.architecture).to_dict(), config.to_dict()
    for name in model.architecture:
        if found.get(name) != expected.get(name):
            raise UserError(
                f"backbone {model.llm}: {name} is {found.get(name)!r} in its config.json, but {_KEY} has "
                f"{expected.get(name)!r}; correct the run file, or give the LLM that it describes"
            )
