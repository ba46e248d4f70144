"""Reads prepared clips on disk as rows, from Arrow or Parquet files; only an index is held in memory.

Arrow files (`datasets.save_to_disk`) are mapped into memory. Parquet files hold one clip per row group, so that a clip
is read alone, and can be streamed in order from anywhere that `datasets` reads.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from aullm_dist.data.records import INFO_NAME, check_arrow_records
from aullm_dist.errors import UserError, file_errors
from aullm_dist.files import is_taken

__all__ = ["ClipTable", "is_dataset", "open_part", "parquet_files", "read_rows", "write_arrow", "write_parquet"]

_COLUMNS = set("sample_id corpus subject aus num_frames height width frame_numbers frames".split())
_INFO = ["sample_id", "subject", "corpus", "aus", "height", "width"]
# Files enough to divide among the processes of a large run, few enough to list.
CLIPS_PER_FILE = 64
_ARROW_FILE_BYTES = 500_000_000


_DAMAGED = (OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RuntimeError)


class _Part(Protocol):
    """One prepared dataset."""

    column_names: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> dict[str, Any]: ...

    def info(self) -> Iterator[dict[str, Any]]:
        """Yield what is known of each clip besides its frames."""
        ...


@contextmanager
def _damage_told(where: str) -> Iterator[None]:
    """Turn what Arrow, Parquet and `datasets` raise over damaged files into a line.

    Raises:
        UserError: In place of theirs.
    """
    import pyarrow

    try:
        yield
    except UserError:
        raise
    except _DAMAGED as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "Feature type" in first_line:
            raise UserError(
                f"{where}: holds what datasets {version('datasets')} does not know ({first_line:.80}); it was written "
                "by a newer one: update datasets, or prepare the corpus again here"
            ) from error
        raise UserError(f"{where}: damaged ({first_line}); prepare the corpus again") from error
    except pyarrow.ArrowException as error:
        raise UserError(f"{where}: damaged ({str(error).splitlines()[0]}); prepare the corpus again") from error


class _ArrowPart:
    def __init__(self, folder: Path) -> None:
        import datasets

        self._folder = folder
        check_arrow_records(folder)
        self._dataset = datasets.load_from_disk(str(folder))
        # The files are mapped into memory: places that lead out of them would end the process.
        self._dataset.data.table.validate(full=True)
        self.column_names = self._dataset.column_names

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, row: int) -> dict[str, Any]:
        with _damage_told(str(self._folder)):
            return self._dataset[row]

    def info(self) -> Iterator[dict[str, Any]]:
        with _damage_told(str(self._folder)):
            rows = list(self._dataset.select_columns(_INFO))
        yield from rows


class _ParquetPart:
    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as pq

        self._files = parquet_files(folder)
        first = pq.ParquetFile(self._files[0])
        self.column_names = first.schema_arrow.names
        groups = [pq.read_metadata(file) for file in self._files]
        for file, metadata in zip(self._files, groups, strict=True):
            if metadata.num_row_groups != metadata.num_rows:
                raise ValueError(f"{file.name}: more than one clip in a row group")
        self._starts = np.cumsum([0, *(metadata.num_rows for metadata in groups)])
        self._open: tuple[int, int, Any] | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> dict[str, Any]:
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        with _damage_told(str(self._files[number])):
            return self._file(number).read_row_group(row - int(self._starts[number])).to_pylist()[0]

    def _file(self, number: int) -> Any:
        import pyarrow.parquet as pq

        # A loader process forked from this one must not share its place in a file.
        if self._open is None or self._open[:2] != (os.getpid(), number):
            self._open = (os.getpid(), number, pq.ParquetFile(self._files[number]))
        return self._open[2]

    def info(self) -> Iterator[dict[str, Any]]:
        import pyarrow.parquet as pq

        for file in self._files:
            with _damage_told(str(file)):
                rows = pq.read_table(file, columns=_INFO).to_pylist()
            yield from rows


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a dataset that `aullm-dist prepare` wrote.

    Raises:
        UserError: It cannot be looked at.
    """
    with file_errors(str(folder)):
        return (folder.is_dir() and is_taken(folder / INFO_NAME)) or bool(parquet_files(folder))


def parquet_files(folder: Path) -> list[Path]:
    """Return the Parquet files of a prepared dataset, in order; none for one of Arrow files."""
    return sorted(folder.glob("clips-*.parquet"))


def read_rows(files: Sequence[str], names: frozenset[str]) -> Iterator[dict[str, Any]]:
    """Yield the clips called `names`, in the order of the files; of the others only the names are read."""
    import pyarrow.parquet as pq

    for file in files:
        with _damage_told(file):
            opened = pq.ParquetFile(file)
        with opened:
            with _damage_told(file):
                listed = opened.read(columns=["sample_id"]).column(0).to_pylist()
            for group, name in enumerate(listed):
                if name in names:
                    with _damage_told(file):
                        row = opened.read_row_group(group).to_pylist()[0]
                    yield row


def open_part(folder: Path) -> _Part:
    """Open a prepared dataset.

    Raises:
        UserError: it is missing, damaged, empty, or lacks a column.
    """
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{folder}: the name is no UTF-8, and cannot be opened as a dataset; rename it") from error
    if not is_dataset(folder):
        raise UserError(f"{folder}: no prepared dataset; write one with aullm-dist prepare CORPUS --out DIR")
    with _damage_told(str(folder)):
        part: _Part = _ParquetPart(folder) if parquet_files(folder) else _ArrowPart(folder)
    missing = _COLUMNS - set(part.column_names)
    if missing:
        raise UserError(f"{folder}: column {sorted(missing)[0]!r} is missing; prepare the corpus again")
    if len(part) == 0:
        raise UserError(f"{folder}: holds no clip; see its report.json for what was skipped and why")
    return part


class ClipTable:
    """Rows of several prepared datasets behind one index."""

    def __init__(self, parts: Sequence[_Part], rows: np.ndarray | None = None) -> None:
        self._parts = tuple(parts)
        if rows is None:
            rows = np.array([(p, r) for p, part in enumerate(parts) for r in range(len(part))])
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = self._rows[index].tolist()
        return self._parts[part][row]

    def select(self, indices: Sequence[int]) -> "ClipTable":
        """Return the table of these rows, in this order; it can return no other."""
        return ClipTable(self._parts, self._rows[np.asarray(indices, dtype=np.int64)])


def write_parquet(shards: Iterable[Path], folder: Path) -> None:
    """Write the clips of Arrow streams to `clips-00000.parquet` and so on, one clip in memory at a time."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True)
    writer: Any = None
    for count, batch in enumerate(_clips_of(shards)):
        if count % CLIPS_PER_FILE == 0:
            if writer is not None:
                writer.close()
            writer = pq.ParquetWriter(folder / f"clips-{count // CLIPS_PER_FILE:05d}.parquet", batch.schema)
        writer.write_batch(batch, row_group_size=1)
    if writer is not None:
        writer.close()


def write_arrow(shards: Iterable[Path], folder: Path, fingerprint: str) -> None:
    """Write the clips of Arrow streams as `datasets.load_from_disk` reads them, one clip in memory at a time.

    `Dataset.save_to_disk` of all shards together would hold the whole corpus in memory.
    """
    import datasets
    import pyarrow as pa

    folder.mkdir(parents=True)
    files: list[Path] = []
    writer: Any = None
    size = 0
    for batch in _clips_of(shards):
        if writer is None or size > _ARROW_FILE_BYTES:
            if writer is not None:
                writer.close()
            size = 0
            files.append(folder / f"part-{len(files):05d}.arrow")
            writer = pa.ipc.new_stream(str(files[-1]), batch.schema)
        writer.write_batch(batch)
        size += batch.nbytes
    assert writer is not None, "a dataset has clips"
    writer.close()
    names = [f"data-{number:05d}-of-{len(files):05d}.arrow" for number in range(len(files))]
    for file, name in zip(files, names, strict=True):
        file.rename(folder / name)
    datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(batch.schema)).write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": fingerprint[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2, sort_keys=True) + "\n")


def _clips_of(shards: Iterable[Path]) -> Iterator[Any]:
    """Yield the record batches of Arrow streams, one clip each, without mapping a file for longer than it is read."""
    import pyarrow as pa

    for shard in shards:
        with pa.OSFile(str(shard)) as source, pa.ipc.open_stream(source) as stream:
            for batch in stream:
                assert batch.num_rows == 1
                yield batch
