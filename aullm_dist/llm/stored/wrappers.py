"""Finds text decoders inside multimodal models: their config, and their weights among the wrapper's.

A checkpoint of Gemma 3, Qwen3.5, Mistral 3 or Kimi K2.5 holds a text decoder and towers for pictures. The decoder is
an ordinary causal LM whose weights carry a prefix. Nothing but the decoder is read: its names lose the prefix, and from
there on the files look like those of the decoder alone.
"""

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from aullm_dist.errors import UserError
from aullm_dist.files import force_to_disk, staged_folder
from aullm_dist.llm.stored.weight_files import WeightFiles, files_beside_weights
from aullm_dist.packing.support import is_decoder

_HEAD = "lm_head.weight"
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_PICTURES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def text_decoder_of(source: str, config: PretrainedConfig) -> PretrainedConfig:
    """Return the config of the text decoder inside a model; a config that is one already comes back as it is.

    Args:
        source: name of the backbone, for messages.
        config: as its files have it.

    Raises:
        UserError: there are several text models in it, or its text decoder is no causal LM of the library.
    """
    try:
        text = config.get_text_config()
    except ValueError as error:
        raise UserError(
            f"backbone {source}: model type {config.model_type!r} holds several text models; allowed: a causal "
            "language model, or a multimodal model around one"
        ) from error
    if text is config:
        return config
    is_causal = type(text) in AutoModelForCausalLM._model_mapping and not text.is_encoder_decoder
    if not (is_causal and is_decoder(text)):
        raise UserError(
            f"backbone {source}: model type {config.model_type!r} holds more than a text decoder, and its text model "
            f"{text.model_type!r} is no causal language model of transformers by itself; allowed: a causal language "
            "model, or a multimodal model around one, such as gemma3, mistral3 or qwen3_5"
        )
    stored = getattr(config, "quantization_config", None)
    if stored is not None and getattr(text, "quantization_config", None) is None:
        text.quantization_config = stored
    return text


def wrapper_type(folder: Path | str) -> str | None:
    """Return the model type of the multimodal model whose text decoder a folder holds; None for a plain decoder."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        return None if config.get_text_config() is config else config.model_type
    except (OSError, ValueError):
        # Model code of its own: never looked into for a decoder.
        return None


def open_base(folder: Path | str, config: PretrainedConfig) -> WeightFiles:
    """Return the weights of a base as those of a text decoder, whatever stands around it in the files.

    Args:
        folder: local folder of the base.
        config: of its text decoder.

    Raises:
        UserError: a file is damaged, or the wrapper holds no such decoder.
    """
    files = WeightFiles(folder)
    if wrapper_type(folder) is not None:
        names = decoder_names(files.tensors, config, str(folder))
        files.tensors = {new: files.tensors[old] for old, new in names.items()}
    return files


def library_options(source: str, folder: Callable[[], str], config: PretrainedConfig) -> dict[str, Any]:
    """Return `config` and, for a decoder inside a wrapper, `key_mapping` of the library's `from_pretrained`.

    Args:
        source: local folder or Hugging Face name of the base.
        folder: gives the local folder of its files.
        config: of its text decoder.

    Raises:
        UserError: as `open_base`.
    """
    if wrapper_type(source) is None:
        return {"config": config}
    place = folder()
    names = WeightFiles(place).tensors
    prefix, head, base = _prefixes(names, config, place)
    patterns = {f"^{re.escape(prefix)}": f"{base}."}
    if head is not None:
        patterns[f"^{re.escape(head)}"] = _HEAD
    return {"config": alone(config, names if head is None else [_HEAD]), "key_mapping": patterns}


def decoder_names(names: Iterable[str], config: PretrainedConfig, source: str) -> dict[str, str]:
    """Map the names of a text decoder's weights in a wrapper's files to its own names.

    Args:
        names: all names in the files.
        config: of the text decoder.
        source: name of the backbone, for messages.

    Raises:
        UserError: none of them is the decoder's embedding.
    """
    names = list(names)
    prefix, head, base = _prefixes(names, config, source)
    found = {name: f"{base}.{name.removeprefix(prefix)}" for name in names if name.startswith(prefix)}
    if head is not None:
        found[head] = _HEAD
    return found


def _prefixes(names: Iterable[str], config: PretrainedConfig, source: str) -> tuple[str, str | None, str]:
    """Return the decoder's prefix, its head's name (None: tied) and the prefix that its own class gives it."""
    names = list(names)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    base, embedding = model.base_model_prefix, model.get_input_embeddings()
    own = next(f"{name}.weight" for name, module in model.named_modules() if module is embedding)
    tail = own.removeprefix(f"{base}.")
    prefixes = [name.removesuffix(tail) for name in names if name == tail or name.endswith(f".{tail}")]
    if not prefixes:
        raise UserError(
            f"backbone {source}: holds no text decoder of type {config.model_type} (no weight whose name ends in "
            f"{tail}); allowed: files that are complete as published"
        )
    # Speech and other parts may have embeddings of their own; the text decoder is what most weights belong to.
    prefix = max(prefixes, key=lambda start: (sum(name.startswith(start) for name in names), -len(start)))
    heads = [name for name in names if name == _HEAD or name.endswith(f".{_HEAD}")]
    return prefix, min(heads, key=len, default=None), base


def alone(config: PretrainedConfig, names: Iterable[str]) -> PretrainedConfig:
    """Return the config of a text decoder as it stands in a folder of its own.

    Args:
        config: from `text_decoder_of`.
        names: of the weights in that folder. Without a head among them, the head is the embedding: wrappers say that
            of themselves, and their text configs often say something else.
    """
    config = copy.deepcopy(config)
    config.tie_word_embeddings = _HEAD not in set(names)
    mapping: Any = AutoModelForCausalLM._model_mapping
    config.architectures = [mapping[type(config)].__name__]
    return config


def alone_in_file(config: PretrainedConfig, wrapper: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of config.json of a text decoder that stands alone.

    Args:
        config: from `alone`.
        wrapper: content of its wrapper's config.json, which may have the ids of special tokens.
    """
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=True))
    values.pop("_name_or_path", None)
    return {name: wrapper[name] for name in _TOKENS if wrapper.get(name) is not None} | values


@contextmanager
def staged_decoder(out: Path, source: Path, files: WeightFiles) -> Iterator[Path]:
    """Give a folder for the weights and the config of a text decoder, which becomes `out` when the block ends.

    What stands next to the weights of `source` is copied into it, but for what belongs to the wrapper's towers.

    Args:
        out: where the folder is to be.
        source: local folder of the base that the decoder is written from.
        files: its weights, which are closed in the end.

    Raises:
        UserError: a file cannot be read or written; nothing is left of `out`.
    """
    try:
        with staged_folder(out) as folder:
            yield folder
            for path in files_beside_weights(source):
                if not is_for_pictures(path):
                    shutil.copyfile(path, folder / path.name)
            for path in folder.iterdir():
                force_to_disk(path)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{out}: cannot be written ({reason[0]}); nothing is left of it") from error
    finally:
        files.close()


def is_for_pictures(path: Path) -> bool:
    """Return whether a file next to the weights belongs to the wrapper's towers."""
    return path.name in _PICTURES
