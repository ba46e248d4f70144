"""Computes what a run's scores would have been had test labels made choices, as some papers report theirs.

Nothing of it enters a result. Each variant names what it does; the honest scores stand next to it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aullm_dist.errors import UserError
from aullm_dist.evaluation.metrics import f1_macro, logit_of, summarise
from aullm_dist.evaluation.scores import LeakyScores, LeakyVariant
from aullm_dist.runs.paths import RunPaths, fold_name
from aullm_dist.runs.predictions import Pooled, pool, read_predictions

__all__ = ["leaky_variants"]

# The grid of AU-LLM's published script.
GRID = np.round(np.arange(0.10, 0.8501, 0.05), 2)


def leaky_variants(run_dir: Path, aus: Sequence[int], folds: Sequence[int]) -> LeakyScores:
    """Return the scores of choices made on the test labels.

    Args:
        run_dir: The run; every epoch whose predictions it kept is looked at.
        aus: AU numbers, in column order.
        folds: Indices of the folds that the result counts.

    Returns:
        `epochs`: those present in all folds. `variants`: each with `name`, what was `chosen`, and the `mean` scores.

    Raises:
        UserError: Predictions are malformed, or an epoch answers other test clips than the last one.
    """
    tests: dict[int, dict[int, Pooled]] = {}
    for index in folds:
        files = {epoch: read_predictions(path) for epoch, path in RunPaths(run_dir).fold(index).epochs().items()}
        tests[index] = {epoch: pool(r for r in file.rows if r.role == "test") for epoch, file in files.items()}
        final = tests[index][max(files)].sample_ids
        for epoch, clips in tests[index].items():
            if clips.sample_ids != final:
                raise UserError(f"{files[epoch].path}: answers other test clips than the fold's last epoch does")
    last: dict[int, int] = {index: max(epochs) for index, epochs in tests.items()}
    shared = sorted(set.intersection(*(set(epochs) for epochs in tests.values())))
    per_fold = {index: _best_epoch(epochs) for index, epochs in tests.items()}
    variants = [
        _variant("thresholds tuned on the test clips", _joined(tests, last), aus, tune=True),
    ]
    if shared:
        of_epoch = {epoch: _joined(tests, dict.fromkeys(tests, epoch)) for epoch in shared}
        best = max(shared, key=lambda epoch: (_score(of_epoch[epoch]), -epoch))
        joined = of_epoch[best]
        variants.append(_variant("best test epoch, one for all folds", joined, aus, tune=False, epoch=best))
    names = {fold_name(index): epoch for index, epoch in per_fold.items()}
    joined = _joined(tests, per_fold)
    variants.append(_variant("best test epoch of each fold", joined, aus, tune=False, epochs=names))
    variants.append(_variant("best test epoch of each fold and tuned thresholds", joined, aus, tune=True, epochs=names))
    return {"epochs": shared, "variants": variants}


def _best_epoch(epochs: Mapping[int, Pooled]) -> int:
    return max(epochs, key=lambda epoch: (_score(epochs[epoch]), -epoch))


def _joined(tests: Mapping[int, Mapping[int, Pooled]], epochs: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    parts = [tests[index][epoch] for index, epoch in sorted(epochs.items())]
    return np.concatenate([part.labels for part in parts]), np.concatenate([part.logits for part in parts])


def _score(rows: Pooled | tuple[np.ndarray, np.ndarray]) -> float:
    labels, logits = (rows.labels, rows.logits) if isinstance(rows, Pooled) else rows
    return float(f1_macro(labels, logits > 0).mean())


def _variant(
    name: str, rows: tuple[np.ndarray, np.ndarray], aus: Sequence[int], *, tune: bool, **chosen: Any
) -> LeakyVariant:
    labels, logits = rows
    predicted = logits > 0
    if tune:
        scores = np.stack([f1_macro(labels, logits > logit_of(threshold)) for threshold in GRID])
        thresholds = GRID[scores.argmax(0)]
        chosen["thresholds"] = dict(zip((f"AU{au}" for au in aus), thresholds.tolist(), strict=True))
        predicted = logits > logit_of(thresholds)
    return {"name": name, "chosen": chosen, "mean": summarise(rows, aus, predicted=predicted)["mean"]}
