"""Answers uploaded clips with the model of the page, one at a time, and describes each answer for the page."""

import base64
import io
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from aullm_dist.app.refusals import collect_warnings
from aullm_dist.app.uploads import Upload
from aullm_dist.evaluation.ladder import EARLIER_STAGES
from aullm_dist.evaluation.metrics import probability_of
from aullm_dist.figures.prediction import PredictionPicture, render_parts, render_prediction
from aullm_dist.model.aullm import Explanation
from aullm_dist.prediction.picture import describe_picture, explain_only_clip
from aullm_dist.prediction.report import Predictions, render_json
from aullm_dist.prediction.session import Answerer, InputOptions

__all__ = ["Answer", "PageAnswerer"]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model says of one stretch of a clip."""

    json: str
    """What `aullm-dist predict --json` says of the same frames."""
    picture: PredictionPicture
    shown: dict[str, Any]
    """For the page; see `_describe`."""


class PageAnswerer:
    """A loaded model behind a lock: requests come side by side, and one model call runs at a time.

    Args:
        answerer: the model, opened without clips.
        crop: as `--crop`; None takes the model's.
    """

    def __init__(self, answerer: Answerer, crop: str | None) -> None:
        self._answerer, self._crop = answerer, crop
        self._lock = threading.Lock()

    def answer(self, upload: Upload, onset: int, offset: int) -> Answer:
        """Answer the frames onset to offset, both inclusive, of a clip that was read.

        Raises:
            UserError: the frames cannot be used, or the answer is not finite.
        """
        options = InputOptions(inputs=[str(upload.path)], crop=self._crop, onset=onset, offset=offset, single=True)
        with self._lock, collect_warnings() as warnings:
            asked = self._answerer.asked(options)
            asked.read()
            predictions = Predictions(
                model=str(asked.path),
                answers=replace(asked.answer(), sample_ids=(upload.name,)),
                aus=asked.aus,
                thresholds=asked.thresholds,
                crop=asked.clips.crop,
                caveats=asked.caveats,
            )
            explanation = explain_only_clip(asked)
            picture = describe_picture(asked, predictions, explanation, upload.name)
            shown = _describe(predictions, picture, explanation)
        # The page names the clip and its frames already.
        notes = [upload.in_words(line) for line in warnings]
        return Answer(render_json(predictions), picture, {**shown, "notes": list(dict.fromkeys(notes))})

    def draw(self, answer: Answer) -> bytes:
        """Return the picture of an answer as PNG, the one that `aullm-dist predict --figure` draws."""
        with self._lock:
            return render_prediction(answer.picture, ".png")

    def wait(self) -> None:
        """Wait for the model call that is running."""
        with self._lock:
            pass


def _describe(predictions: Predictions, picture: PredictionPicture, explanation: Explanation) -> dict[str, Any]:
    """Return what the page shows: numbers of frames, AUs with their ladder, and pictures as data URLs."""
    ladder = _ladder(predictions, explanation)
    images = {
        "onset": _png(picture.frames[0]),
        "other": _png(picture.frames[1]),
        **{name: _data_url("image/svg+xml", svg) for name, svg in render_parts(picture).items()},
    }
    rows = zip(picture.aus, picture.names, picture.probabilities, picture.thresholds, picture.active, strict=True)
    return {
        "frames": picture.numbers,
        "other": picture.other,
        "policy": picture.policy,
        "stages": list(ladder),
        "aus": [
            {
                "au": au,
                "name": name,
                "probability": float(probability),
                "threshold": float(threshold),
                "active": bool(active),
                "ladder": [float(values[column]) for values in ladder.values()],
            }
            for column, (au, name, probability, threshold, active) in enumerate(rows)
        ],
        "images": images,
    }


def _ladder(predictions: Predictions, explanation: Explanation) -> Mapping[str, np.ndarray]:
    """Return the probabilities `[A]` after each stage of the answer; a model without stages has the answer alone."""
    logits = dict(zip(EARLIER_STAGES, (explanation.evidence_logits, explanation.structure_logits), strict=True))
    earlier = {
        stage: probability_of(values[0].numpy().astype(np.float64))
        for stage, values in logits.items()
        if values is not None
    }
    return {**earlier, "deduction" if earlier else "answer": predictions.probabilities[0]}


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return _data_url("image/png", buffer.getvalue())


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
