"""Reads a model's safetensors files in pieces: any run of elements of any tensor, by plain reads that are counted.

The library maps whole files into memory. Here a process reads the part it needs and no more, so that several processes
can share the reading of one checkpoint and none of them ever holds it.
"""

import json
import math
import os
import shutil
import struct
import threading
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
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""What the format calls a dtype."""
_LONGEST_HEADER = 100 * 2**20
_ALLOWED = "allowed: model.safetensors, or all files that model.safetensors.index.json names, complete as published"
_BESIDE_WEIGHTS = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_LICENCES = ("LICENSE", "NOTICE", "USE_POLICY")


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


def weight_files(folder: Path, name: str = "model.safetensors") -> list[Path]:
    """Return the files of a model folder that hold its weights: `name`, or those that its index names.

    Raises:
        UserError: the index cannot be read.
    """
    places = _places(folder, name)
    return [folder / name] if places is None else [folder / file for file in sorted(set(places.values()))]


class WeightFiles:
    """The tensors of a model folder by name; all headers are read and checked at once, no weight is.

    Args:
        folder: local folder with `name`, or with an index and the files it names.
        name: of the file that holds all tensors where there is one alone.

    Attributes:
        tensors: every tensor, file after file and in the order in which they stand there.
        metadata: what each file's header says besides.
        bytes_read: what `read` has read in this process, headers not counted.

    Raises:
        UserError: a file is missing, truncated or no safetensors file, or lacks what the index says it holds.
    """

    def __init__(self, folder: Path | str, name: str = "model.safetensors") -> None:
        self.folder = Path(folder)
        self.bytes_read = 0
        self._handles: dict[Path, int] = {}
        self._opening = threading.Lock()
        places = _places(self.folder, name)
        files = weight_files(self.folder, name)
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"backbone {folder}: {missing[0]} is missing ({len(missing)} of {len(files)}); {_ALLOWED}")
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[Path, dict[str, str]] = {}
        twice: list[tuple[str, str, str]] = []
        for file in files:
            tensors, self.metadata[file] = _read_header(file)
            twice += [(name, self.tensors[name].file.name, file.name) for name in tensors if name in self.tensors]
            self.tensors |= tensors
        lost = sorted((name, file) for name, file in (places or {}).items() if name not in self.tensors)
        if lost:
            raise UserError(f"backbone {folder}: {lost[0][1]} does not hold {lost[0][0]}; {_ALLOWED}")
        if twice:
            raise UserError("backbone {}: {} stands in both {} and {}; {}".format(folder, *twice[0], _ALLOWED))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def read(self, name: str, first: int = 0, last: int | None = None) -> Tensor:
        """Return elements `first` up to, not including, `last` of a tensor's flat values, in its stored dtype."""
        stored = self.tensors[name]
        last = stored.numel if last is None else last
        buffer = torch.empty((last - first) * stored.dtype.itemsize, dtype=torch.uint8)
        self.read_into(buffer, name, first)
        self.bytes_read += len(buffer)
        return buffer.view(stored.dtype)

    def read_into(self, buffer: Tensor, name: str, first: int = 0) -> None:
        """Fill a flat uint8 buffer with a tensor's elements from `first` on; threads may call it at once."""
        stored = self.tensors[name]
        view, done = buffer.numpy().data, 0
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

    def close(self) -> None:
        """Close all files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _handle(self, file: Path) -> int:
        with self._opening:
            if file not in self._handles:
                self._handles[file] = os.open(file, os.O_RDONLY)
            return self._handles[file]


def files_beside_weights(folder: Path) -> list[Path]:
    """Return a model folder's tokenizer and generation files, and the licence, which goes where the weights go."""
    return [
        path
        for path in sorted(folder.iterdir())
        if path.is_file()
        and (path.suffix in _BESIDE_WEIGHTS or path.name.startswith(_LICENCES))
        and path.name != "config.json"
        and not path.name.endswith(".index.json")
    ]


def check_space(out: Path, needed: int) -> None:
    """Refuse to write `needed` bytes to a folder, which need not exist, on a disk that has less.

    Raises:
        UserError: naming both numbers.
    """
    there = next(folder for folder in out.absolute().parents if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise UserError(
            f"{out}: needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free on its disk; make room, or give a "
            "folder on another disk"
        )


def _places(folder: Path, name: str) -> dict[str, str] | None:
    """Return the file of each tensor by the folder's index, None where one file holds them all."""
    index = folder / f"{name}.index.json"
    return _read_index(index) if index.is_file() and not (folder / name).is_file() else None


def _read_index(index: Path) -> dict[str, str]:
    try:
        places = {str(name): str(file) for name, file in json.loads(index.read_text("utf-8"))["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{index}: is no index of safetensors files; {_ALLOWED}") from error
    for file in sorted(set(places.values())):
        # Fingerprints and merges go by the names of files; a path could lead out of the folder besides.
        if file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise UserError(f"{index}: names {file!r}; allowed: safetensors files next to it, without folders")
    return places


def _read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a file as they stand in it, and what its header says besides.

    Format: 8 bytes length, that many bytes of JSON, then the values.

    Source: the safetensors format, https://github.com/huggingface/safetensors#format.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            if not 2 <= length <= min(_LONGEST_HEADER, max(size - 8, 0)):
                raise UserError(f"{file}: is truncated or no safetensors file; {_ALLOWED}")
            text = stream.read(length)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {_ALLOWED}") from error
    try:
        header = dict(json.loads(text))
        metadata = _metadata(header.pop("__metadata__", None) or {})
        entries = [
            (name, str(entry["dtype"]), tuple(map(_count, entry["shape"])), *map(_count, entry["data_offsets"]))
            for name, entry in header.items()
        ]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{file}: has a damaged header; {_ALLOWED}") from error
    tensors, end = {}, 0
    for name, dtype, shape, begin, stop in sorted(entries, key=lambda entry: entry[3:]):
        if dtype not in _DTYPES:
            raise UserError(f"{file}: {name} has dtype {dtype}; allowed: {', '.join(_DTYPES)}")
        stored = StoredTensor(file, _DTYPES[dtype], shape, 8 + length + begin)
        if stored.nbytes != stop - begin:
            raise UserError(f"{file}: {name} has {stop - begin} bytes for shape {shape}; {_ALLOWED}")
        if begin != end:
            overlap = "overlaps the tensor before it" if begin < end else "leaves a gap behind the tensor before it"
            raise UserError(f"{file}: {name} {overlap}; {_ALLOWED}")
        tensors[name], end = stored, stop
    if 8 + length + end != size:
        what = "is truncated" if size < 8 + length + end else "has more than its header says"
        raise UserError(f"{file}: {what}, {size} bytes instead of {8 + length + end}; {_ALLOWED}")
    return tensors, metadata


def _metadata(given: dict) -> dict[str, str]:
    """Return a header's own entries, which the format has as text alone."""
    if not all(isinstance(value, str) for value in given.values()):
        raise TypeError("metadata that is no text")
    return dict(given)


def _count(value: object) -> int:
    """Return a size or an offset, which the format has as a whole number from 0."""
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no count")
    return value
