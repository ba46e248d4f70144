"""What a merge writes, byte by byte, and the pieces in which it is done: known before anything is read or written.

The files are those of the base: same names, same tensors in the same order. NF4 parts of a prepared base go, as their
weights become dense again. Weights are computed in units of whole rows and whole NF4 blocks that depend on nothing but
their shape, so that no byte depends on the memory or on where a killed merge went on.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import PretrainedConfig

from aullm_dist.errors import UserError
from aullm_dist.model.nf4 import BLOCK
from aullm_dist.model.piecewise import model_without_storage, names_in_files
from aullm_dist.model.quantization import nf4_config
from aullm_dist.model.weight_files import DTYPE_NAMES, StoredTensor, WeightFiles
from aullm_dist.release.merge_adapter import FEWEST_ROWS, Adapter, Delta

How = Literal["verbatim", "cast", "round_trip", "unpack"]
UNIT_WEIGHTS = 2**18
"""Weights computed at a time, about: their float32 form stays in a core's own cache."""
LARGEST_PIECE = 2**21
"""Weights read at a time, at most: larger pieces leave the caches before they are written, and make nothing faster."""
CHUNK = 2**20
"""Weights read at a time for the constants of a whole weight."""
_PACKED = ".weight.absmax"
_MIB = 2**20
_FIXED = 64 * _MIB
"""Once per merge: the model without storage, threads and what the libraries make at their first call."""
_UNIT_BYTES = 40
"""At most, per weight of a unit: float32 twice, and what NF4 needs meanwhile."""
_BLOCK_BYTES = 24
"""Per NF4 block: its constants, and what double quantisation needs meanwhile."""


@dataclass(frozen=True, slots=True)
class Merged:
    """One tensor of the new files."""

    name: str
    """In the base's files and in the new ones."""
    source: StoredTensor
    how: How
    shape: tuple[int, ...]
    dtype: torch.dtype
    delta: Delta | None
    start: int
    """Its first byte in the new file."""

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Weights of a row; tensors that stay as they are have rows of one."""
        return self.shape[1] if self.delta is not None else 1

    @property
    def unit(self) -> int:
        """Weights computed at a time: whole rows, whole blocks, and no product of few rows (`merge_rows`)."""
        step = math.lcm(self.columns * FEWEST_ROWS, BLOCK)
        return max(1, UNIT_WEIGHTS // step) * step

    @property
    def source_bytes(self) -> float:
        """Bytes per weight that are read."""
        return self.source.nbytes / self.numel

    @property
    def state_bytes(self) -> int:
        """Bytes that are held as long as it is worked on."""
        blocks = self.numel // BLOCK * _BLOCK_BYTES if self.how in ("round_trip", "unpack") else 0
        return blocks + (self.delta.nbytes if self.delta else 0)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A new file: its header, then its tensors."""

    name: str
    header: bytes
    tensors: tuple[Merged, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive weights of one tensor, whole units but for the end."""

    tensor: Merged
    first: int
    last: int

    @property
    def start(self) -> int:
        """Its first byte in the new file."""
        return self.tensor.start + self.first * self.tensor.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the new file."""
        return (self.last - self.first) * self.tensor.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Plan:
    """Every file of a merge."""

    files: tuple[OutputFile, ...]

    @property
    def tensors(self) -> list[Merged]:
        """Every tensor, in the order in which it is written."""
        return [tensor for file in self.files for tensor in file.tensors]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def index(self) -> bytes | None:
        """Return the index of several files, None for a single one."""
        if [file.name for file in self.files] == ["model.safetensors"]:
            return None
        places = {tensor.name: file.name for file in self.files for tensor in file.tensors}
        total = sum(tensor.numel * tensor.dtype.itemsize for tensor in self.tensors)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        return (json.dumps(content, indent=2) + "\n").encode("utf-8")


def plan_merge(
    config: PretrainedConfig,
    files: WeightFiles,
    adapter: Adapter,
    *,
    quantised: Sequence[str],
    stored_in_nf4: bool,
    nf4_exact: bool,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> Plan:
    """Plan a merge, and refuse what does not belong together.

    Args:
        config: of the base.
        files: the base's.
        adapter: of the checkpoint.
        quantised: layers that were in NF4 while the adapter was trained.
        stored_in_nf4: whether the base's files hold them packed.
        nf4_exact: whether the deltas go onto the weights as NF4 has them.
        compute: dtype that the run computed in.
        dtype: of the new weights.

    Raises:
        UserError: a weight of the base is missing, an adapter tensor fits none of its weights, or the layers in NF4 are
            not those of the run.
    """
    source = str(files.folder)
    model = model_without_storage(
        config,
        compute,
        nf4_config(compute) if stored_in_nf4 else None,
        files if stored_in_nf4 else None,
        keep_head=True,
    )
    names = names_in_files(model, files, source)
    weights = {name.removesuffix(".weight"): stored for name, stored in names.items() if name.endswith(".weight")}
    shapes = {
        stored: (model.get_submodule(module).out_features, model.get_submodule(module).in_features)
        for module, stored in weights.items()
        if hasattr(model.get_submodule(module), "out_features")
    }
    deltas = _by_weight(adapter, weights, shapes, source)
    unknown = [name for name in quantised if name not in weights]
    if unknown:
        raise UserError(f"{source}: has no layer {unknown[0]}, which the checkpoint's run held in NF4")
    in_nf4 = {weights[name] for name in quantised}
    if stored_in_nf4:
        packed = {name.removesuffix(".absmax") for name in files.tensors if name.endswith(_PACKED)}
        odd = sorted(packed ^ in_nf4)
        if odd:
            raise UserError(f"{source}: {odd[0]} is in NF4 either here or in the checkpoint's run, not in both")
    narrow = [name for name in quantised if shapes[weights[name]][1] % BLOCK] if nf4_exact else []
    if narrow:
        # bitsandbytes 0.50 gives such rows the constants of others on CPUs, and the right ones on GPUs.
        raise UserError(
            f"{source}: {narrow[0]} has rows of {shapes[weights[narrow[0]]][1]} weights; what NF4 makes of rows "
            f"that are no multiples of {BLOCK} depends on the device; allowed: --base bf16"
        )
    hows: dict[str, How] = dict.fromkeys(in_nf4, "unpack" if stored_in_nf4 else "round_trip") if nf4_exact else {}
    return Plan(tuple(_output_files(files, hows, deltas, shapes, dtype)))


def _by_weight(
    adapter: Adapter, weights: Mapping[str, str], shapes: Mapping[str, tuple[int, int]], source: str
) -> dict[str, Delta]:
    """Return the deltas by their weight's name in the base's files: each one belongs to one weight, none is left."""
    deltas: dict[str, Delta] = {}
    for module, delta in adapter.deltas.items():
        stored = weights.get(module)
        if stored is None or shapes.get(stored) != delta.shape:
            what = "no such linear layer" if stored not in shapes else f"there a layer of shape {shapes[stored]}"
            raise UserError(
                f"{adapter.path}: {delta.down} belongs to a layer of shape {delta.shape}, and {source} has {what}; "
                "allowed: the adapter's own base"
            )
        deltas[stored] = delta
    assert sum(len(delta.keys) for delta in deltas.values()) == len(adapter.files.tensors)
    return deltas


def _output_files(
    files: WeightFiles,
    hows: Mapping[str, How],
    deltas: Mapping[str, Delta],
    shapes: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
) -> Iterator[OutputFile]:
    by_file: dict[Path, list[str]] = {file: [] for file in files.metadata}
    for name, stored in files.tensors.items():
        # What stands beside a packed weight goes with its packing.
        if f"{name.rpartition('.weight.')[0]}.weight" not in hows:
            by_file[stored.file].append(name)
    for file, names in by_file.items():
        kinds = {
            name: (files[name].dtype, files[name].shape)
            if not files[name].dtype.is_floating_point and name not in hows
            else (dtype, shapes[name] if name in hows else files[name].shape)
            for name in names
        }
        header, places = _header(kinds, files.metadata[file])
        tensors = []
        for name, (kind, shape) in kinds.items():
            how = hows.get(name, "cast" if kind.is_floating_point else "verbatim")
            start = len(header) + places[name]
            tensors.append(Merged(name, files[name], how, tuple(shape), kind, deltas.get(name), start))
        end = tensors[-1] if tensors else None
        size = end.start + end.numel * end.dtype.itemsize if end else len(header)
        yield OutputFile(file.name, header, tuple(tensors), size)


def _header(
    kinds: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Return a safetensors header, and where each tensor begins behind it."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    places, end = {}, 0
    for name, (dtype, shape) in kinds.items():
        places[name], end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [places[name], end]}
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, places


@dataclass(frozen=True, slots=True)
class Sizes:
    """How a merge keeps within its memory."""

    piece: int
    """Weights read at a time, at most, where a unit is not larger."""
    slots: int
    """Pieces in memory at a time."""
    slot_bytes: int
    """Of a piece as it is read, at most."""
    out_bytes: int
    """Of a piece as it is written, where that is not done in place; 0 if it always is."""


def in_place(tensor: Merged) -> bool:
    """Whether a tensor's pieces are written from where they were read to."""
    return tensor.how in ("verbatim", "cast", "round_trip") and tensor.source.dtype == tensor.dtype


def size_pieces(plan: Plan, max_ram: int, workers: int) -> Sizes:
    """Return the largest pieces with which a merge stays within `max_ram` bytes, worked on by `workers` at most.

    Raises:
        UserError: even one worker with the smallest pieces does not; names the least that is needed.
    """
    tensors = [tensor for tensor in plan.tensors if tensor.numel]
    unit = max(tensor.unit for tensor in tensors)
    read = max(tensor.source_bytes for tensor in tensors)
    write = max((tensor.dtype.itemsize for tensor in tensors if not in_place(tensor)), default=0)
    state = max(tensor.state_bytes for tensor in tensors)
    factors = max(tensor.delta.nbytes if tensor.delta else 0 for tensor in tensors)
    for some in range(workers, 0, -1):
        slots = some + 2
        # Two weights may be done in part, those between them are no larger than their pieces.
        fixed = _FIXED + some * (_UNIT_BYTES * unit + 16 * CHUNK) + 2 * state + slots * factors
        per_weight = slots * (read + write + _BLOCK_BYTES / BLOCK)
        least = math.ceil((fixed + unit * per_weight) / _MIB) * _MIB
        if least <= max_ram:
            piece = max(unit, min(LARGEST_PIECE, int((max_ram - fixed) / per_weight)))
            return Sizes(piece, slots, math.ceil(piece * read), piece * write)
    raise UserError(
        f"--max-ram is {max_ram / _MIB:.0f} MiB; this merge needs at least {least // _MIB} MiB ({slots} pieces of "
        "weights at a time, and LoRA factors and NF4 constants of the largest layer)"
    )


def pieces(file: OutputFile, begin: int, piece: int) -> Iterator[Piece]:
    """Yield the pieces of a file from byte `begin` on, in order."""
    for tensor in file.tensors:
        first = max(0, begin - tensor.start) // tensor.dtype.itemsize
        step = max(1, piece // tensor.unit) * tensor.unit
        for start in range(first, tensor.numel, step):
            yield Piece(tensor, start, min(start + step, tensor.numel))
