"""Predictions as an evaluation stores them, from labels and noise."""

from collections.abc import Mapping

import numpy as np

from aullm_dist.data.protocols import Fold
from aullm_dist.runs.predictions import StoredPrediction


def rows_of(
    fold: Fold, truth: Mapping[str, tuple[int, ...]], generator: np.random.Generator, *, gain: float, offset: float
) -> list[StoredPrediction]:
    """Return the inner and test rows of a fold; logits are `gain` times the label plus `offset` and noise."""
    return [
        StoredPrediction(
            sample_id=name,
            subject=name.rpartition("/")[0],
            corpus="casme2",
            fold=fold.index,
            role=role,
            labels=truth[name],
            logits=tuple((gain * np.array(truth[name]) + offset + generator.normal(size=len(truth[name]))).tolist()),
        )
        for role, names in (("inner", fold.inner), ("test", fold.test))
        for name in names
    ]
