"""Predicts one clip in memory: probabilities, decisions, and on request what led to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from aullm_dist.config import Config
from aullm_dist.data.clips import Clip
from aullm_dist.data.crops import Crop, crop_for
from aullm_dist.data.reading import clip_of_arrays
from aullm_dist.data.views import Stream, frames_for, view_of
from aullm_dist.errors import UserError
from aullm_dist.evaluation.metrics import logit_of, probability_of
from aullm_dist.model.aullm import Explanation
from aullm_dist.release.origin import Thresholds


class ClipModel(Protocol):
    """A trained model with what must be known to answer a clip; `release.loading.Release` is one."""

    @property
    def model(self) -> torch.nn.Module: ...
    @property
    def aus(self) -> tuple[int, ...]: ...
    @property
    def thresholds(self) -> Thresholds: ...
    @property
    def num_frames(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def crop(self) -> Mapping[str, Any] | None: ...
    @property
    def config(self) -> Config: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The answer to one clip; A action units, in the order of `aus`."""

    aus: tuple[int, ...]
    """AU numbers."""
    probabilities: np.ndarray
    """`[A]` float64, 0 to 1: sigmoid of the logits. Not calibrated."""
    decisions: np.ndarray
    """`[A]` bool: whether the probability is above the AU's threshold."""
    logits: np.ndarray
    """`[A]` float64."""
    thresholds: np.ndarray
    """`[A]` float64, probabilities."""
    threshold_policy: str
    """How the thresholds were chosen, in words."""
    explanation: Explanation | None = None
    """On request: tokens, evidence, gaze and strengths, each `[1, ...]` on the CPU; see `model.aullm.Explanation`."""


def predict(
    release: ClipModel,
    frames: np.ndarray | Sequence[np.ndarray],
    *,
    onset: int | None = None,
    offset: int | None = None,
    crop: str | Crop | None = None,
    explain: bool = False,
    name: str = "frames",
) -> Prediction:
    """Answer one clip.

    Args:
        release: the model.
        frames: gray `[T, H, W]` or RGB `[T, H, W, 3]`, uint8 or floats in 0..1, of any T from 2 up and any size; evenly
            spaced in time.
        onset, offset: first and last frame of the movement, counted from 0, both inclusive; None for all frames.
        crop: as `--crop` of the command line, or a crop of your own; None takes the model's.
        explain: whether to return what led to the answer.
        name: the clip's name in tables of boxes and in messages.

    Raises:
        UserError: the frames are of another shape, type or range, onset or offset lies outside of them, the crop finds
            nothing or is not the model's, or the answer is not finite.
    """
    fitted = crop_for(crops_of(release.config, release.crop), crop)
    clip = clip_of_arrays(frames, size=release.size, crop=fitted, onset=onset, offset=offset, name=name)
    explanation = explain_clip(release.model, clip, release.num_frames, release.device)
    logits = explanation.logits[0].numpy().astype(np.float64)
    if not np.isfinite(logits).all():
        raise UserError(f"logits of {name} are not finite; the training has diverged, or the LLM is damaged")
    thresholds = threshold_array(release.thresholds.values, release.aus)
    return Prediction(
        aus=release.aus,
        probabilities=probability_of(logits),
        decisions=decide(logits, thresholds),
        logits=logits,
        thresholds=thresholds,
        threshold_policy=release.thresholds.policy,
        explanation=explanation if explain else None,
    )


def explain_clip(model: Any, clip: Clip, num_frames: int, device: torch.device) -> Explanation:
    """Return a model's answer to a clip and what led to it, on the CPU."""
    views = views_of(frames_for(clip, num_frames, model.stream)[None], model.stream).to(device)
    explanation = model.explain(views)
    return type(explanation)(*(part if part is None else part.cpu() for part in explanation))


def views_of(clips: np.ndarray, visual: Stream) -> torch.Tensor:
    """Return what a model of a visual stream is given of gray clips `[V, T, H, W]` in 0..1: `[V, C, H, W]` float32."""
    return torch.from_numpy(np.stack([view_of(clip, visual) for clip in clips]))


def crops_of(config: Config, crop: Mapping[str, object] | None) -> tuple[str, ...]:
    """Return the identities of the crops that a model was trained on; none where they are not known.

    Args:
        config: the run's configuration, which has them.
        crop: what a release or the reports of the run's datasets say, where the configuration does not.
    """
    if config.data.crops:
        return tuple(config.data.crops)
    return (str(crop["name"]),) if crop else ()


def threshold_array(values: Mapping[int, float], aus: Sequence[int]) -> np.ndarray:
    """Return the threshold of each AU as a probability, `[A]`."""
    return np.array([values[au] for au in aus], dtype=np.float64)


def decide(logits: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Return whether each logit `[..., A]` is above its AU's threshold `[A]`, a probability."""
    return logits > logit_of(thresholds)
