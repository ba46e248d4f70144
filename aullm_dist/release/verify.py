"""Verifies a release folder: every file's hash, then the recorded answers once more."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from aullm_dist.errors import UserError
from aullm_dist.release.layout import PROBE_FILE, Format, check_files, read_release_manifest
from aullm_dist.release.loading import Release, load_unchecked, pick_device
from aullm_dist.release.probe import answer_probe, read_probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A release that was found to be what it was."""

    folder: Path
    format: Format
    num_files: int
    num_bytes: int
    device: torch.device
    recorded: Mapping[str, Any] | None
    """`dtype`, `tolerance` and `device` of the recorded answers (`probe.probe_facts`); None where there are none."""
    difference: float | None
    """Largest difference of a recorded logit."""


def verify(
    folder: Path,
    *,
    device: str | torch.device | None = None,
    llm: str | None = None,
    trust_remote_code: bool = False,
) -> Verification:
    """Compare a release with its manifest, load it, and answer the recorded clips again.

    Args:
        folder: the release.
        device: as in `load`.
        llm: as in `load`.
        trust_remote_code: as in `load`.

    Raises:
        UserError: a file is missing, altered or foreign; the LLM is not the one that the adapter was trained on; or an
            answer differs by more than the tolerance.
    """
    manifest = read_release_manifest(folder)
    check_files(folder, manifest, every_byte=True)
    target = pick_device(device)
    difference = None
    if manifest.probe is not None:
        release = load_unchecked(folder, target, manifest.tensors, llm=llm, trust_remote_code=trust_remote_code)
        difference = _compare(release, manifest.probe)
    return Verification(
        folder=folder,
        format=manifest.release_format,
        num_files=len(manifest.files),
        num_bytes=sum(entry.size for entry in manifest.files.values()),
        device=target,
        recorded=manifest.probe,
        difference=difference,
    )


def _compare(release: Release, recorded: Mapping[str, Any]) -> float:
    """Answer the recorded clips again and return the largest difference of a logit."""
    probe = read_probe(release.path)
    difference = float((answer_probe(release.model, probe.clips) - probe.logits).abs().max())
    # Written so that a NaN counts as a difference.
    if not difference <= recorded["tolerance"]:
        raise UserError(
            f"{release.path / PROBE_FILE}: logits differ from those at export by up to {difference:.2g}; allowed: "
            f"{recorded['tolerance']:g} in {recorded['dtype']}"
        )
    return difference
