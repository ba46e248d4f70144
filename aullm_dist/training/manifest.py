"""MANIFEST.json: what a checkpoint folder holds, down to the hash of every file and the shape of every tensor.

The manifest is written last. It carries a hash of its own bytes, so that an altered manifest shows as well as an
altered file. Nothing here needs torch: `aullm-dist checkpoint verify` reads the headers of safetensors files itself.
"""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from aullm_dist.errors import UserError
from aullm_dist.training.atomic import STEP_PATTERN, write_durably

MANIFEST_NAME = "MANIFEST.json"
FORMAT_NAME = "aullm-dist checkpoint"
FORMAT_VERSION = 1
VerifyMode = Literal["hash", "size"]

_LIBRARIES = ("torch", "transformers", "accelerate", "peft", "safetensors", "datasets", "bitsandbytes", "deepspeed")
_UNSIGNED = b"0" * 64
# The signature is the last entry, so a text inside the recorded config can never be taken for it.
_SIGNATURE = re.compile(rb'"manifest_sha256": "([0-9a-f]{64})"\n\}\n\Z')
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_bytes(value: Any) -> bytes:
    """Return indented ASCII JSON with a final newline.

    Raises:
        ValueError: If `value` holds a number that JSON has no word for (NaN, infinity).
        TypeError: If `value` holds a type that JSON has no form for.
    """
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode("ascii")


def tensor_table(path: Path) -> dict[str, dict[str, Any]]:
    """Return the name, dtype and shape of every tensor of a safetensors file, read from its header alone.

    Returns:
        `{name: {"dtype": "F32", "shape": [2, 3]}}`, sorted by name. Source of the layout: the safetensors format
        description (8 bytes little-endian header length, then a JSON header).

    Raises:
        ValueError: If the file has no such header.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: not a safetensors file (header length {length})")
        header = json.loads(file.read(length))
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    return {name: {"dtype": entries[name]["dtype"], "shape": entries[name]["shape"]} for name in sorted(entries)}


def library_versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the installed libraries that shape a run."""
    versions = {"python": platform.python_version()}
    for name in ("aullm-dist", *_LIBRARIES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def write_manifest(folder: Path, *, step: int, world_size: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Describe every file that `folder` holds now, and write MANIFEST.json last.

    Args:
        folder: A folder whose files are complete and on disk.
        step: Optimizer steps completed.
        world_size: Number of processes of the run that saved.
        facts: What cannot be read from the files: `parameters`, `quantized_modules`, `base`, `config`.

    Returns:
        The manifest without its signature.
    """
    files = sorted(path for path in folder.iterdir() if path.name != MANIFEST_NAME)
    manifest = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "step": step,
        "world_size": world_size,
        "versions": library_versions(),
        "files": {path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in files},
        "tensors": {path.name: tensor_table(path) for path in files if path.suffix == ".safetensors"},
        **facts,
    }
    write_signed(folder / MANIFEST_NAME, manifest)
    return manifest


def write_signed(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a manifest durably, with a hash of its own bytes as the last entry."""
    unsigned = json_bytes({**manifest, "manifest_sha256": _UNSIGNED.decode()})
    signature = hashlib.sha256(unsigned).hexdigest().encode()
    start = _SIGNATURE.search(unsigned).start(1)
    write_durably(path, unsigned[:start] + signature + unsigned[start + 64 :])


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check MANIFEST.json; the files that it describes are not looked at (`verify_checkpoint` does that).

    Raises:
        UserError: If the manifest is missing, altered, truncated, or of a format that this version does not read.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise UserError(f"{path}: missing; a folder without it is no complete checkpoint")
    return read_signed(path, FORMAT_NAME, FORMAT_VERSION)


def read_signed(path: Path, format_name: str, format_version: int) -> dict[str, Any]:
    """Read what `write_signed` wrote, and check its hash of itself and its format.

    Raises:
        UserError: It cannot be read, is altered or truncated, or is of another or of a newer format.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    signature = _SIGNATURE.search(content)
    if signature is None:
        raise UserError(f"{path}: truncated or altered (it does not end with its own hash)")
    unsigned = content[: signature.start(1)] + _UNSIGNED + content[signature.end(1) :]
    if hashlib.sha256(unsigned).hexdigest().encode() != signature.group(1):
        raise UserError(f"{path}: altered (its own hash does not match)")
    manifest = json.loads(content)
    if manifest.get("format") != format_name:
        raise UserError(f"{path}: format is {manifest.get('format')!r}; allowed is {format_name!r}")
    if manifest["format_version"] > format_version:
        raise UserError(
            f"{path}: format_version is {manifest['format_version']}, written by a newer aullm-dist; "
            f"this one reads up to {format_version}"
        )
    return manifest


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
    if named and int(named.group(1)) != manifest["step"]:
        problems.append(f"{folder}: the folder's name says step {int(named.group(1))}, its manifest {manifest['step']}")
    for name, entry in manifest["files"].items():
        problem = file_problem(folder / name, entry, manifest["tensors"].get(name), mode)
        if problem:
            problems.append(problem)
    return problems


def file_problem(path: Path, entry: dict[str, Any], table: dict[str, Any] | None, mode: VerifyMode) -> str | None:
    """Return what is wrong with one file that a manifest lists, or None.

    Args:
        path: The file.
        entry: Its `size` and `sha256`.
        table: Its `tensor_table`, None for a file without tensors.
        mode: As in `verify_checkpoint`.
    """
    if not path.is_file():
        return f"{path}: missing"
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            kind = "truncated" if size < entry["size"] else "too long"
            return f"{path}: {kind} ({size} bytes, the manifest says {entry['size']})"
        if mode == "hash" and file_sha256(path) != entry["sha256"]:
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
    known = {MANIFEST_NAME, *read_manifest(folder)["files"]}
    return sorted(path.name for path in folder.iterdir() if path.name not in known and not path.name.startswith("."))
