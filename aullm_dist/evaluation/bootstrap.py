"""Computes confidence intervals by resampling subjects, which are independent; clips of one face are not.

Shapes: n clips, A action units, U subjects, R resamples.
"""

from collections.abc import Sequence

import numpy as np

from aullm_dist.evaluation.metrics import f1_from_counts
from aullm_dist.evaluation.ranking import weighted_ap, within_subject_pairs
from aullm_dist.evaluation.scores import Intervals

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


def resample(
    labels: np.ndarray,
    logits: np.ndarray,
    predicted: np.ndarray,
    subjects: Sequence[str],
    *,
    resamples: int,
    seed: int,
) -> dict[str, np.ndarray] | None:
    """Score every resample of the subjects, or return None with fewer than 2 subjects or no resamples.

    A resample without positives of an AU counts its F1 by the 0/0 convention; its AUC and AP are NaN, as is the AUC
    within subjects where no drawn subject has both classes.

    Args:
        labels: `[n, A]`, 0 or 1.
        logits: `[n, A]`.
        predicted: `[n, A]` bool, for both F1.
        subjects: n subject names.
        resamples: R.
        seed: Seed of the draws.

    Returns:
        `f1_binary`, `f1_macro`, `auc`, `auc_within_subject` and `ap`, each `[R, A]`.
    """
    names, member = np.unique(np.asarray(subjects), return_inverse=True)
    if len(names) < 2 or resamples < 1:
        return None
    weights = subject_weights(len(names), resamples, seed)
    truth = labels != 0
    cells = np.stack([truth & predicted, ~truth & predicted, truth & ~predicted, ~truth & ~predicted]).astype(float)
    per_subject = np.zeros((4, len(names), labels.shape[1]))
    for cell, counts in zip(cells, per_subject, strict=True):
        np.add.at(counts, member, cell)
    binary, macro = f1_from_counts(np.einsum("ru,cua->cra", weights.astype(float), per_subject))
    clip_weights = weights[:, member]
    columns = range(labels.shape[1])
    return {
        "f1_binary": binary,
        "f1_macro": macro,
        "auc": np.stack([weighted_auc(labels[:, a], logits[:, a], clip_weights) for a in columns], axis=1),
        "auc_within_subject": np.stack(
            [_within(labels[:, a], logits[:, a], subjects, names, weights) for a in columns], axis=1
        ),
        "ap": np.stack([weighted_ap(labels[:, a], logits[:, a], clip_weights) for a in columns], axis=1),
    }


def _within(
    labels: np.ndarray, logits: np.ndarray, subjects: Sequence[str], names: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    pairs = within_subject_pairs(labels, logits, subjects)
    wins, counts = (weights @ np.array([pairs.get(name, (0.0, 0))[part] for name in names.tolist()]) for part in (0, 1))
    return np.divide(wins, counts, out=np.full(len(weights), np.nan), where=counts > 0)


def subject_bootstrap(
    labels: np.ndarray,
    logits: np.ndarray,
    predicted: np.ndarray,
    subjects: Sequence[str],
    aus: Sequence[int],
    *,
    resamples: int,
    seed: int,
) -> Intervals | None:
    """Return 95% percentile intervals over subjects, or None with fewer than 2 subjects or no resamples.

    Args: as `resample` has them, and `aus`, the A AU numbers.

    Returns:
        `mean` (low and high of every score of `resample`), `per_au` (the same), and how it was done.
    """
    samples = resample(labels, logits, predicted, subjects, resamples=resamples, seed=seed)
    if samples is None:
        return None
    return {
        "level": 0.95,
        "unit": "subject",
        "resamples": resamples,
        "seed": seed,
        "num_subjects": len(set(subjects)),
        "mean": {name: interval(mean_defined(values)) for name, values in samples.items()},
        "per_au": {
            f"AU{au}": {name: interval(values[:, column]) for name, values in samples.items()}
            for column, au in enumerate(aus)
        },
    }


def mean_defined(areas: np.ndarray) -> np.ndarray:
    """Average `[R, A]` over the AUs that are not NaN; NaN where none is."""
    known = ~np.isnan(areas)
    total = np.where(known, areas, 0.0).sum(1)
    return np.divide(total, known.sum(1), out=np.full(len(areas), np.nan), where=known.any(1))


def interval(values: np.ndarray) -> list[float] | None:
    """Return low and high of the values that are not NaN, or None if all are."""
    values = values[~np.isnan(values)]
    return [float(value) for value in np.percentile(values, PERCENTILES)] if values.size else None
