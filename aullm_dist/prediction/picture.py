"""Draws the picture of one prediction: frames in more detail than the model's, its evidence and edge strengths."""

from typing import Any

import numpy as np

from aullm_dist.data.clips import most_changed
from aullm_dist.facs import AU_NAMES
from aullm_dist.figures.prediction import PredictionPicture, render_prediction
from aullm_dist.model.aullm import Explanation
from aullm_dist.model.relations import build_relations
from aullm_dist.prediction.report import Predictions
from aullm_dist.prediction.session import Answerer
from aullm_dist.release.predicting import explain_clip

_SIDE = 288
"""Pixels of the frames in the picture, where the input still has them."""


def picture_of(answerer: Answerer, predictions: Predictions, suffix: str) -> bytes:
    """Return the picture of the only clip, as the content of a file that ends in `suffix`."""
    return render_prediction(describe_picture(answerer, predictions, explain_only_clip(answerer)), suffix)


def explain_only_clip(answerer: Answerer) -> Explanation:
    """Return what led to the answer to the only clip; each field `[1, ...]`, on the CPU."""
    num_frames = answerer.config.data.num_frames
    return explain_clip(answerer.model, answerer.clips.clip(0), num_frames, answerer.accelerator.device)


def describe_picture(
    answerer: Answerer, predictions: Predictions, explanation: Explanation, name: str | None = None
) -> PredictionPicture:
    """Return what the picture of the only clip shows; `name` stands in its title, None is the clip's own."""
    clip, clips = answerer.clips.clip(0), answerer.clips
    numbers = clip.frame_numbers
    # An annotated apex may be a frame that is missing.
    apex = None if clip.apex is None else int(numbers[np.abs(numbers - clip.apex).argmin()])
    other = int(numbers[most_changed(clip)]) if apex is None else apex
    shown = [int(numbers[0]), other]
    network: Any = answerer.model
    evidence, strengths = explanation.evidence, explanation.strengths
    return PredictionPicture(
        clip=_shown(clip.sample_id if name is None else name),
        frames=clips.pictures(0, shown, _SIDE),
        numbers=(int(numbers[0]), other, int(numbers[-1])),
        other="Largest change" if apex is None else "Apex",
        aus=predictions.aus,
        names=tuple(AU_NAMES.get(au, "") for au in predictions.aus),
        probabilities=predictions.probabilities[0],
        active=predictions.active[0],
        thresholds=predictions.limits,
        policy=predictions.thresholds.policy,
        model=predictions.model,
        caveats=predictions.caveats,
        clip_size=answerer.config.data.size,
        grid=None if evidence is None else network.visual.cell_grid,
        evidence=None if evidence is None else evidence[0].mean(dim=0).numpy(),
        edges=build_relations(predictions.aus).describe() if strengths is not None else (),
        strengths=None if strengths is None else strengths[0].numpy(),
    )


def _shown(name: str) -> str:
    """Return a clip's name as matplotlib draws it: bytes that are no UTF-8 written out, and no formula between `$`."""
    return name.encode("utf-8", "backslashreplace").decode().replace("$", r"\$")
