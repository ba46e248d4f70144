"""Writing a base in NF4: an ordinary Hugging Face folder, which a run reads in slices instead of quantising anew.

One weight is read and packed at a time, and a file is written as soon as it is full: memory is bounded by one file and
one weight, whatever the size of the LLM. Embeddings, norms and the vocabulary head become bfloat16, so the folder is
complete for whoever else loads it. Bit for bit it holds what bitsandbytes makes of the base's weights in bfloat16.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PretrainedConfig

from aullm_dist.errors import UserError
from aullm_dist.files import force_to_disk, staged_folder
from aullm_dist.model.llm_files import load_config
from aullm_dist.model.piecewise import (
    model_without_storage,
    names_in_files,
    owners,
    progress,
    quantise_piece,
    refuse_special,
)
from aullm_dist.model.quantization import BLOCK, is_packed, method_of, nf4_config
from aullm_dist.model.weight_files import WeightFiles, check_space, files_beside_weights

T = TypeVar("T")
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
    stored: str
    """Its name in the base's files."""
    shape: torch.Size
    packed: bool

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the new files, at most."""
        if not self.packed:
            return self.shape.numel() * _DTYPE.itemsize
        blocks = -(-self.shape.numel() // BLOCK)
        return -(-self.shape.numel() // 2) + blocks + -(-blocks // 256) * 4 + _STATE_BYTES


class _Alone:
    """The placement (`piecewise.Placement`) of one process for itself."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def together(self, work: Callable[[], T]) -> T:
        return work()

    def largest(self, values: Tensor) -> Tensor:
        return values

    def complete(self, flat: Tensor, size: int) -> None:
        pass

    def settle(self, parameter: nn.Parameter) -> None:
        pass


def quantize_base(base: Path, out: Path) -> Written:
    """Write a base with its linear layers in NF4 (double quantisation, stored as bfloat16).

    Args:
        base: local folder of a causal LM that is not quantised.
        out: the folder to be written; appears only when it is complete.

    Raises:
        UserError: `out` is there already, `base` is no such folder or cannot be quantised, the disk is too small.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; give a folder that does not")
    if not (base / "config.json").is_file():
        raise UserError(f"{base}: is no local model folder (no config.json in it); {_ALLOWED}")
    config = load_config(str(base), {"trust_remote_code": False, "local_files_only": True})
    method = method_of(config)
    if method is not None:
        raise UserError(f"{base}: its files are quantised already, by {method}; allowed: files that are not")
    files = WeightFiles(base)
    quantization = nf4_config(_DTYPE)
    weights = _weights_of(config, quantization, files, base)
    check_space(out, sum(weight.nbytes for weight in weights))
    try:
        with staged_folder(out) as folder:
            written = _write_weights(folder, weights, files, quantization)
            config.quantization_config = quantization
            config.dtype = _DTYPE
            config.save_pretrained(folder)
            for path in files_beside_weights(base):
                shutil.copyfile(path, folder / path.name)
            for path in folder.iterdir():
                force_to_disk(path)
    except (OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{out}: cannot be written ({reason[0]}); nothing is left of it") from error
    finally:
        files.close()
    before = sum(files[weight.stored].nbytes for weight in weights)
    return Written(before, written, sum(weight.packed for weight in weights))


def _weights_of(
    config: PretrainedConfig, quantization: BitsAndBytesConfig, files: WeightFiles, base: Path
) -> list[_Weight]:
    model = model_without_storage(config, _DTYPE, quantization, keep_head=True)
    refuse_special(model, str(base))
    names = names_in_files(model, files, str(base))
    weights = []
    for name, parameter_name, module in owners(model):
        packed = is_packed(module, parameter_name)
        # The parameter of a layer to be packed has the packed shape already, or the layer's: the version decides.
        shape = (module.out_features, module.in_features) if packed else getattr(module, parameter_name).shape
        weights.append(_Weight(name, names[name], torch.Size(shape), packed))
    if not any(weight.packed for weight in weights):
        raise UserError(f"{base}: has no linear layer that NF4 could quantise; {_ALLOWED}")
    return weights


def _write_weights(folder: Path, weights: list[_Weight], files: WeightFiles, quantization: BitsAndBytesConfig) -> int:
    """Write the weights and, if they take several files, the index; return the bytes of the weights."""
    placement = _Alone()
    groups = list(_groups(weights))
    places: dict[str, str] = {}
    total = 0
    with progress("Quantising the LLM", sum(files[weight.stored].nbytes for weight in weights)) as bar:
        for number, group in enumerate(groups, start=1):
            file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
            tensors: dict[str, Tensor] = {}
            for weight in group:
                tensors |= _tensors_of(weight, files, placement, quantization)
                bar.update(files[weight.stored].nbytes)
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
    weight: _Weight, files: WeightFiles, placement: _Alone, quantization: BitsAndBytesConfig
) -> dict[str, Tensor]:
    """Return what the new files hold of a weight, under the names that bitsandbytes gives the parts."""
    if not weight.packed:
        return {weight.name: files.read(weight.stored).to(_DTYPE).view(weight.shape)}
    flat, _, state = quantise_piece(weight.shape, weight.stored, files, _DTYPE, placement, quantization)
    # Copies: bitsandbytes may share a code between states, which a safetensors file cannot hold.
    parts = {f"{weight.name}.{key}": part.cpu().clone() for key, part in state.as_dict(packed=True).items()}
    return {weight.name: flat.view(-1, 1).cpu(), **parts}
