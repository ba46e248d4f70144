"""Where an LLM's files are, and what they say of it before any weight is read: folder or Hub, config, tokenizer."""

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from aullm_dist.errors import UserError

LIBRARY_ERRORS = (OSError, ValueError, SafetensorError)
"""What the libraries raise for files that are missing, damaged or of another kind."""


def resolve(name_or_path: str | os.PathLike) -> tuple[str, bool]:
    """Return a folder or a Hugging Face name as the libraries want it, and whether it is a folder.

    Raises:
        UserError: it is neither.
    """
    allowed = "allowed: a local folder with config.json, or a Hugging Face name such as Qwen/Qwen3-8B"
    name = os.fspath(name_or_path)
    folder = Path(name).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
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
    # A tokenizer may have files besides, which whoever writes the LLM anew wants to copy.
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
    try:
        # Some repositories hold the weights a second time, under other names.
        return snapshot_download(name, allow_patterns=["*.json", "model*.safetensors", *more])
    except LIBRARY_ERRORS as error:
        raise no_model(name, error) from error


def load_config(source: str, common: dict) -> PretrainedConfig:
    """Return the config of a text decoder; `common` are options of the library's `from_pretrained`.

    Raises:
        UserError: there is no config, or that of another kind of model.
    """
    try:
        config = AutoConfig.from_pretrained(source, **common)
    except LIBRARY_ERRORS as error:
        raise no_model(source, error) from error
    # Code that ships with a checkpoint brings config classes of its own; it runs only where the user allowed it.
    brings_code = common["trust_remote_code"] and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    known = type(config) in AutoModelForCausalLM._model_mapping and getattr(config, "is_decoder", True) is not False
    if config.is_encoder_decoder or not (known or brings_code):
        raise UserError(
            f"backbone {source}: model type {config.model_type!r} is no decoder; allowed: a causal language model"
        )
    text = config.get_text_config()
    if text is not config:
        raise UserError(
            f"backbone {source}: model type {config.model_type!r} holds more than a text decoder; "
            f"allowed: a text decoder alone, such as {text.model_type}"
        )
    return config


def load_tokenizer(source: str, common: dict) -> object:
    """Return the tokenizer of an LLM; `common` are options of the library's `from_pretrained`.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source, **common)
    except LIBRARY_ERRORS as error:
        raise UserError(
            f"backbone {source}: no usable tokenizer in it; allowed: a folder with tokenizer.json beside config.json "
            "and weights, or a Hugging Face name"
        ) from error


def no_model(source: str, error: Exception) -> UserError:
    """Return in one line that a library found no model there."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return UserError(
        f"backbone {source}: cannot be loaded ({lines[0].strip()}); "
        "allowed: a local folder with config.json, weights and tokenizer, or a Hugging Face name"
    )
