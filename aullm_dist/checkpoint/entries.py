"""Represents entries of a checkpoint's MANIFEST.json as objects, and converts them from and to JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aullm_dist.llm.identity import BaseIdentity


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Size and hash of a file that a manifest lists."""

    size: int
    """Bytes."""
    sha256: str

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a manifest holds it."""
        return {"size": self.size, "sha256": self.sha256}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "FileEntry":
        """Read what `to_json` returned."""
        return cls(entry["size"], entry["sha256"])


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Dtype and shape of a tensor, as the header of its safetensors file states them."""

    dtype: str
    """In the words of safetensors, such as `F32`."""
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a manifest holds it."""
        return {"dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "TensorEntry":
        """Read what `to_json` returned."""
        return cls(entry["dtype"], tuple(entry["shape"]))


TensorTable = Mapping[str, TensorEntry]
"""The tensors of one file, by name."""


def table_to_json(table: TensorTable) -> dict[str, Any]:
    """Return a table as a manifest holds it."""
    return {name: entry.to_json() for name, entry in table.items()}


def table_from_json(table: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """Read what `table_to_json` returned."""
    return {name: TensorEntry.from_json(entry) for name, entry in table.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterEntry:
    """Where a checkpoint keeps a parameter, and what it keeps of its optimizer."""

    file: str
    key: str
    """Name inside `file`."""
    trainable: bool
    optimizer: tuple[str, ...]
    """Sorted names of its entries in the optimizer's file, `master` among them."""

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a manifest holds it."""
        return {"file": self.file, "key": self.key, "trainable": self.trainable, "optimizer": list(self.optimizer)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "ParameterEntry":
        """Read what `to_json` returned."""
        return cls(
            file=entry["file"], key=entry["key"], trainable=entry["trainable"], optimizer=tuple(entry["optimizer"])
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestFacts:
    """What a manifest states of a checkpoint that cannot be read from the files next to it."""

    config: Mapping[str, Any]
    """The resolved config of the run."""
    base: BaseIdentity | None = None
    """None for a model without an LLM."""
    quantized_modules: tuple[str, ...] = ()
    """Sorted names, as on the plain LLM, of the linear layers that were really quantised."""
    parameters: Mapping[str, ParameterEntry] = field(default_factory=dict)

    def facts_to_json(self) -> dict[str, Any]:
        """Return the facts as a manifest holds them."""
        return {
            "parameters": {name: entry.to_json() for name, entry in self.parameters.items()},
            "quantized_modules": list(self.quantized_modules),
            "base": None if self.base is None else self.base.to_json(),
            "config": dict(self.config),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(ManifestFacts):
    """What a checkpoint folder holds, down to the hash of every file and the shape of every tensor."""

    format: str
    format_version: int
    step: int
    """Optimizer steps completed."""
    world_size: int
    """Number of processes of the run that saved."""
    versions: Mapping[str, str]
    """Of the libraries, by name."""
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorTable]
    """By file name."""
    manifest_sha256: str | None = None
    """The hash that the manifest carries of itself; None before it was written."""

    def to_json(self) -> dict[str, Any]:
        """Return the manifest without the hash of itself, which `manifest.write_signed` adds."""
        return {
            "format": self.format,
            "format_version": self.format_version,
            "step": self.step,
            "world_size": self.world_size,
            "versions": dict(self.versions),
            "files": {name: entry.to_json() for name, entry in self.files.items()},
            "tensors": {name: table_to_json(table) for name, table in self.tensors.items()},
            **self.facts_to_json(),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Manifest":
        """Read what a manifest file holds, its hash included.

        Raises:
            KeyError: an entry is missing.
        """
        return cls(
            format=value["format"],
            format_version=value["format_version"],
            step=value["step"],
            world_size=value["world_size"],
            versions=value["versions"],
            files={name: FileEntry.from_json(entry) for name, entry in value["files"].items()},
            tensors={name: table_from_json(table) for name, table in value["tensors"].items()},
            parameters={name: ParameterEntry.from_json(entry) for name, entry in value["parameters"].items()},
            quantized_modules=tuple(value["quantized_modules"]),
            base=None if value["base"] is None else BaseIdentity.from_json(value["base"]),
            config=value["config"],
            manifest_sha256=value.get("manifest_sha256"),
        )
