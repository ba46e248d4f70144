"""Generates clips of a fixed formula and answers them: an export records the answers, a verification repeats them.

They show no face and come from no corpus, so they may go wherever the release goes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from aullm_dist.release.layout import PROBE_FILE
from aullm_dist.release.predicting import views_of

NUM_CLIPS = 4
TOLERANCES: Mapping[str, float] = {"float32": 1e-3, "bfloat16": 1e-1}
"""Largest accepted difference of a logit by the dtype of the LLM's arithmetic; docs/release.md says where from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Recorded answers: clips `[n, T, H, W]` uint8 and their logits `[n, A]` float32."""

    clips: Tensor
    logits: Tensor


def probe_clips(num_frames: int, size: int) -> Tensor:
    """Return gray clips `[NUM_CLIPS, num_frames, size, size]` uint8 of drifting bands (ours).

    Clip c drifts by 7 c gray values per frame; clip 0 stands still. All arithmetic is in integers, so that every
    machine makes the same clips.
    """
    clip, frame, row, column = torch.meshgrid(
        *(torch.arange(length) for length in (NUM_CLIPS, num_frames, size, size)), indexing="ij"
    )
    wave = (3 * row + 5 * column + 7 * clip * frame + 31 * clip) % 254
    return (64 + (wave - 127).abs()).to(torch.uint8)


def answer_probe(model: nn.Module, clips: Tensor) -> Tensor:
    """Return a model's logits `[n, A]` float32 on the CPU for clips `[n, T, H, W]` uint8."""
    device = next(model.parameters()).device
    network: Any = model  # the AULLM, or a transformers model of one
    views = views_of((clips.float() / 255.0).numpy(), network.stream)
    logits: Tensor = network.explain(views.to(device)).logits
    return logits.cpu().contiguous()


def write_probe(folder: Path, probe: Probe) -> None:
    """Write probe.safetensors."""
    path = folder / PROBE_FILE
    # safetensors makes files that the owner alone can read; a release is for others.
    path.touch()
    mode = path.stat().st_mode
    save_file({"clips": probe.clips, "logits": probe.logits}, path, metadata={"format": "pt"})
    path.chmod(mode)


def read_probe(folder: Path) -> Probe:
    """Read what `write_probe` wrote."""
    tensors = load_file(folder / PROBE_FILE)
    return Probe(clips=tensors["clips"], logits=tensors["logits"])


def probe_facts(precision: str, device: torch.device, difference: float | None) -> dict[str, Any]:
    """Return what a manifest says of recorded answers.

    Args:
        precision: `training.precision` of the run.
        device: where they were computed.
        difference: largest difference from the answers of the model that was trained, None if that is the same.
    """
    dtype = "bfloat16" if precision == "bf16" else "float32"
    return {
        "dtype": dtype,
        "tolerance": TOLERANCES[dtype],
        "device": device.type,
        "torch": torch.__version__,
        "difference_to_trained": difference,
    }
