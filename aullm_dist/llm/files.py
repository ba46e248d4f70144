"""Finds an LLM's files, and reads config and tokenizer before any weight: folder or Hub."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aullm_dist.errors import UserError
from aullm_dist.facs import AU_NAMES
from aullm_dist.files import user_path
from aullm_dist.library_errors import in_one_line, refusing
from aullm_dist.llm.blame import key_refusal, read_object
from aullm_dist.llm.stored.gguf_file import gguf_file_of
from aullm_dist.llm.stored.smollm2 import SMOLLM2
from aullm_dist.llm.stored.wrappers import text_decoder_of
from aullm_dist.packing.support import is_decoder
from aullm_dist.shell import command
from aullm_dist.wording import QUESTION_TEXT, STRUCTURE_TEXT, prefix_text

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab*", "merges.txt", "tekken.json")
_SIZES = ("hidden_size", "vocab_size", "num_hidden_layers")
_COUNTED = ("layers", "experts", "heads")
_MOST_MODULES = 100_000
"""Layers or experts: more would keep the libraries busy for hours before they say no."""
TRIAL_TEXT = prefix_text(sorted(AU_NAMES)) + STRUCTURE_TEXT + QUESTION_TEXT
"""Every word that a prompt may have."""


def resolve(name_or_path: str | os.PathLike) -> tuple[str, bool]:
    """Return a folder or a Hugging Face name as the libraries want it, and whether it is a folder.

    Raises:
        UserError: it is neither.
    """
    allowed = "allowed: a local folder with config.json, or a Hugging Face name such as Qwen/Qwen3-8B"
    name = os.fspath(name_or_path)
    folder = user_path(name)
    gguf = gguf_file_of(folder)
    if gguf is not None:
        raise UserError(
            f"backbone {name}: is GGUF, which a run does not read; write it as a model folder once, "
            f"`{command('aullm-dist', 'backbone', 'fetch', gguf, '--out', 'DIR')}`, and give that"
        )
    if name == SMOLLM2 and not folder.exists():
        raise UserError(
            f"backbone {name}: a run writes its folder by itself; here write it first, "
            f"`{command('aullm-dist', 'backbone', 'fetch', name, '--out', 'DIR')}`, and give that"
        )
    if folder.exists():
        if not (folder / "config.json").is_file():
            if (folder / "adapter_config.json").is_file():
                raise UserError(f"backbone {name}: holds an adapter alone; give the LLM that it was trained on")
            raise UserError(f"backbone {name}: is no model folder (no config.json in it); {allowed}")
        return str(folder), True
    looks_like_path = name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
    if not name or looks_like_path:
        raise UserError(f"backbone {name!r}: no such folder; {allowed}")
    return name, False


def local_folder(name_or_path: str | os.PathLike) -> Path:
    """Return the folder of an LLM's files, which are downloaded if it is a Hugging Face name.

    Raises:
        UserError: no such folder or name.
    """
    source, is_local = resolve(name_or_path)
    # A tokenizer may have more files, which whoever writes the LLM again wants to copy.
    return Path(source if is_local else downloaded(source, "*.jinja", "*.model", "*.tiktoken", "*.txt", "LICENSE*"))


def present_folder(name_or_path: str | os.PathLike) -> Path | None:
    """Return the folder of an LLM's files if they are on this machine: nothing is downloaded.

    Raises:
        UserError: it is neither a folder nor a Hugging Face name.
    """
    source, is_local = resolve(name_or_path)
    if is_local:
        return Path(source)
    try:
        return Path(snapshot_download(source, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def downloaded(name: str, *more: str) -> str:
    """Return the folder of a Hugging Face name, of which config and weights, and files like `more`, are downloaded.

    Raises:
        UserError: there is no such model, or no way to it.
    """
    with refusing(partial(no_model, name)):
        # Some repositories hold the weights a second time, under other names.
        folder = snapshot_download(name, allow_patterns=["*.json", "model*.safetensors", *more])
    return folder


def load_config(source: str, common: dict) -> PretrainedConfig:
    """Return the config of a text decoder; `common` are options of the library's `from_pretrained`.

    Of a multimodal model it is the config of the text decoder inside it (`stored.wrappers`).

    Raises:
        UserError: there is no config, or that of another kind of model, or one that the library refuses.
    """
    file = Path(source) / "config.json"
    values = read_object(file, source) if file.is_file() else None
    if values is not None:
        _check_values(source, values, has_code=common["trust_remote_code"])

    def refused(error: BaseException) -> UserError:
        if values is None:
            return no_model(source, error)
        return key_refusal(source, file.name, error, values, _with_config(common))

    with refusing(refused):
        config = AutoConfig.from_pretrained(source, **common)
    if not config.is_encoder_decoder:
        config = text_decoder_of(source, config)
    # Code that ships with a checkpoint brings config classes of its own; it runs only where the user allowed it.
    brings_code = common["trust_remote_code"] and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    known = type(config) in AutoModelForCausalLM._model_mapping
    if config.is_encoder_decoder or not (brings_code or (known and is_decoder(config))):
        raise UserError(
            f"backbone {source}: model type {config.model_type!r} is no decoder; allowed: a causal language model"
        )
    return config


def _with_config(common: dict) -> Callable[[dict[str, Any]], object]:
    """Return a function that reads a config of other values as the library read the one that failed."""

    def make(values: dict[str, Any]) -> object:
        with tempfile.TemporaryDirectory() as scratch:
            (Path(scratch) / "config.json").write_text(json.dumps(values), encoding="utf-8")
            return AutoConfig.from_pretrained(scratch, **common)

    return make


def _check_values(source: str, values: Mapping[str, Any], has_code: bool) -> None:
    """Refuse what the library would misread, fail on far from its cause, or build for hours.

    Raises:
        UserError: naming the key.
    """
    model_type = values.get("model_type")
    # Without one the library guesses from the folder's name.
    if not isinstance(model_type, str) or (model_type not in CONFIG_MAPPING and not has_code):
        raise UserError(
            f"backbone {source}: cannot be loaded (config.json: model_type is {model_type!r}); allowed: a type that "
            f"transformers {transformers.__version__} knows"
        )
    if not isinstance(values.get("quantization_config") or {}, dict):
        raise UserError(f"backbone {source}: config.json: quantization_config is no object; allowed: as published")
    for key, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value != value:
            raise UserError(f"backbone {source}: config.json: {key} is not a number; allowed: as published")
        if number and key in _SIZES and not value > 0:
            raise UserError(f"backbone {source}: config.json: {key} is {value}; allowed: a number above 0")
        counts = key in ("n_layer", "n_layers") or (key.startswith(("num_", "n_")) and key.endswith(_COUNTED))
        if number and counts and not value < _MOST_MODULES:
            raise UserError(f"backbone {source}: config.json: {key} is {value}; allowed: below {_MOST_MODULES}")


def load_tokenizer(source: str, common: dict) -> Any:
    """Return the tokenizer of an LLM; `common` are options of the library's `from_pretrained`.

    Raises:
        UserError: there is none, its files cannot be used, or it fails on `TRIAL_TEXT`.
    """
    folder = Path(source)
    found = {name: read_object(folder / name, source) for name in _TOKENIZER_FILES if (folder / name).is_file()}
    with refusing(partial(_tokenizer_refusal, source, found, common)):
        tokenizer = _tried_tokenizer(source, common)
    return tokenizer


def _tried_tokenizer(source: str, common: dict) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(source, **common)
    tokenizer(TRIAL_TEXT)
    return tokenizer


def _tokenizer_refusal(source: str, found: dict[str, dict], common: dict, error: BaseException) -> UserError:
    """Return in one line which of a tokenizer's files cannot be used, and for which key."""
    folder = Path(source)
    if folder.is_dir() and not any(path.match(name) for path in folder.iterdir() for name in _VOCABULARIES):
        return UserError(
            f"backbone {source}: no usable tokenizer in it (tokenizer.json is missing); allowed: a folder with "
            "tokenizer.json next to config.json and weights, or a Hugging Face name"
        )
    values = found.get("tokenizer.json")
    if values is not None:
        try:
            with refusing(partial(key_refusal, source, "tokenizer.json", values=values, make=_backend_from)):
                _backend_from(values)
        except UserError as refusal:
            return refusal
    file = "tokenizer_config.json"
    return key_refusal(source, file, error, found.get(file), _with_tokenizer_config(folder, common))


def _backend_from(values: dict[str, Any]) -> object:
    return Tokenizer.from_str(json.dumps(values))


def _with_tokenizer_config(folder: Path, common: dict) -> Callable[[dict[str, Any]], object]:
    """Return a function that loads the tokenizer of a folder with other values in its tokenizer_config.json."""

    def make(values: dict[str, Any]) -> object:
        with tempfile.TemporaryDirectory() as scratch:
            for name in ("config.json", *_TOKENIZER_FILES, *_VOCABULARIES):
                for path in folder.glob(name):
                    shutil.copyfile(path, Path(scratch) / path.name)
            (Path(scratch) / "tokenizer_config.json").write_text(json.dumps(values), encoding="utf-8")
            return _tried_tokenizer(scratch, common)

    return make


def no_model(source: str, error: BaseException) -> UserError:
    """Return in one line that a library found no model there."""
    return UserError(
        f"backbone {source}: cannot be loaded ({in_one_line(error)}); "
        "allowed: a local folder with config.json, weights and tokenizer, or a Hugging Face name"
    )
