"""Writes and checks MANIFEST.json of a prepared dataset: size and SHA-256 of each of its files.

Neither Arrow nor Parquet files as they are written here carry checksums of their own: zeros in them would be black
frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from aullm_dist.data.tables import is_dataset, parquet_files
from aullm_dist.errors import UserError, file_errors
from aullm_dist.files import is_taken, write_bytes
from aullm_dist.log import get_logger, is_first_of_machine
from aullm_dist.signed import file_sha256, read_signed, signed_bytes

__all__ = ["MANIFEST_NAME", "VerifiedDataset", "check_dataset", "verify_dataset", "write_dataset_manifest"]

logger = get_logger(__name__)

MANIFEST_NAME = "MANIFEST.json"
_FORMAT, _VERSION = "aullm-dist dataset", 1
_LARGE = 4_000_000_000
"""Bytes whose hashing takes long enough to be announced."""


@dataclass(frozen=True, slots=True)
class VerifiedDataset:
    """What became of comparing a dataset with its manifest."""

    num_files: int
    num_bytes: int
    problems: tuple[str, ...]


def write_dataset_manifest(folder: Path) -> None:
    """Describe every file that `folder` holds now."""
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST_NAME
    }
    content = {"format": _FORMAT, "format_version": _VERSION, "files": files}
    write_bytes(folder / MANIFEST_NAME, signed_bytes(content))


def verify_dataset(folder: Path, mode: Literal["hash", "size"] = "hash") -> VerifiedDataset | None:
    """Compare a dataset with its manifest; None where it has none, as those of earlier versions.

    Args:
        folder: A folder that `aullm-dist prepare` wrote.
        mode: `hash` reads every byte, `size` compares sizes alone.
    """
    with file_errors(str(folder)):
        return _verify(folder, mode)


def _verify(folder: Path, mode: str) -> VerifiedDataset | None:
    if not is_taken(folder / MANIFEST_NAME):
        return None
    try:
        files: Mapping[str, Any] = read_signed(folder / MANIFEST_NAME, _FORMAT, _VERSION)["files"]
    except UserError as error:
        return VerifiedDataset(0, 0, (str(error),))
    problems = [problem for name in files if (problem := _problem(folder / name, files[name], mode))]
    # Of Arrow files state.json says which are read; of Parquet files whatever lies there is.
    extra = [path for path in parquet_files(folder) if path.name not in files]
    problems += [f"{path}: is not of this dataset; move it away" for path in extra]
    return VerifiedDataset(len(files), sum(entry["size"] for entry in files.values()), tuple(problems))


def _problem(path: Path, entry: Mapping[str, Any], mode: str) -> str:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return f"{path}: {size} bytes, {entry['size']} when it was prepared"
        if mode == "hash" and file_sha256(path) != entry["sha256"]:
            return f"{path}: altered since it was prepared (its SHA-256 differs)"
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return ""


def check_dataset(folder: Path) -> None:
    """Refuse a dataset that is not as it was prepared; one process of each machine reads it, the others rely on that.

    Raises:
        UserError: A file of it is missing or altered.
    """
    if not is_first_of_machine() or not is_dataset(folder):
        return
    with file_errors(str(folder)):
        _check(folder)


def _check(folder: Path) -> None:
    size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    if size > _LARGE:
        logger.info("%s: comparing %.0f GB with their hashes", folder, size / 1e9)
    found = verify_dataset(folder)
    if found is None:
        logger.info("%s: prepared without hashes: damage on disk would not show; prepare it again to have them", folder)
    elif found.problems:
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        raise UserError(
            f"{folder}: damaged: {found.problems[0]}{more}; copy it again, or remove it and prepare the corpus again"
        )
