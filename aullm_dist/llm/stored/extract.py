"""Writes the text decoder of a multimodal model as an ordinary folder: bit for bit the wrapper's own weights.

Tensors are copied as they stand in the files, one output file in memory at a time.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file

from aullm_dist.errors import UserError
from aullm_dist.files import write_text
from aullm_dist.llm.base_check import check_files
from aullm_dist.llm.files import load_config
from aullm_dist.llm.stored.weight_files import WeightFiles, check_space, weight_files
from aullm_dist.llm.stored.wrappers import alone, alone_in_file, open_base, staged_decoder, wrapper_type

_FILE_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True)
class Extracted:
    """What was written."""

    model_type: str
    wrapper: str
    nbytes: int
    bytes_of_wrapper: int


def extract_decoder(source: Path, out: Path) -> Extracted:
    """Write the text decoder of a multimodal model as a folder that loads as a causal LM.

    Args:
        source: local folder of the multimodal model.
        out: the folder to be written; appears only when it is complete.

    Raises:
        UserError: `out` is there already, `source` holds no decoder inside another model, the disk is too small.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; give a folder that does not")
    if not (source / "config.json").is_file():
        raise UserError(f"{source}: is no local model folder (no config.json in it); allowed: a multimodal model's")
    config = load_config(str(source), {"trust_remote_code": False, "local_files_only": True})
    wrapper = wrapper_type(source)
    if wrapper is None:
        raise UserError(f"{source}: is a text decoder by itself ({config.model_type}); there is nothing to extract")
    check_files(str(source), source, config)
    files = open_base(source, config)
    size = sum(tensor.nbytes for tensor in files.tensors.values())
    check_space(out, size)
    with staged_decoder(out, source, files) as folder:
        _write_weights(folder, files)
        described = alone_in_file(alone(config, files.tensors), json.loads((source / "config.json").read_text()))
        write_text(folder / "config.json", json.dumps(described, indent=2) + "\n")
    return Extracted(config.model_type, wrapper, size, sum(file.stat().st_size for file in weight_files(source)))


def _write_weights(folder: Path, files: WeightFiles) -> None:
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in files.tensors.items():
        if groups[-1] and size + tensor.nbytes > _FILE_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    places: dict[str, str] = {}
    for number, names in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {name: files.read(name).view(files[name].shape) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
        # Before the next file's first tensor comes on top of it.
        tensors.clear()
    if len(groups) > 1:
        total = sum(tensor.nbytes for tensor in files.tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
