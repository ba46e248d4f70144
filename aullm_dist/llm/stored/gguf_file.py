"""Converts GGUF files, llama.cpp's format, to an ordinary model folder, whose weights are no longer quantised.

transformers reads and dequantises them, with the package `gguf`. A run takes the folder alone: loading whole or in
pieces, merging and fingerprints know one format.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig

from aullm_dist.errors import UserError
from aullm_dist.files import force_to_disk, staged_folder, write_text
from aullm_dist.llm.stored.weight_files import check_space
from aullm_dist.quiet import hidden_gguf_bar, hidden_progress_bars, hidden_reports, name_deepspeed_accelerator

SOURCE_NAME = "gguf_source.json"
"""What a folder that was written here was made of."""
DTYPE = torch.bfloat16
"""Of the written weights: 4 to 8 bits rounded far more than this does."""
_INSTALL = "pip install 'gguf>=0.19'"
_ALLOWED = "allowed: one whole GGUF file of a text decoder"
# What transformers and gguf raise for files that are cut off, damaged or of a kind that they do not know.
_LIBRARY_ERRORS = (OSError, ValueError, LookupError, TypeError, NotImplementedError, RuntimeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSource:
    """A GGUF file as its header describes it, and its hash."""

    file: str
    nbytes: int
    sha256: str
    types: Mapping[str, int]
    """Tensors by the way they are stored, such as Q4_1 or F32."""
    weights: int
    licence: str | None
    """As the header says it, None where it does not."""

    def to_json(self) -> dict[str, Any]:
        """Return the entries of `SOURCE_NAME`."""
        return asdict(self)


def gguf_file_of(path: Path) -> Path | None:
    """Return the GGUF file that `path` is, or the first one of a folder without config.json; None if it is neither."""
    if path.is_file():
        return path if path.suffix.lower() == ".gguf" else None
    if not path.is_dir() or (path / "config.json").is_file():
        return None
    return next((each for each in sorted(path.iterdir()) if each.suffix.lower() == ".gguf"), None)


def convert_gguf(file: Path, out: Path, *, card: str = "") -> GgufSource:
    """Write a GGUF file as a folder with config, tokenizer and bfloat16 weights; the model is held in memory once.

    Args:
        file: the GGUF file; one whole file, no shard of several.
        out: the folder to be written; appears only when it is complete.
        card: text of the README.md that goes next to the weights, after the licence.

    Raises:
        UserError: `out` is there already, the disk is too small, `gguf` is not installed, or the file cannot be read
            as a text decoder without loss of a tensor.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; give a folder that does not")
    source = read_source(file)
    check_space(out, source.weights * DTYPE.itemsize)
    model, tokenizer = _model(file), _tokenizer(file)
    name_deepspeed_accelerator()
    try:
        with staged_folder(out) as folder:
            with hidden_progress_bars():
                model.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
            write_text(folder / SOURCE_NAME, json.dumps(source.to_json(), indent=2) + "\n")
            write_text(folder / "README.md", _card(source, card))
            for path in folder.iterdir():
                force_to_disk(path)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({_reason(error)}); nothing is left of it") from error
    return source


def read_source(file: Path) -> GgufSource:
    """Read the header of a GGUF file, and hash it.

    Raises:
        UserError: it is none, `gguf` is not installed, or it holds what transformers would leave out silently.
    """
    reader = _reader(file)
    names = [tensor.name for tensor in reader.tensors]
    if _field(reader, "split.count") not in (None, 0, 1):
        raise UserError(f"{file}: is one of {_field(reader, 'split.count')} files of a model; {_ALLOWED}")
    architecture = _field(reader, "general.architecture")
    scaling = _field(reader, f"{architecture}.rope.scaling.type")
    # gpt-oss is the one type of which transformers reads how positions are stretched.
    if "rope_freqs.weight" in names or (scaling not in (None, "none") and architecture != "gpt-oss"):
        raise UserError(
            f"{file}: stretches its positions (rope scaling), which transformers does not read from GGUF: it would be "
            "another model; allowed: the model's own folder or Hugging Face name, or a GGUF file without"
        )
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return GgufSource(
        file=file.name,
        nbytes=file.stat().st_size,
        sha256=sha256,
        types=dict(sorted(Counter(tensor.tensor_type.name for tensor in reader.tensors).items())),
        weights=sum(int(tensor.n_elements) for tensor in reader.tensors),
        licence=_field(reader, "general.license"),
    )


def gguf_config(file: Path) -> PretrainedConfig:
    """Return the config of the folder that `convert_gguf` would write.

    Raises:
        UserError: as for `read_source`, or transformers does not know the architecture as a text decoder.
    """
    _need_gguf()
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except _LIBRARY_ERRORS as error:
        raise _unreadable(file, error) from error
    if type(config) not in AutoModelForCausalLM._model_mapping or config.is_encoder_decoder:
        raise UserError(f"{file}: model type {config.model_type!r} is no decoder; {_ALLOWED}")
    return config


def gguf_tokenizer(file: Path) -> Any:
    """Return the tokenizer of the folder that `convert_gguf` would write.

    Raises:
        UserError: as for `read_source`, or transformers cannot build it.
    """
    _need_gguf()
    return _tokenizer(file)


def _model(file: Path) -> Any:
    gguf_config(file)
    # Releases that have this class may leave weights in their blocks; earlier ones never do.
    kind = getattr(transformers, "GgufConfig", None)
    dequantised = {} if kind is None else {"quantization_config": kind(dequantize=True)}
    try:
        with hidden_progress_bars(), hidden_gguf_bar(), hidden_reports():
            found: Any = AutoModelForCausalLM.from_pretrained(
                file.parent,
                gguf_file=file.name,
                local_files_only=True,
                dtype=DTYPE,
                output_loading_info=True,
                **dequantised,
            )
    except _LIBRARY_ERRORS as error:
        raise _unreadable(file, error) from error
    model, loaded = found
    # The library fills the first two with random numbers, and forgets the third.
    wrong = sorted({*map(str, loaded["missing_keys"]), *map(str, loaded["mismatched_keys"])})
    wrong += sorted(map(str, loaded["unexpected_keys"]))
    if wrong:
        raise UserError(
            f"{file}: does not fit transformers' {model.config.model_type} ({wrong[0]}, {len(wrong)} in all)"
        )
    # The weights are plain numbers now, but the library would not save them.
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    return model


def _tokenizer(file: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
    except _LIBRARY_ERRORS as error:
        raise _unreadable(file, error) from error


def _reader(file: Path) -> Any:
    _need_gguf()
    from gguf import GGUFReader

    if not file.is_file():
        raise UserError(f"{file}: no such file; {_ALLOWED}")
    try:
        return GGUFReader(file)
    except _LIBRARY_ERRORS as error:
        raise _unreadable(file, error) from error


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _need_gguf() -> None:
    if find_spec("gguf") is None:
        raise UserError(f"GGUF files need the package gguf, which is not installed: {_INSTALL}")


def _unreadable(file: Path, error: Exception) -> UserError:
    return UserError(f"{file}: cannot be read as GGUF ({_reason(error)}); {_ALLOWED}")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip()


def _card(source: GgufSource, text: str) -> str:
    head = f"---\n{yaml.safe_dump({'license': source.licence})}---\n\n" if source.licence else ""
    stored = ", ".join(f"{kind}: {count}" for kind, count in source.types.items())
    made = (
        f"Written by `aullm-dist backbone fetch`\nfrom `{source.file}` ({source.nbytes} bytes; tensors by type:\n"
        f"{stored}; SHA-256\n`{source.sha256}`): dequantised by transformers and\n"
        "rounded to bfloat16. What the quantisation lost is lost.\n"
    )
    return f"{head}{text}{made}"
