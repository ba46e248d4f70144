"""Names the files of a release folder, and writes RELEASE.json: the hash of each of them, signed by its own.

README.md, CITATION.cff               the model card, and how to cite
.eval_results/aullm.yaml              the card's scores as entries of the Hub, where there are scores
config.json                           for AutoConfig: AUs, thresholds, preprocessing, prompt, base, settings
aullm_modules.safetensors             everything of ours outside the LLM, for AutoModel
adapter/                              LoRA for stock PEFT and the plain LLM (format `adapter`)
llm/                                  the LLM with LoRA merged into it, for stock transformers (format `merged`)
tokenizer.json, ...                   the tokenizer
probe.safetensors                     clips of a fixed formula and the logits that they were answered with
RELEASE.json                          written last
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from aullm_dist.checkpoint.entries import FileEntry, TensorTable, table_from_json, table_to_json
from aullm_dist.checkpoint.manifest import (
    file_entry,
    file_problem,
    tensor_table,
    write_signed,
)
from aullm_dist.errors import UserError
from aullm_dist.files import force_to_disk
from aullm_dist.signed import read_signed
from aullm_dist.versions import library_versions

Format = Literal["adapter", "merged"]
FORMATS: tuple[Format, ...] = get_args(Format)

CARD_FILE = "README.md"
CITATION_FILE = "CITATION.cff"
EVAL_RESULTS_FILE = ".eval_results/aullm.yaml"
CONFIG_FILE = "config.json"
ADAPTER_FOLDER = "adapter"
LLM_FOLDER = "llm"
PROBE_FILE = "probe.safetensors"
RELEASE_FILE = "RELEASE.json"

FORMAT_NAME = "aullm-dist release"
FORMAT_VERSION = 1
_ALLOWED = "allowed: a folder that aullm-dist merge wrote, whole and unaltered"
# People correct a card after it was published; no answer depends on it.
_TEXTS = (CARD_FILE, CITATION_FILE, EVAL_RESULTS_FILE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseFacts:
    """What RELEASE.json states that cannot be read from the files next to it."""

    release_format: Format
    probe: Mapping[str, Any] | None
    """How the probe clips were answered (`probe.probe_facts`); None where they were not."""
    merge: Mapping[str, Any] | None
    """Receipt of the merge; None for an adapter release."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseManifest(ReleaseFacts):
    """RELEASE.json: what a release folder holds."""

    versions: Mapping[str, str]
    """Of the libraries that wrote it, by name."""
    files: Mapping[str, FileEntry]
    """By path inside the folder."""
    tensors: Mapping[str, TensorTable]
    """By path inside the folder."""

    def to_json(self) -> dict[str, Any]:
        """Return the manifest without the hash of itself, which `write_signed` adds."""
        return {
            "format": FORMAT_NAME,
            "format_version": FORMAT_VERSION,
            "versions": dict(self.versions),
            "files": {name: entry.to_json() for name, entry in self.files.items()},
            "tensors": {name: table_to_json(table) for name, table in self.tensors.items()},
            "release_format": self.release_format,
            "probe": self.probe,
            "merge": self.merge,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ReleaseManifest":
        """Read what `to_json` returned."""
        return cls(
            versions=value["versions"],
            files={name: FileEntry.from_json(entry) for name, entry in value["files"].items()},
            tensors={name: table_from_json(table) for name, table in value["tensors"].items()},
            release_format=value["release_format"],
            probe=value["probe"],
            merge=value.get("merge"),  # older releases lack it
        )


def is_release(folder: Path) -> bool:
    """Whether a folder claims to be a release."""
    return (folder / RELEASE_FILE).is_file()


def table_of(folder: Path) -> dict[str, TensorTable]:
    """Return the `tensor_table` of every safetensors file of a release, by its path inside the folder."""
    return {path.relative_to(folder).as_posix(): tensor_table(path) for path in sorted(folder.rglob("*.safetensors"))}


def write_release_manifest(folder: Path, facts: ReleaseFacts) -> None:
    """Describe every file that `folder` holds, force all to disk, and write RELEASE.json last.

    Args:
        folder: a release folder that is otherwise complete.
        facts: what cannot be read from the files.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for path in paths.values():
        force_to_disk(path)
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            force_to_disk(path)
    manifest = ReleaseManifest(
        versions=library_versions(),
        files={name: file_entry(path) for name, path in paths.items()},
        tensors=table_of(folder),
        release_format=facts.release_format,
        probe=facts.probe,
        merge=facts.merge,
    )
    write_signed(folder / RELEASE_FILE, manifest.to_json())


def read_release_manifest(folder: Path) -> ReleaseManifest:
    """Read RELEASE.json; the files that it lists are not looked at.

    Raises:
        UserError: it is missing, altered, or of a format that this version does not read.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; {_ALLOWED}")
    if not is_release(folder):
        raise UserError(f"{folder}: is no release (no {RELEASE_FILE} in it); {_ALLOWED}")
    return ReleaseManifest.from_json(read_signed(folder / RELEASE_FILE, FORMAT_NAME, FORMAT_VERSION))


def check_files(folder: Path, manifest: ReleaseManifest, *, every_byte: bool) -> None:
    """Refuse a release with a missing or altered file, or with a foreign one where it would be loaded.

    Args:
        folder: the release.
        manifest: from `read_release_manifest`.
        every_byte: hash every file. Otherwise the card may have been edited, and of the merged LLM only sizes and
            tensor headers are compared: reading 140 GB twice would double the time to load a 70B.

    Raises:
        UserError: naming the file and what is wrong with it.
    """
    for name, entry in manifest.files.items():
        if not every_byte and name in _TEXTS:
            continue
        quickly = not every_byte and name.startswith(f"{LLM_FOLDER}/") and name.endswith(".safetensors")
        problem = file_problem(folder / name, entry, manifest.tensors.get(name), "size" if quickly else "hash")
        if problem:
            raise UserError(f"{problem}; {_ALLOWED}")
    for path in _files(folder):
        # Libraries choose by name what they load; a second set of weights could take the place of the first.
        name = path.relative_to(folder).as_posix()
        if name not in manifest.files and name.startswith((f"{ADAPTER_FOLDER}/", f"{LLM_FOLDER}/")):
            raise UserError(f"{path}: is no file of this release; remove it")


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / RELEASE_FILE:
            yield path
