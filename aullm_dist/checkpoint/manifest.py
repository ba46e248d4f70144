"""Writes and checks MANIFEST.json: the files of a checkpoint with their hashes, its tensors with their shapes.

The manifest is written last. It carries a hash of its own bytes, so that an altered manifest shows as well as an
altered file. Nothing here needs torch: `aullm-dist checkpoint verify` reads the headers of safetensors files itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from aullm_dist.checkpoint.atomic import STEP_PATTERN, write_durably
from aullm_dist.checkpoint.entries import FileEntry, Manifest, ManifestFacts, TensorEntry, TensorTable
from aullm_dist.errors import UserError
from aullm_dist.signed import file_sha256, read_signed, signed_bytes
from aullm_dist.versions import library_versions

MANIFEST_NAME = "MANIFEST.json"
FORMAT_NAME = "aullm-dist checkpoint"
FORMAT_VERSION = 1
VerifyMode = Literal["hash", "size"]

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


def tensor_table(path: Path) -> dict[str, TensorEntry]:
    """Return the dtype and shape of every tensor of a safetensors file, read from its header alone.

    Returns:
        The tensors sorted by name. Source of the layout: the safetensors format description (8 bytes little-endian
        header length, then a JSON header).

    Raises:
        ValueError: If the file has no such header.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: not a safetensors file (header length {length})")
        header = json.loads(file.read(length))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {name: TensorEntry.from_json(entries[name]) for name in sorted(entries)}


def file_entry(path: Path) -> FileEntry:
    """Return size and hash of a file."""
    return FileEntry(path.stat().st_size, file_sha256(path))


def write_manifest(folder: Path, *, step: int, world_size: int, facts: ManifestFacts) -> None:
    """Describe every file that `folder` holds now, and write MANIFEST.json last.

    Args:
        folder: A folder whose files are complete and on disk.
        step: Optimizer steps completed.
        world_size: Number of processes of the run that saved.
        facts: What cannot be read from the files.
    """
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST_NAME)
    manifest = Manifest(
        format=FORMAT_NAME,
        format_version=FORMAT_VERSION,
        step=step,
        world_size=world_size,
        versions=library_versions(),
        files={path.name: file_entry(path) for path in files},
        tensors={path.name: tensor_table(path) for path in files if path.suffix == ".safetensors"},
        parameters=facts.parameters,
        quantized_modules=facts.quantized_modules,
        base=facts.base,
        config=facts.config,
    )
    write_signed(folder / MANIFEST_NAME, manifest.to_json())


def write_signed(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest durably, with a hash of its own bytes as the last entry."""
    write_durably(path, signed_bytes(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check MANIFEST.json; the files that it describes are not looked at (`verify_checkpoint` does that).

    Raises:
        UserError: If the manifest is missing, altered, truncated, or of a format that this version does not read.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise UserError(f"{path}: missing; a folder without it is no complete checkpoint")
    content = read_signed(path, FORMAT_NAME, FORMAT_VERSION)
    try:
        return Manifest.from_json(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(
            f"{path}: lacks the entry {error}; it was written by a program other than aullm-dist"
        ) from error


def verify_checkpoint(folder: Path | str, mode: VerifyMode = "hash") -> list[str]:
    """Compare a checkpoint folder with its manifest.

    Args:
        folder: The checkpoint folder.
        mode: `"hash"` reads every byte; `"size"` trusts files of the right size whose tensor header is right.

    Returns:
        One line per problem, each naming the file; empty if the checkpoint is valid. A file that the manifest does not
        list is no problem, because nothing reads it (`extra_files` names them).
    """
    folder = Path(folder)
    if not folder.is_dir():
        return [f"{folder}: no such folder"]
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    problems = []
    named = STEP_PATTERN.fullmatch(folder.name)
    if named and int(named.group(1)) != manifest.step:
        problems.append(f"{folder}: the folder's name says step {int(named.group(1))}, its manifest {manifest.step}")
    for name, entry in manifest.files.items():
        problem = file_problem(folder / name, entry, manifest.tensors.get(name), mode)
        if problem:
            problems.append(problem)
    return problems


def file_problem(path: Path, entry: FileEntry, table: TensorTable | None, mode: VerifyMode) -> str | None:
    """Return what is wrong with one file that a manifest lists, or None.

    Args:
        path: The file.
        entry: Its size and hash.
        table: Its `tensor_table`, None for a file without tensors.
        mode: As in `verify_checkpoint`.
    """
    if not path.is_file():
        return f"{path}: missing"
    try:
        size = path.stat().st_size
        if size != entry.size:
            kind = "truncated" if size < entry.size else "too long"
            return f"{path}: {kind} ({size} bytes, the manifest says {entry.size})"
        if mode == "hash" and file_sha256(path) != entry.sha256:
            return f"{path}: altered (its SHA-256 differs from the manifest's)"
        if table is not None and tensor_table(path) != table:
            return f"{path}: altered (its tensors differ from the manifest's)"
    except OSError as error:
        return f"{path}: cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{path}: altered (its tensor header cannot be read)"
    return None


def extra_files(folder: Path | str) -> list[str]:
    """Return the names of files in a checkpoint folder that its manifest does not list, hidden ones left out.

    Raises:
        UserError: If the manifest cannot be trusted.
    """
    folder = Path(folder)
    known = {MANIFEST_NAME, *read_manifest(folder).files}
    return sorted(path.name for path in folder.iterdir() if path.name not in known and not path.name.startswith("."))
