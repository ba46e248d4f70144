"""Holds the answers of a model to held-out clips, in memory."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Answers:
    """Labels and logits `[n, A]` of a view's clips, in the view's own order."""

    sample_ids: tuple[str, ...]
    subjects: tuple[str, ...]
    corpora: tuple[str, ...]
    labels: np.ndarray
    logits: np.ndarray


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probabilities of logits."""
    return 1.0 / (1.0 + np.exp(-logits))
