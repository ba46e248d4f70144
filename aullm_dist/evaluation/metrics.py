"""Computes per-AU scores of pooled predictions, and the floors that predictors without any evidence reach.

Shapes: n clips, A action units. All values are fractions. Conventions, the same everywhere:

- 0/0 in precision, recall or F1 is 0.0 (scikit-learn's `zero_division=0`). An AU without positives therefore has
  f1_binary 0 and f1_macro at most 0.5; it stays in both means and its support says why.
- The AUC of an AU without positives or without negatives is None, and the mean AUC leaves it out.
- An AU is predicted when `sigmoid(logit) > threshold`; comparisons are made on logits, where nothing saturates.

Folds are pooled before anything here is computed; averaging the F1 of tiny folds is refused by not being offered.
"""

from collections.abc import Mapping, Sequence
from math import lgamma, log
from typing import Any

import numpy as np

from aullm_dist.evaluation.scores import AuScores, FloorScores, Metric, MetricScores, Scores
from aullm_dist.evaluation.tables import METRICS

HEADLINE_THRESHOLD = 0.5


def confusion(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Count true positives, false positives, false negatives and true negatives.

    Args:
        labels: `[n, A]`, 0 or 1.
        predicted: `[n, A]`, bool.

    Returns:
        `[4, A]` int64, in the order tp, fp, fn, tn.
    """
    truth, guess = np.asarray(labels) != 0, np.asarray(predicted, dtype=bool)
    return np.stack(
        [(truth & guess).sum(0), (~truth & guess).sum(0), (truth & ~guess).sum(0), (~truth & ~guess).sum(0)]
    )


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Divide elementwise with 0/0 = 0.0."""
    numerator, denominator = np.asarray(numerator, dtype=float), np.asarray(denominator, dtype=float)
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=denominator > 0)


def f1_from_counts(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both F1 definitions from counts `[4, ...]` in the order tp, fp, fn, tn.

    Returns:
        f1_binary (F1 of the positive class) and f1_macro (mean of the F1 of either class), each `[...]`.
    """
    tp, fp, fn, tn = counts
    positive = divide(2 * tp, 2 * tp + fp + fn)
    negative = divide(2 * tn, 2 * tn + fp + fn)
    return positive, (positive + negative) / 2


def f1_binary(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the F1 of the positive class per AU, `[A]`, from labels and predictions `[n, A]`."""
    return f1_from_counts(confusion(labels, predicted))[0]


def f1_macro(labels: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Return the mean of the F1 of positives and of negatives per AU, `[A]`, from labels and predictions `[n, A]`."""
    return f1_from_counts(confusion(labels, predicted))[1]


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Return the area under the ROC curve of one AU, or None if it has only one class.

    Args:
        labels: `[n]`, 0 or 1.
        scores: `[n]`, any monotone score; equal scores count one half.
    """
    truth = np.asarray(labels) != 0
    positives = int(truth.sum())
    negatives = truth.size - positives
    if positives == 0 or negatives == 0:
        return None
    _, group, sizes = np.unique(np.asarray(scores), return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(sizes) - (sizes - 1) / 2
    rank_sum = mean_rank[group.reshape(-1)][truth].sum()
    return float((rank_sum - positives * (positives + 1) / 2) / (positives * negatives))


def logit_of(threshold: float | np.ndarray) -> np.ndarray:
    """Return the logit of a probability threshold."""
    threshold = np.asarray(threshold, dtype=float)
    return np.log(threshold) - np.log1p(-threshold)


def probability_of(logit: float | np.ndarray) -> np.ndarray:
    """Return the sigmoid of a logit without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * np.asarray(logit, dtype=float)))


def _half_binomial(trials: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the outcomes of a fair binomial that matter in double precision, and their probabilities."""
    outcomes = np.arange(trials + 1)
    reach = int(9 * np.sqrt(trials / 4)) + 1
    outcomes = outcomes[np.abs(outcomes - trials / 2) <= reach]
    ways = np.array([lgamma(trials + 1) - lgamma(k + 1) - lgamma(trials - k + 1) for k in outcomes.tolist()])
    return outcomes, np.exp(ways - trials * log(2))


def _coin_f1(positives: int, negatives: int) -> float:
    """Return the expected F1 of the positive class when every clip is predicted by a fair coin.

    The expectation is exact: true and false positives are independent fair binomials.
    """
    hits, hit_weight = _half_binomial(positives)
    alarms, alarm_weight = _half_binomial(negatives)
    f1 = divide(2 * hits[:, None] + 0 * alarms, hits[:, None] + alarms + positives)
    return float(hit_weight @ f1 @ alarm_weight)


def floors_per_au(labels: np.ndarray) -> list[dict[str, dict[Metric, float]]]:
    """Return, per AU, what predictors without evidence score on these labels.

    Args:
        labels: `[n, A]`, 0 or 1; the pooled test set.

    Returns:
        Per AU the rows `all_negative`, `all_positive` and `random` (uniform scores, threshold 0.5), each with
        `f1_binary`, `f1_macro` and `auc`.

    Source:
        The floors follow from the definitions of the metrics; the closed form of `random` is (ours).
    """
    rows = []
    clips = len(labels)
    for positives in (np.asarray(labels) != 0).sum(0).tolist():
        negatives = clips - positives
        nothing = f1_from_counts(np.array([0, 0, positives, negatives]))
        everything = f1_from_counts(np.array([positives, negatives, 0, 0]))
        coin = _coin_f1(positives, negatives)
        coins = (coin, (coin + _coin_f1(negatives, positives)) / 2)
        named: dict[str, tuple[Any, Any]] = {"all_negative": nothing, "all_positive": everything, "random": coins}
        row: dict[str, dict[Metric, float]] = {
            name: {"f1_binary": float(binary), "f1_macro": float(macro), "auc": 0.5}
            for name, (binary, macro) in named.items()
        }
        rows.append(row)
    return rows


def headline_floor(details: Mapping[str, Mapping[Metric, float]]) -> FloorScores:
    """Pick the floor of each metric: all-positive for f1_binary, all-negative for f1_macro, chance for auc."""
    return {
        "f1_binary": details["all_positive"]["f1_binary"],
        "f1_macro": details["all_negative"]["f1_macro"],
        "auc": 0.5,
        "details": {name: dict(row) for name, row in details.items()},
    }


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are defined, or None if none is."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def summarise(
    rows: tuple[np.ndarray, np.ndarray], aus: Sequence[int], *, predicted: np.ndarray | None = None
) -> Scores:
    """Score pooled predictions; cheap enough for every evaluation during training.

    Args:
        rows: Labels and logits of the same clips in the same order, each `[n, A]`.
        aus: The A AU numbers, in column order.
        predicted: `[n, A]` bool, decisions made with other thresholds; None applies 0.5 to `sigmoid(logit)`.

    Returns:
        `mean` and `floors` with `f1_binary`, `f1_macro`, `auc`; `per_au` with the same, `support`, `negatives` and
        `floors` for each AU under the key `AU<number>`. Fractions; None where undefined.
    """
    labels, logits = (np.asarray(array) for array in rows)
    assert len(labels) > 0, "no rows to score"
    assert labels.shape == logits.shape == (len(labels), len(aus)), f"{labels.shape} {logits.shape} for {len(aus)} AUs"
    if predicted is None:
        predicted = logits > logit_of(HEADLINE_THRESHOLD)
    binary, macro = f1_from_counts(confusion(labels, predicted))
    floor_rows = floors_per_au(labels)
    per_au: dict[str, AuScores] = {}
    for column, au in enumerate(aus):
        support = int((labels[:, column] != 0).sum())
        per_au[f"AU{au}"] = {
            "f1_binary": float(binary[column]),
            "f1_macro": float(macro[column]),
            "auc": auc(labels[:, column], logits[:, column]),
            "support": support,
            "negatives": len(labels) - support,
            "floors": headline_floor(floor_rows[column]),
        }
    details: dict[str, dict[Metric, float]] = {
        name: {metric: float(np.mean([row[name][metric] for row in floor_rows])) for metric in METRICS}
        for name in floor_rows[0]
    }
    mean: MetricScores = {
        "f1_binary": float(np.mean([row["f1_binary"] for row in per_au.values()])),
        "f1_macro": float(np.mean([row["f1_macro"] for row in per_au.values()])),
        "auc": mean_of([row["auc"] for row in per_au.values()]),
    }
    return {"mean": mean, "floors": headline_floor(details), "per_au": per_au}
