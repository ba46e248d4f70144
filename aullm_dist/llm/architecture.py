"""Reads an LLM's architecture from the run file: a config without files, with which a config on disk must agree.

`model.architecture` carries the fields of a published config.json that say how large the LLM is and what its layers do.
"""

import re
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aullm_dist.config import ModelConfig
from aullm_dist.errors import UserError
from aullm_dist.files import user_path
from aullm_dist.library_errors import LIBRARY_ERRORS, in_one_line
from aullm_dist.llm.files import load_config
from aullm_dist.llm.stored.gguf_file import gguf_config
from aullm_dist.llm.stored.smollm2 import SMOLLM2, packaged_file
from aullm_dist.llm.tiny import tiny_parts
from aullm_dist.packing.support import is_decoder

_KEY = "model.architecture"
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
_ALLOWED = f"allowed: the model_type of a text decoder that transformers {transformers.__version__} knows"
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""What every architecture must give: the library's defaults are some released model's."""


def config_of(model: ModelConfig) -> PretrainedConfig:
    """Return the config of the run's LLM: from the local folder, the run file, or that of a backbone that a run builds.

    Nothing is downloaded. A folder and the run file must agree (`refuse_other_architecture`).

    Raises:
        UserError: there is neither, or `model.architecture` describes no decoder.
    """
    if model.llm == "tiny":
        return tiny_parts(model.llm_architecture, hidden=model.llm_hidden, layers=model.llm_layers)[0]
    if model.llm == SMOLLM2:
        config = gguf_config(packaged_file())
        refuse_other_architecture(model, config)
        return config
    folder = user_path(model.llm)
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
        UserError: a field is missing, unknown or of a wrong type, or the model type is no text decoder of transformers.
    """
    fields = {name: _number(value) for name, value in architecture.items()}
    model_type = fields.pop("model_type", None)
    kind = _config_class(model_type)
    known, other_names = _fields_of(kind), kind.attribute_map
    # A type may call a size by another name, or have none such: all experts and no dense layer, say.
    needed = {name: other_names.get(name, name) for name in _SIZES}
    missing = [own for name, own in needed.items() if own in known and not {name, own} & fields.keys()]
    if missing:
        raise UserError(f"{_KEY} lacks {', '.join(missing)}; give the values of the LLM's config.json")
    known |= {name for name, own in other_names.items() if own in known}
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"{_KEY}.{name} is no field of a {model_type} config; give those of the LLM's config.json")
        if name in _SIZES and (type(value) is not int or value < 1):
            raise UserError(f"{_KEY}.{name} is {value!r}; allowed: a whole number from 1")
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except LIBRARY_ERRORS as error:
        # The library's own checks, say of heads that do not divide the width.
        raise UserError(f"{_KEY} is refused by transformers ({in_one_line(error)})") from error
    if not is_decoder(config):
        raise UserError(f"{_KEY}.model_type is {model_type!r}, which is no decoder; {_ALLOWED}")
    return config


def _number(value: Any) -> Any:
    """Return a float for what JSON writes as one and YAML takes for a word: `1e-05`."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _config_class(model_type: object) -> type[PretrainedConfig]:
    """Return the config class of a text decoder.

    Raises:
        UserError: there is no such type, or it is no text decoder by itself.
    """
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(f"{_KEY}.model_type is {model_type!r}, which is not known; {_ALLOWED}")
    kind = CONFIG_MAPPING[model_type]
    text = kind.sub_configs.get("text_config")
    if text is not None:
        raise UserError(
            f"{_KEY}.model_type is {model_type!r}, which holds more than a text decoder; allowed: the fields of its "
            "text_config, with the model_type of that"
        )
    if kind not in AutoModelForCausalLM._model_mapping:
        raise UserError(f"{_KEY}.model_type is {model_type!r}, which is no causal language model; {_ALLOWED}")
    return kind


def _fields_of(kind: type[PretrainedConfig]) -> set[str]:
    """Return the names that a config.json of this class may have."""
    names = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {}) if not name.startswith("_")}
    try:
        return names | set(kind().to_dict())
    except LIBRARY_ERRORS:
        # Some defaults do not go together; the annotations hold most fields.
        return names


def check_architecture(model: ModelConfig, llm_path: str) -> None:
    """Refuse an LLM that a run is about to load if `model.architecture` does not describe it.

    Raises:
        UserError: there is none, or a field differs.
    """
    if model.architecture is None:
        return
    is_local = user_path(llm_path).is_dir()
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
