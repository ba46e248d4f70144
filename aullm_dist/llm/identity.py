"""Identifies an LLM: its name, a hash of its config, and fingerprints of its weight files."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class WeightFile:
    """Size and hashes of one weight file."""

    size: int
    """Bytes."""
    sample_sha256: str
    """Over the size and evenly spaced blocks of the file (`checkpoint.base_identity`)."""
    sha256: str | None = None
    """Over every byte; None where the file was not read to its end."""

    def differs_from(self, other: "WeightFile") -> bool:
        """Return whether size or a hash that both have differs."""
        hashes_differ = self.sha256 is not None and other.sha256 is not None and self.sha256 != other.sha256
        return (self.size, self.sample_sha256) != (other.size, other.sample_sha256) or hashes_differ

    def to_json(self) -> dict[str, Any]:
        """Return the entry as a manifest holds it."""
        entry: dict[str, Any] = {"size": self.size, "sample_sha256": self.sample_sha256}
        return entry if self.sha256 is None else {**entry, "sha256": self.sha256}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "WeightFile":
        """Read what `to_json` returned."""
        return cls(entry["size"], entry["sample_sha256"], entry.get("sha256"))


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseIdentity:
    """Which LLM an adapter belongs to."""

    name: str
    """Hub name or local folder, as the user gave it."""
    revision: str | None
    """Commit of a model of the Hub, None for a folder."""
    config_sha256: str
    files: Mapping[str, WeightFile] = field(default_factory=dict)
    """By file name; empty without safetensors files."""
    wrapper: str | None = None
    """Model type of the multimodal model whose text decoder the LLM is; None for a plain decoder."""

    @property
    def is_fully_hashed(self) -> bool:
        """Whether a weight file was hashed to its end."""
        return any(file.sha256 is not None for file in self.files.values())

    def files_to_json(self) -> dict[str, dict[str, Any]]:
        """Return the entries of the weight files as a manifest holds them."""
        return {name: file.to_json() for name, file in self.files.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the identity as a manifest or a release holds it."""
        return {
            "name": self.name,
            "revision": self.revision,
            "config_sha256": self.config_sha256,
            "files": self.files_to_json(),
            **({} if self.wrapper is None else {"wrapper": self.wrapper}),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "BaseIdentity":
        """Read what `to_json` returned.

        Raises:
            KeyError: an entry is missing.
        """
        return cls(
            name=value["name"],
            revision=value["revision"],
            config_sha256=value["config_sha256"],
            files={name: WeightFile.from_json(entry) for name, entry in value["files"].items()},
            wrapper=value.get("wrapper"),
        )
