"""The picture of one prediction: frames in more detail than the model's, and what the model says of itself."""

import numpy as np

from aullm_dist.data.clips import most_changed
from aullm_dist.facs import AU_NAMES
from aullm_dist.figures.prediction import PredictionPicture, render_prediction
from aullm_dist.model.relations import build_relations
from aullm_dist.release.answering import Answerer
from aullm_dist.release.predict_report import Predictions
from aullm_dist.release.predicting import explain_clip

_SIDE = 288
"""Pixels of the frames in the picture, where the input still has them."""


def picture_of(answerer: Answerer, predictions: Predictions, suffix: str) -> bytes:
    """Return the picture of the only clip, as the content of a file that ends in `suffix`."""
    clip, clips = answerer.clips.clip(0), answerer.clips
    num_frames = answerer.config.data.num_frames
    explanation = explain_clip(answerer.model, clip, num_frames, answerer.accelerator.device)
    numbers = clip.frame_numbers
    # An annotated apex may be a frame that is missing.
    apex = None if clip.apex is None else int(numbers[np.abs(numbers - clip.apex).argmin()])
    other = int(numbers[most_changed(clip)]) if apex is None else apex
    shown = np.array([numbers[0], other])
    evidence, strengths = explanation.evidence, explanation.strengths
    return render_prediction(
        PredictionPicture(
            clip=clip.sample_id,
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
            clip_size=answerer.config.data.size,
            grid=None if evidence is None else answerer.model.visual.cell_grid,
            evidence=None if evidence is None else evidence[0].mean(dim=0).numpy(),
            edges=build_relations(predictions.aus).describe() if strengths is not None else (),
            strengths=None if strengths is None else strengths[0].numpy(),
        ),
        suffix,
    )
