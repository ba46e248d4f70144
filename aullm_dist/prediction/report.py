"""Renders predictions as text for a terminal, as CSV and as JSON."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aullm_dist.evaluation.answers import Answers
from aullm_dist.evaluation.caveats import caveat_notes
from aullm_dist.evaluation.metrics import probability_of, summarise
from aullm_dist.facs import AU_NAMES, au_name
from aullm_dist.release.origin import Thresholds
from aullm_dist.release.predicting import decide, threshold_array

_WHOLE_TABLES = 4
"""Clips up to which every AU is written out; of more, the active ones alone."""
COLUMNS = ("clip", "corpus", "subject", "au", "name", "probability", "threshold", "active")


@dataclass(frozen=True, slots=True, kw_only=True)
class Predictions:
    """Answers `[n, A]` with the decisions that the thresholds make of them."""

    model: str
    answers: Answers
    aus: tuple[int, ...]
    thresholds: Thresholds
    crop: str | None = None
    """Of folders and videos; None where there are none."""
    caveats: tuple[str, ...] = ()
    """What a reader must know of the model, as sentences without a full stop."""

    @property
    def probabilities(self) -> np.ndarray:
        return probability_of(self.answers.logits)

    @property
    def limits(self) -> np.ndarray:
        """Return the threshold of each AU as a probability, `[A]`."""
        return threshold_array(self.thresholds.values, self.aus)

    @property
    def active(self) -> np.ndarray:
        return decide(self.answers.logits, self.limits)


def render_text(predictions: Predictions) -> str:
    """Return a table for each clip, or of many clips a line for each."""
    rows = zip(predictions.answers.sample_ids, predictions.probabilities, predictions.active, strict=True)
    if len(predictions.answers.sample_ids) <= _WHOLE_TABLES:
        lines = [line for clip, values, active in rows for line in _table(predictions, clip, values, active)]
    else:
        width = max(map(len, predictions.answers.sample_ids))
        lines = [f"{clip:<{width}}  {_active(predictions.aus, values, active)}" for clip, values, active in rows]
        lines.append("")
    last = [f"Thresholds: {predictions.thresholds.policy}", *caveat_notes(predictions.caveats)]
    return "\n".join([*lines, *last, ""])


def _table(predictions: Predictions, clip: str, values: np.ndarray, active: np.ndarray) -> list[str]:
    names = [au_name(au) for au in predictions.aus]
    width = max(map(len, names))
    head = f"  {'AU':<{width}}  probability  threshold  active"
    body = [
        f"  {name:<{width}}  {value:>11.3f}  {limit:>9.3f}  {'yes' if yes else '-':>6}"
        for name, value, limit, yes in zip(names, values, predictions.limits, active, strict=True)
    ]
    return [clip, head, *body, ""]


def _active(aus: Sequence[int], values: np.ndarray, active: np.ndarray) -> str:
    found = [f"AU{au} {value:.2f}" for au, value, yes in zip(aus, values, active, strict=True) if yes]
    return "  ".join(found) or "no AU"


def render_csv(predictions: Predictions) -> str:
    """Return a row per clip and AU, with the columns `COLUMNS`; `active` is 0 or 1."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    answers, limits = predictions.answers, predictions.limits
    clips = zip(answers.sample_ids, answers.corpora, answers.subjects, strict=True)
    for clip, values, active in zip(clips, predictions.probabilities, predictions.active, strict=True):
        for au, value, limit, yes in zip(predictions.aus, values, limits, active, strict=True):
            writer.writerow([*clip, au, AU_NAMES.get(au, ""), f"{value:.6f}", f"{limit:.6f}", int(yes)])
    return text.getvalue()


def render_json(predictions: Predictions) -> str:
    """Return an object with the model, the thresholds, and per clip each AU's probability, logit and decision."""
    answers, limits = predictions.answers, predictions.limits.tolist()
    columns = zip(
        answers.sample_ids, answers.corpora, answers.subjects, answers.logits, predictions.probabilities,
        predictions.active, strict=True,
    )  # fmt: skip
    content = {
        "model": predictions.model,
        "caveats": list(predictions.caveats),
        "crop": predictions.crop,
        "threshold_policy": predictions.thresholds.policy,
        "clips": [
            {
                "clip": clip,
                "corpus": corpus or None,
                "subject": subject or None,
                "aus": [
                    {
                        "au": au,
                        "name": AU_NAMES.get(au),
                        "probability": float(values[column]),
                        "logit": float(logits[column]),
                        "threshold": limits[column],
                        "active": bool(active[column]),
                    }
                    for column, au in enumerate(predictions.aus)
                ],
            }
            for clip, corpus, subject, logits, values, active in columns
        ],
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def scores(predictions: Predictions, labelled: np.ndarray) -> list[str]:
    """Return a line on how the clips with labels `[n]` compare with them, at 0.5; none where no clip has any."""
    if not labelled.any():
        return []
    answers = predictions.answers
    mean = summarise((answers.labels[labelled], answers.logits[labelled]), predictions.aus)["mean"]
    auc = "no AU has both classes" if mean["auc"] is None else f"auc {100 * mean['auc']:.1f}"
    return [
        f"Against the datasets' own labels, threshold 0.5: f1_macro {100 * mean['f1_macro']:.1f}, "
        f"f1_binary {100 * mean['f1_binary']:.1f}, {auc}"
    ]
