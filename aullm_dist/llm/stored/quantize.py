"""Writes a base in NF4: an ordinary Hugging Face folder, which a run reads in slices instead of quantising again.

One weight is read and packed at a time, and a file is written as soon as it is full: memory is bounded by one file and
one weight, whatever the size of the LLM. Embeddings, norms and the vocabulary head become bfloat16, so the folder is
complete for whoever else loads it. Bit for bit it holds what bitsandbytes makes of the base's weights in bfloat16.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.utils.quantization_config import QuantizationMethod

from aullm_dist.errors import UserError
from aullm_dist.files import is_taken, write_text
from aullm_dist.llm.base_check import check_base, is_finite, refuse_not_finite
from aullm_dist.llm.blame import read_object
from aullm_dist.llm.bypassed import leaving_plain
from aullm_dist.llm.files import load_config
from aullm_dist.llm.pieces.loading import progress, quantise_piece
from aullm_dist.llm.pieces.placement import Alone
from aullm_dist.llm.pieces.skeleton import dtypes_of, model_without_storage
from aullm_dist.llm.pieces.values import values_in_files
from aullm_dist.llm.pieces.walk import kept_buffers, owners
from aullm_dist.llm.quantization import BLOCK, is_packed, method_of, nf4_config
from aullm_dist.llm.stored.conversion import Values
from aullm_dist.llm.stored.weight_files import WeightFiles, check_space
from aullm_dist.llm.stored.wrappers import alone, alone_in_file, open_base, staged_decoder, wrapper_type

_DTYPE = torch.bfloat16
_FILE_BYTES = 2 * 2**30
_STATE_BYTES = 2048
"""At most, per packed weight: the code, the constants' code, and a few numbers."""
_ALLOWED = "allowed: a local folder with config.json, safetensors files and tokenizer"


@dataclass(frozen=True, slots=True)
class Written:
    """What was written: bytes of the weights before and after, and the number of layers in 4 bits."""

    bytes_before: int
    bytes_after: int
    layers: int


@dataclass(frozen=True, slots=True)
class _Weight:
    name: str
    found: Values
    """Where it stands in the base's files."""
    shape: torch.Size
    packed: bool
    dtype: torch.dtype
    """In the new files, where it is not packed."""
    finite: bool
    """Whether it must be finite: of the head nobody asks, and a buffer may hold a mask."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the new files, at most."""
        if not self.packed:
            return self.shape.numel() * self.dtype.itemsize
        blocks = -(-self.shape.numel() // BLOCK)
        return -(-self.shape.numel() // 2) + blocks + -(-blocks // 256) * 4 + _STATE_BYTES


def quantize_base(base: Path, out: Path) -> Written:
    """Write a base with its linear layers in NF4 (double quantisation, stored as bfloat16).

    Args:
        base: local folder of a causal LM that is not quantised.
        out: the folder to be written; appears only when it is complete.

    Raises:
        UserError: `out` is there already, `base` is no such folder or cannot be quantised, the disk is too small.
    """
    if is_taken(out):
        raise UserError(f"{out}: exists already; give a folder that does not")
    if not (base / "config.json").is_file():
        raise UserError(f"{base}: is no local model folder (no config.json in it); {_ALLOWED}")
    config = load_config(str(base), {"trust_remote_code": False, "local_files_only": True})
    check_base(str(base), base, config)
    method = method_of(config)
    if method is not None:
        raise UserError(f"{base}: its files are quantised already, by {method}; allowed: files that are not")
    files = open_base(base, config)
    if wrapper_type(base) is not None:
        config = alone(config, files.tensors)
    quantization = nf4_config(_DTYPE)
    model = model_without_storage(config, _DTYPE, quantization, keep_head=True)
    _refuse_other_modules(model, base)
    # Whoever loads the folder must know what is not packed.
    quantization = leaving_plain(quantization, model)
    weights = _weights_of(model, files, base)
    check_space(out, sum(weight.nbytes for weight in weights))
    with staged_decoder(out, base, files) as folder:
        written = _write_weights(folder, weights, files, quantization)
        _write_config(folder, base, config, quantization)
    before = sum(weight.found.nbytes for weight in weights)
    return Written(before, written, sum(weight.packed for weight in weights))


def _refuse_other_modules(model: PreTrainedModel, base: Path) -> None:
    """Refuse a model of which the library makes another one where its files are quantised.

    Raises:
        UserError: naming the module.
    """
    for name, module in model.named_modules():
        other: Any = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__, {})
        if QuantizationMethod.BITS_AND_BYTES in other.get("quantization_methods", ()):
            raise UserError(
                f"{base}: transformers loads {type(module).__name__} ({name}) of quantised files as other modules, "
                "with weights of other names; allowed: model.quantization=nf4 with the LLM as it is"
            )


def _write_config(folder: Path, base: Path, config: PretrainedConfig, quantization: BitsAndBytesConfig) -> None:
    """Write the base's own config.json with the quantisation: the library would check and complete what it writes."""
    values = read_object(base / "config.json", str(base))
    if wrapper_type(base) is not None:
        values = alone_in_file(config, values)
    values.pop("torch_dtype", None)
    values |= {"dtype": str(_DTYPE).removeprefix("torch."), "quantization_config": quantization.to_dict()}
    write_text(folder / "config.json", json.dumps(values, indent=2) + "\n")


def _weights_of(model: PreTrainedModel, files: WeightFiles, base: Path) -> list[_Weight]:
    values = values_in_files(model, files, str(base))
    dtypes = dtypes_of(model, _DTYPE)
    weights = []
    head = model.get_output_embeddings()
    module: Any
    for name, parameter_name, module in owners(model):
        if name not in values:
            continue  # the head, which files may lack
        packed = is_packed(module, parameter_name)
        # The parameter of a layer to be packed has the packed shape already, or the layer's: the version decides.
        shape = (module.out_features, module.in_features) if packed else getattr(module, parameter_name).shape
        kind = dtypes[name]
        weights.append(_Weight(name, values[name], torch.Size(shape), packed, kind, finite=module is not head))
    for name, _, _ in kept_buffers(model):
        shape, kind = torch.Size(values[name].shape), dtypes[name]
        weights.append(_Weight(name, values[name], shape, packed=False, dtype=kind, finite=False))
    if not any(weight.packed for weight in weights):
        raise UserError(f"{base}: has no linear layer that NF4 could quantise; {_ALLOWED}")
    return weights


def _write_weights(folder: Path, weights: list[_Weight], files: WeightFiles, quantization: BitsAndBytesConfig) -> int:
    """Write the weights and, if they take several files, the index; return the bytes of the weights."""
    placement = Alone()
    groups = list(_groups(weights))
    places: dict[str, str] = {}
    total = 0
    with progress("Quantising the LLM", sum(weight.found.nbytes for weight in weights)) as bar:
        for number, group in enumerate(groups, start=1):
            file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for weight in group:
                tensors |= _tensors_of(weight, files, placement, quantization)
                bar.update(weight.found.nbytes)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
            # Before the next file's first weight comes on top of it.
            tensors.clear()
    if len(groups) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return total


def _groups(weights: list[_Weight]) -> Iterator[list[_Weight]]:
    """Yield the weights of each file; a weight larger than a file should be has one of its own."""
    group: list[_Weight] = []
    size = 0
    for weight in weights:
        if group and size + weight.nbytes > _FILE_BYTES:
            yield group
            group, size = [], 0
        group.append(weight)
        size += weight.nbytes
    yield group


def _tensors_of(
    weight: _Weight, files: WeightFiles, placement: Alone, quantization: BitsAndBytesConfig
) -> dict[str, Tensor]:
    """Return what the new files hold of a weight, under the names that bitsandbytes gives the parts."""
    if not weight.packed:
        plain = weight.found.read(files, 0, weight.found.numel).to(weight.dtype).view(weight.shape)
        refuse_not_finite(str(files.folder), [] if is_finite(plain) or not weight.finite else [weight.name])
        return {weight.name: plain}
    flat, _, state = quantise_piece(weight.found, files, _DTYPE, placement, quantization)
    refuse_not_finite(str(files.folder), [] if is_finite(state.offset.reshape(-1)) else [weight.name])
    # Copies: bitsandbytes may share a code between states, which a safetensors file cannot hold.
    parts = {f"{weight.name}.{key}": part.cpu().clone() for key, part in state.as_dict(packed=True).items()}
    return {weight.name: flat.view(-1, 1).cpu(), **parts}
