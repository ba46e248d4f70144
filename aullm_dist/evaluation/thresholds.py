"""Chooses decision thresholds on a fold's own inner subjects, who were neither trained on nor tested."""

import numpy as np

from aullm_dist.evaluation.metrics import f1_from_counts


def choose_thresholds(labels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Return the logit threshold per AU with the highest f1_macro on these clips **(ours)**.

    Candidates are logit 0 (probability 0.5) and the midpoints between neighbouring logits; of equally good ones the
    nearest to 0 wins. An AU that the clips show in one class only keeps 0: there is nothing to choose by.

    Args:
        labels: `[n, A]`, 0 or 1, of the inner clips of one fold.
        logits: `[n, A]`.

    Returns:
        `[A]` logits.
    """
    chosen = np.zeros(labels.shape[1])
    for column in range(labels.shape[1]):
        truth, scores = labels[:, column] != 0, logits[:, column]
        if truth.all() or not truth.any():
            continue
        distinct = np.unique(scores)
        candidates = np.append((distinct[:-1] + distinct[1:]) / 2, 0.0)
        above = np.sort(scores[truth]), np.sort(scores[~truth])
        hits, alarms = (len(part) - np.searchsorted(part, candidates, side="right") for part in above)
        misses, rejections = truth.sum() - hits, (~truth).sum() - alarms
        macro = f1_from_counts(np.stack([hits, alarms, misses, rejections]))[1]
        best = candidates[macro == macro.max()]
        chosen[column] = min(best.tolist(), key=lambda value: (abs(value), value))
    return chosen
