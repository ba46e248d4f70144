"""Is a release folder what was exported? Every file's hash, then the recorded answers once more."""

from dataclasses import dataclass
from pathlib import Path

import torch

from aullm_dist.errors import UserError
from aullm_dist.release.layout import PROBE_FILE, Format, check_files, read_release_manifest
from aullm_dist.release.loading import load_unchecked
from aullm_dist.release.probe import answer_probe, read_probe


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """A release that was found to be what it was."""

    folder: Path
    format: Format
    num_files: int
    num_bytes: int
    dtype: str
    tolerance: float
    difference: float
    """Largest difference of a recorded logit."""
    recorded_on: str
    """Device type of the export."""
    device: torch.device


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
        UserError: a file is missing, altered, or not part of the release where it would be read; the LLM is not the one
            that the adapter was trained on; or an answer differs by more than the tolerance.
    """
    manifest = read_release_manifest(folder)
    check_files(folder, manifest, every_byte=True)
    target = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    release = load_unchecked(folder, target, manifest["tensors"], llm=llm, trust_remote_code=trust_remote_code)
    probe, recorded = read_probe(folder), manifest["probe"]
    # Written so that a NaN counts as a difference.
    difference = float((answer_probe(release.model, probe.clips) - probe.logits).abs().max())
    if not difference <= recorded["tolerance"]:
        raise UserError(
            f"{folder / PROBE_FILE}: logits differ from those at export by up to {difference:.2g}; allowed: "
            f"{recorded['tolerance']:g} in {recorded['dtype']}"
        )
    return Verification(
        folder=folder,
        format=release.format,
        num_files=len(manifest["files"]),
        num_bytes=sum(entry["size"] for entry in manifest["files"].values()),
        dtype=recorded["dtype"],
        tolerance=recorded["tolerance"],
        difference=difference,
        recorded_on=recorded["device"],
        device=target,
    )
