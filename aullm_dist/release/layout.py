"""The files of a release folder, and RELEASE.json: the hash of each of them, signed by its own.

README.md, CITATION.cff               the model card, and how to cite
config.json                           for AutoConfig: AUs, thresholds, preprocessing, prompt, base, settings
aullm_modules.safetensors             everything of ours outside the LLM, for AutoModel
adapter/                              LoRA for stock PEFT and the plain LLM (format `adapter`)
llm/                                  the LLM with LoRA merged into it, for stock transformers (format `merged`)
tokenizer.json, ...                   the tokenizer
probe.safetensors                     clips of a fixed formula and the logits that they were answered with
RELEASE.json                          written last
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from aullm_dist.errors import UserError
from aullm_dist.files import force_to_disk
from aullm_dist.training.manifest import (
    file_problem,
    file_sha256,
    library_versions,
    read_signed,
    tensor_table,
    write_signed,
)

Format = Literal["adapter", "merged"]
FORMATS: tuple[Format, ...] = get_args(Format)

CARD_FILE = "README.md"
CITATION_FILE = "CITATION.cff"
CONFIG_FILE = "config.json"
ADAPTER_FOLDER = "adapter"
LLM_FOLDER = "llm"
PROBE_FILE = "probe.safetensors"
RELEASE_FILE = "RELEASE.json"

FORMAT_NAME = "aullm-dist release"
FORMAT_VERSION = 1
_ALLOWED = "allowed: a folder that aullm-dist merge wrote, whole and unaltered"
# People correct a card after it was published; no answer depends on it.
_TEXTS = (CARD_FILE, CITATION_FILE)


def is_release(folder: Path) -> bool:
    """Whether a folder claims to be a release."""
    return (folder / RELEASE_FILE).is_file()


def table_of(folder: Path) -> dict[str, Any]:
    """Return the `tensor_table` of every safetensors file of a release, by its path inside the folder."""
    return {path.relative_to(folder).as_posix(): tensor_table(path) for path in sorted(folder.rglob("*.safetensors"))}


def write_release_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Describe every file that `folder` holds, force all to disk, and write RELEASE.json last.

    Args:
        folder: a release folder that is otherwise complete.
        facts: `format`, `probe`, and whatever else cannot be read from the files.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for path in paths.values():
        force_to_disk(path)
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            force_to_disk(path)
    manifest = {
        "format": FORMAT_NAME,
        "format_version": FORMAT_VERSION,
        "versions": library_versions(),
        "files": {name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for name, path in paths.items()},
        "tensors": table_of(folder),
        **facts,
    }
    write_signed(folder / RELEASE_FILE, manifest)


def read_release_manifest(folder: Path) -> dict[str, Any]:
    """Read RELEASE.json; the files that it lists are not looked at.

    Raises:
        UserError: it is missing, altered, or of a format that this version does not read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {_ALLOWED}")
    if not is_release(folder):
        raise UserError(f"{folder}: is no release (no {RELEASE_FILE} in it); {_ALLOWED}")
    return read_signed(folder / RELEASE_FILE, FORMAT_NAME, FORMAT_VERSION)


def check_files(folder: Path, manifest: Mapping[str, Any], *, every_byte: bool) -> None:
    """Refuse a release with a missing or altered file, or with a foreign one where it would be loaded.

    Args:
        folder: the release.
        manifest: from `read_release_manifest`.
        every_byte: hash every file. Otherwise the card may have been edited, and of the merged LLM only sizes and
            tensor headers are compared: reading 140 GB twice would double the time to load a 70B.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    for name, entry in manifest["files"].items():
        if not every_byte and name in _TEXTS:
            continue
        quickly = not every_byte and name.startswith(f"{LLM_FOLDER}/") and name.endswith(".safetensors")
        problem = file_problem(folder / name, entry, manifest["tensors"].get(name), "size" if quickly else "hash")
        if problem:
            raise UserError(f"{problem}; {_ALLOWED}")
    for path in _files(folder):
        # Libraries choose by name what they load; a second set of weights could take the place of the first.
        name = path.relative_to(folder).as_posix()
        if name not in manifest["files"] and name.startswith((f"{ADAPTER_FOLDER}/", f"{LLM_FOLDER}/")):
            raise UserError(f"{path}: is no file of this release; remove it")


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / RELEASE_FILE:
            yield path
