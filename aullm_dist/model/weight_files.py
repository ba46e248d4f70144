"""A model's safetensors files, read in pieces: any run of elements of any tensor, by plain reads that are counted.

The library maps whole files into memory. Here a process reads the part it needs and no more, so that several processes
can share the reading of one checkpoint and none of them ever holds it.
"""

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from aullm_dist.errors import UserError

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100 * 2**20
_ALLOWED = "allowed: model.safetensors, or all files that model.safetensors.index.json names, complete as published"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor stands: `numel` elements from byte `start` of `file`."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return self.numel * self.dtype.itemsize


class WeightFiles:
    """The tensors of a model folder by name; all headers are read and checked at once, no weight is.

    Args:
        folder: local folder with model.safetensors, or with an index and the files it names.

    Attributes:
        bytes_read: what `read` has read in this process, headers not counted.

    Raises:
        UserError: a file is missing, truncated or no safetensors file, or lacks what the index says it holds.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._handles: dict[Path, int] = {}
        single = self.folder / "model.safetensors"
        index = self.folder / "model.safetensors.index.json"
        if index.is_file() and not single.is_file():
            places = _read_index(index)
            files = [self.folder / name for name in sorted(set(places.values()))]
        else:
            places, files = None, [single]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"backbone {folder}: {missing[0]} is missing ({len(missing)} of {len(files)}); {_ALLOWED}")
        self.tensors: dict[str, StoredTensor] = {}
        for file in files:
            self.tensors |= _read_header(file)
        lost = sorted(name for name in places or () if name not in self.tensors)
        if lost:
            raise UserError(f"backbone {folder}: {places[lost[0]]} does not hold {lost[0]}; {_ALLOWED}")

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return elements `first` up to, not including, `last` of a tensor's flat values, in its stored dtype."""
        stored = self.tensors[name]
        last = stored.numel if last is None else last
        buffer = torch.empty((last - first) * stored.dtype.itemsize, dtype=torch.uint8)
        view, done = memoryview(buffer.numpy()), 0
        handle = self._handle(stored.file)
        while done < len(view):
            offset = stored.start + first * stored.dtype.itemsize + done
            try:
                count = os.preadv(handle, [view[done:]], offset)
            except OSError as error:
                raise UserError(f"{stored.file}: cannot be read ({error.strerror}); {_ALLOWED}") from error
            if count == 0:
                raise UserError(f"{stored.file}: ends inside {name}; it was cut while it was read")
            done += count
        self.bytes_read += done
        return buffer.view(stored.dtype)

    def close(self) -> None:
        """Close all files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _handle(self, file: Path) -> int:
        if file not in self._handles:
            self._handles[file] = os.open(file, os.O_RDONLY)
        return self._handles[file]


def _read_index(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index}: is no index of safetensors files; {_ALLOWED}") from error
    return places


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a file; format: 8 bytes length, that many bytes of JSON, then the values.

    Source: the safetensors format, https://github.com/huggingface/safetensors#format.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_LONGEST_HEADER, max(size - 8, 0)):
            raise UserError(f"{file}: is truncated or no safetensors file; {_ALLOWED}")
        try:
            header = dict(json.loads(stream.read(length)))
            header.pop("__metadata__", None)
            entries = [
                (name, str(entry["dtype"]), tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
                for name, entry in header.items()
            ]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}: has a damaged header; {_ALLOWED}") from error
    tensors, end = {}, 0
    for name, dtype, shape, begin, stop in entries:
        if dtype not in _DTYPES:
            raise UserError(f"{file}: {name} has dtype {dtype}; allowed: {', '.join(_DTYPES)}")
        stored = StoredTensor(file, _DTYPES[dtype], shape, 8 + length + begin)
        if begin < 0 or stored.nbytes != stop - begin:
            raise UserError(f"{file}: {name} has {stop - begin} bytes for shape {shape}; {_ALLOWED}")
        tensors[name], end = stored, max(end, stop)
    if 8 + length + end != size:
        raise UserError(f"{file}: is truncated, {size} bytes of {8 + length + end}; {_ALLOWED}")
    return tensors
