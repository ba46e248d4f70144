"""Plans a merge, byte by byte, and the pieces in which it is done, before anything is read or written.

The files are those of the base: same names, same tensors in the same order. NF4 parts of a prepared base go, as their
weights become dense again. Weights are computed in units of whole rows and whole NF4 blocks that depend on nothing but
their shape, so that no byte depends on the memory or on where a killed merge resumed.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PretrainedConfig, PreTrainedModel

from aullm_dist.errors import UserError
from aullm_dist.llm.nf4 import BLOCK
from aullm_dist.llm.pieces.skeleton import dtypes_of, model_without_storage
from aullm_dist.llm.pieces.values import values_in_files
from aullm_dist.llm.pieces.walk import owners
from aullm_dist.llm.quantization import nf4_config
from aullm_dist.llm.stored.conversion import COMPUTED, Values
from aullm_dist.llm.stored.weight_files import DTYPE_NAMES, StoredTensor, WeightFiles
from aullm_dist.merge.adapter import FEWEST_ROWS, Adapter, Delta
from aullm_dist.merge.stretches import How, Stretch, deltas_by_weight, dense, filled, stretches_of

UNIT_WEIGHTS = 2**18
"""Weights computed at a time, about: their float32 form stays in a core's own cache."""
LARGEST_PIECE = 2**21
"""Weights read at a time, at most: larger pieces leave the caches before they are written, and make nothing faster."""
CHUNK = 2**20
"""Weights read at a time for the constants of a whole weight."""
KEPT_GROUPS = 3
"""Parameters made of several tensors of which the NF4 constants are kept."""
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
    """One tensor of the new files, or a stretch of one (`stretches`)."""

    name: str
    """In the base's files and in the new ones."""
    source: StoredTensor
    how: How
    shape: tuple[int, ...]
    dtype: torch.dtype
    delta: Delta | None
    start: int
    """Its first byte in the new file."""
    called: bool
    """Whether a run calls it: not the head, nor what is none of the model's."""
    skip: int = 0
    """Its first element in the stored tensor."""
    group: Values | None = None
    """The weight that it is a part of, whose NF4 constants are of all its parts; None for one by itself."""
    place: int = 0
    """Its first element in that weight."""

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
        return self.source.nbytes / self.numel if self.how == "unpack" else self.source.dtype.itemsize

    @property
    def state_bytes(self) -> int:
        """Bytes that are held as long as it is worked on."""
        # The constants of the last groups are kept: their parts take turns in the files.
        numel = self.numel if self.group is None else KEPT_GROUPS * self.group.numel
        blocks = numel // BLOCK * _BLOCK_BYTES if self.how in ("round_trip", "unpack") else 0
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
    values = values_in_files(model, files, source)
    shapes = _linear_shapes(model)
    deltas = deltas_by_weight(adapter, values, shapes, source)
    in_nf4 = _in_nf4(quantised, values, shapes, source)
    if stored_in_nf4:
        packed = {name.removesuffix(".absmax") for name in files.tensors if name.endswith(_PACKED)}
        odd = sorted(packed ^ {values[name].runs[0].stored for name in in_nf4})
        if odd:
            raise UserError(f"{source}: {odd[0]} is in NF4 either here or in the checkpoint's run, not in both")
        values |= {name: dense(values[name], shapes[name]) for name in in_nf4}
    narrow = [name for name in in_nf4 if name in shapes and shapes[name][1] % BLOCK] if nf4_exact else []
    if narrow:
        # bitsandbytes 0.50 gives such rows the constants of others on CPUs, and the right ones on GPUs.
        raise UserError(
            f"{source}: {narrow[0].removesuffix('.weight')} has rows of {shapes[narrow[0]][1]} weights; what NF4 makes "
            f"of rows that are no multiples of {BLOCK} depends on the device; allowed: --base bf16"
        )
    hows: dict[str, How] = dict.fromkeys(in_nf4, "unpack" if stored_in_nf4 else "round_trip") if nf4_exact else {}
    stretches = stretches_of(deltas, hows, values, source)
    own = {full: kind for full, kind in dtypes_of(model, compute).items() if kind != compute}
    # The head may lack in the files.
    kept = {run.stored: kind for full, kind in own.items() if full in values for run in values[full].runs}
    dtypes = {name: kept.get(name, dtype) for name in files.tensors}
    head = model.get_output_embeddings()
    weights_called = (values[full] for full, _, module in owners(model) if module is not head)
    called = {run.stored for found in weights_called for run in found.runs}
    return Plan(tuple(_output_files(files, stretches, dtypes, called)))


def _linear_shapes(model: PreTrainedModel) -> dict[str, tuple[int, int]]:
    """Return the shape of every linear layer's weight, by the name of that, packed or not."""
    return {
        f"{name}.weight": (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if hasattr(module, "out_features") and hasattr(module, "in_features")
    }


def _in_nf4(
    quantised: Sequence[str], values: Mapping[str, Values], shapes: Mapping[str, tuple[int, int]], source: str
) -> list[str]:
    """Return the names of the weights that were in NF4 while the adapter was trained.

    Args:
        quantised: names of linear layers, and of parameters that hold fused experts.
        values: where each weight stands.
        shapes: of the linear layers, by the name of their weight.
        source: the base, for messages.

    Raises:
        UserError: there is no such weight, or the library computes it of what stands in the files.
    """
    found = []
    for name in quantised:
        is_experts = name in values and len(values[name].shape) == 3
        weight = name if is_experts else f"{name}.weight"
        if weight not in values or not (is_experts or weight in shapes):
            raise UserError(f"{source}: has no layer {name}, which the checkpoint's run held in NF4")
        if values[weight].make is not None:
            raise UserError(f"{source}: {weight} {COMPUTED}; allowed: --base bf16")
        found.append(weight)
    return found


def _output_files(
    files: WeightFiles,
    stretches: Mapping[str, list[Stretch]],
    dtypes: Mapping[str, torch.dtype],
    called: Set[str],
) -> Iterator[OutputFile]:
    # Of a wrapper only the files with something of its text decoder are left.
    used = {stored.file for stored in files.tensors.values()}
    by_file: dict[Path, list[str]] = {file: [] for file in files.metadata if file in used}
    unpacked = {name: some[0].weight for name, some in stretches.items() if some[0].how == "unpack"}
    for name, stored in files.tensors.items():
        # What is stored with a packed weight goes with its packing.
        if f"{name.rpartition('.weight.')[0]}.weight" not in unpacked:
            by_file[stored.file].append(name)
    for file, names in by_file.items():
        kinds = {}
        for name in names:
            weight, stays = unpacked.get(name), not files[name].dtype.is_floating_point
            shape = files[name].shape if weight is None else weight.shape
            kinds[name] = (files[name].dtype if stays and weight is None else dtypes[name]), tuple(shape)
        header, places = _header(kinds, files.metadata[file])
        tensors = []
        for name, (kind, shape) in kinds.items():
            start = len(header) + places[name]
            for stretch in filled(stretches.get(name, ()), math.prod(shape)):
                tensors.append(_merged(name, files[name], stretch, shape, kind, start, name in called))
        end = tensors[-1] if tensors else None
        size = end.start + end.numel * end.dtype.itemsize if end else len(header)
        yield OutputFile(file.name, header, tuple(tensors), size)


def _merged(
    name: str,
    source: StoredTensor,
    stretch: Stretch,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    start: int,
    called: bool,
) -> Merged:
    """Return what a stretch of a tensor of this shape becomes; the tensor begins at byte `start` of the new file."""
    if stretch.numel != math.prod(shape):
        columns = stretch.delta.shape[1] if stretch.delta is not None else 1
        shape = (stretch.numel // columns, columns) if stretch.delta is not None else (stretch.numel,)
    return Merged(
        name=name,
        source=source,
        how=stretch.how or ("cast" if dtype.is_floating_point else "verbatim"),
        shape=shape,
        dtype=dtype,
        delta=stretch.delta,
        start=start + stretch.first * dtype.itemsize,
        called=called,
        skip=stretch.first,
        group=stretch.group,
        place=stretch.place,
    )


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
