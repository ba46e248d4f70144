"""Confidence intervals by resampling subjects, the unit that is independent; clips of one face are not.

Shapes: n clips, A action units, U subjects, R resamples.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aullm_dist.evaluation.metrics import f1_from_counts
from aullm_dist.evaluation.tables import METRICS

PERCENTILES = (2.5, 97.5)


def subject_weights(num_subjects: int, resamples: int, seed: int) -> np.ndarray:
    """Return how often each subject is drawn in each resample, `[R, U]`.

    The same subjects, number and seed give the same draws, so that two runs can be compared resample by resample.
    """
    generator = np.random.default_rng(seed)
    return generator.multinomial(num_subjects, np.full(num_subjects, 1 / num_subjects), size=resamples)


def weighted_auc(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the AUC of one AU under each resample, `[R]`, NaN where a resample has one class only.

    Args:
        labels: `[n]`, 0 or 1.
        scores: `[n]`; equal scores count one half.
        weights: `[R, n]`, how often each clip is drawn.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))
    truth = labels[order] != 0
    drawn = weights[:, order].astype(float)
    positives = np.add.reduceat(drawn * truth, starts, axis=1)
    negatives = np.add.reduceat(drawn * ~truth, starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = positives.sum(1) * negatives.sum(1)
    wins = (positives * below).sum(1)
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


def subject_bootstrap(
    labels: np.ndarray,
    logits: np.ndarray,
    predicted: np.ndarray,
    subjects: Sequence[str],
    aus: Sequence[int],
    *,
    resamples: int,
    seed: int,
) -> dict[str, Any] | None:
    """Return 95% percentile intervals over subjects, or None with fewer than 2 subjects or no resamples.

    A resample without positives of an AU counts its F1 by the 0/0 convention and leaves its AUC out.

    Args:
        labels: `[n, A]`, 0 or 1.
        logits: `[n, A]`, for the AUC.
        predicted: `[n, A]` bool, for both F1.
        subjects: n subject names.
        aus: The A AU numbers.
        resamples: Number of resamples.
        seed: Seed of the draws.

    Returns:
        `mean` (low and high of `f1_binary`, `f1_macro`, `auc`), `per_au` (of `f1_macro`), and how it was done.
    """
    names, member = np.unique(np.asarray(subjects), return_inverse=True)
    if len(names) < 2 or resamples < 1:
        return None
    weights = subject_weights(len(names), resamples, seed)
    truth = labels != 0
    cells = np.stack([truth & predicted, ~truth & predicted, truth & ~predicted, ~truth & ~predicted]).astype(float)
    per_subject = np.zeros((4, len(names), labels.shape[1]))
    np.add.at(per_subject, (slice(None), member), cells)
    binary, macro = f1_from_counts(np.einsum("ru,cua->cra", weights.astype(float), per_subject))
    clip_weights = weights[:, member]
    areas = np.stack([weighted_auc(labels[:, a], logits[:, a], clip_weights) for a in range(len(aus))], axis=1)
    samples = dict(zip(METRICS, (binary.mean(1), macro.mean(1), _mean_defined(areas)), strict=True))
    return {
        "level": 0.95,
        "unit": "subject",
        "resamples": resamples,
        "seed": seed,
        "num_subjects": len(names),
        "mean": {metric: _interval(values) for metric, values in samples.items()},
        "per_au": {f"AU{au}": {"f1_macro": _interval(macro[:, column])} for column, au in enumerate(aus)},
    }


def _mean_defined(areas: np.ndarray) -> np.ndarray:
    """Average `[R, A]` over the AUs that are not NaN; NaN where none is."""
    known = ~np.isnan(areas)
    total = np.where(known, areas, 0.0).sum(1)
    return np.divide(total, known.sum(1), out=np.full(len(areas), np.nan), where=known.any(1))


def _interval(values: np.ndarray) -> list[float] | None:
    values = values[~np.isnan(values)]
    return [float(value) for value in np.percentile(values, PERCENTILES)] if values.size else None
