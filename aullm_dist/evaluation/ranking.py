"""Measures how well logits rank and how well they are calibrated, without any threshold.

Shapes: n clips, A action units, R resamples. Pooled AUC and average precision compare clips that were answered by
models of different folds. Each model has its own offset, which adds noise to such comparisons: both are biased low.
The AUC within subjects compares clips of one subject only, which one model answered, and is free of that.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from aullm_dist.evaluation.metrics import auc, mean_of, probability_of
from aullm_dist.evaluation.scores import RankingScores

__all__ = ["average_precision", "calibration", "ranking", "weighted_ap", "within_subject_auc", "within_subject_pairs"]

BINS = 10


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Return the average precision of one AU, or None without a positive or without a negative clip.

    The sum over distinct scores of precision times gain in recall, without interpolation; equal scores count together.

    Args:
        labels: `[n]`, 0 or 1.
        scores: `[n]`, any monotone score.
    """
    truth = np.asarray(labels) != 0
    if truth.all() or not truth.any():
        return None
    return float(weighted_ap(labels, scores, np.ones((1, len(truth))))[0])


def weighted_ap(labels: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the average precision of one AU under each resample, `[R]`, NaN where a resample has one class only.

    Args:
        labels: `[n]`, 0 or 1.
        scores: `[n]`.
        weights: `[R, n]`, how often each clip is drawn.
    """
    order = np.argsort(-np.asarray(scores), kind="stable")
    starts = np.flatnonzero(np.diff(np.asarray(scores)[order], prepend=np.inf))
    truth = np.asarray(labels)[order] != 0
    drawn = weights[:, order].astype(float)
    gained = np.add.reduceat(drawn * truth, starts, axis=1)
    everything = np.cumsum(np.add.reduceat(drawn, starts, axis=1), axis=1)
    hits = np.cumsum(gained, axis=1)
    precision = np.divide(hits, everything, out=np.zeros_like(hits), where=everything > 0)
    positives = gained.sum(1)
    defined = (positives > 0) & (positives < everything[:, -1])
    return np.divide((precision * gained).sum(1), positives, out=np.full(len(gained), np.nan), where=defined)


def within_subject_pairs(labels: np.ndarray, scores: np.ndarray, subjects: Sequence[str]) -> dict[str, tuple]:
    """Return, per subject with both classes of one AU, the pairs (positive, negative) and how many are in order.

    Args:
        labels: `[n]`, 0 or 1.
        scores: `[n]`.
        subjects: n names.

    Returns:
        Subject -> (pairs in order, equal scores counting one half; pairs).
    """
    names = np.asarray(subjects)
    found = {}
    for name in np.unique(names).tolist():
        own = names == name
        area = auc(labels[own], scores[own])
        if area is not None:
            positives = int((labels[own] != 0).sum())
            pairs = positives * (int(own.sum()) - positives)
            found[name] = (area * pairs, pairs)
    return found


def within_subject_auc(labels: np.ndarray, scores: np.ndarray, subjects: Sequence[str]) -> float | None:
    """Return the share of same-subject pairs in order, or None where no subject has both classes."""
    pairs = within_subject_pairs(labels, scores, subjects).values()
    return sum(wins for wins, _ in pairs) / sum(count for _, count in pairs) if pairs else None


def calibration(labels: np.ndarray, logits: np.ndarray) -> dict[str, float]:
    """Return how well `sigmoid(logit)` is a probability, for one AU.

    Returns:
        `brier`, the mean squared error; `brier_floor`, that of always answering the share of positives; `ece`, the mean
        gap between answer and share of positives over 10 equally wide bins, weighted by their clips; and the
        `mean_probability`.
    """
    truth = (np.asarray(labels) != 0).astype(float)
    answers = probability_of(logits)
    bins = np.minimum((answers * BINS).astype(int), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    gaps = np.abs(np.bincount(bins, answers, BINS) - np.bincount(bins, truth, BINS))
    share = truth.mean()
    return {
        "brier": float(np.square(answers - truth).mean()),
        "brier_floor": float(share * (1 - share)),
        "ece": float(gaps.sum() / counts.sum()),
        "mean_probability": float(answers.mean()),
    }


def ranking(labels: np.ndarray, logits: np.ndarray, subjects: Sequence[str], aus: Sequence[int]) -> RankingScores:
    """Return `per_au` and their `mean`: AUC within subjects, average precision with its floor, calibration.

    Args:
        labels: `[n, A]`, 0 or 1.
        logits: `[n, A]`.
        subjects: n names.
        aus: The A AU numbers.

    Returns:
        Fractions; None where undefined, and left out of the mean.
    """
    per_au: dict[str, dict[str, Any]] = {}
    for column, au in enumerate(aus):
        truth, scores = labels[:, column], logits[:, column]
        pairs = within_subject_pairs(truth, scores, subjects)
        per_au[f"AU{au}"] = {
            "auc": auc(truth, scores),
            "auc_within_subject": within_subject_auc(truth, scores, subjects),
            "subjects_with_both": len(pairs),
            "ap": average_precision(truth, scores),
            # What a constant answer reaches; undefined with `ap`, so that their means are over the same AUs.
            "ap_floor": float((truth != 0).mean()) if 0 < (truth != 0).mean() < 1 else None,
            **calibration(truth, scores),
        }
    keys = [key for key in next(iter(per_au.values())) if key != "subjects_with_both"]
    return {"mean": {key: mean_of([row[key] for row in per_au.values()]) for key in keys}, "per_au": per_au}
