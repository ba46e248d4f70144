"""Computes an answer's ladder: what evidence, structure and deduction each add, on the same clips and resamples.

Shapes: n clips, A action units, R resamples.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aullm_dist.errors import UserError
from aullm_dist.evaluation.bootstrap import interval, mean_defined, resample
from aullm_dist.evaluation.metrics import HEADLINE_THRESHOLD, logit_of, summarise
from aullm_dist.evaluation.scores import LadderEntry, LadderStep, Metric, MetricScores
from aullm_dist.evaluation.tables import METRICS
from aullm_dist.files import is_taken
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runs.predictions import Pooled, PredictionFile, pool, read_predictions

EARLIER_STAGES = ("evidence", "structure")
"""Stages whose answers a run stores in addition to the final one, in the order in which they add up."""


_Scored = tuple[MetricScores, dict[str, np.ndarray] | None]


def earlier_answers(run_dir: Path, files: Mapping[int, PredictionFile], pooled: Pooled) -> dict[str, Pooled]:
    """Return the pooled test answers of the earlier stages; a stage that a scored fold lacks at its step is left out.

    Args:
        run_dir: the run folder.
        files: each fold's final answers.
        pooled: their test clips.

    Raises:
        UserError: a file is malformed, or is not of the clips, labels and step of the final answers.
    """
    paths = {stage: {i: RunPaths(run_dir).fold(i).stage(stage) for i in files} for stage in EARLIER_STAGES}
    found = {stage: answers_of_last_evaluation(each, files, pooled) for stage, each in paths.items()}
    return {stage: answers for stage, answers in found.items() if answers is not None}


def answers_of_last_evaluation(
    paths: Mapping[int, Path], files: Mapping[int, PredictionFile], pooled: Pooled
) -> Pooled | None:
    """Return the pooled test answers that a run stores next to the final ones, of its last evaluation alone.

    Args:
        paths: each fold's file of them.
        files: each fold's final answers.
        pooled: their test clips.

    Returns:
        None if a fold has no such file, or one of another step than its final answers.

    Raises:
        UserError: a file is malformed, or is not of the clips, labels and AUs of the final answers.
    """
    if not all(map(is_taken, paths.values())):
        return None
    found = {index: read_predictions(path) for index, path in paths.items()}
    if any(file.step != files[index].step for index, file in found.items()):
        return None
    for index, file in found.items():
        if file.aus != files[index].aus:
            raise UserError(f"{file.path}: is of other AUs than {files[index].path}")
        if _clips_of(file) != _clips_of(files[index]):
            raise UserError(f"{file.path}: answers other clips than {files[index].path}; evaluate the fold again")
    rows = pool(row for file in found.values() for row in file.rows if row.role == "test")
    assert rows.sample_ids == pooled.sample_ids, "the files of each fold answer the same clips"
    return rows


def _clips_of(file: PredictionFile) -> dict[str, tuple[int, ...]]:
    return {row.sample_id: row.labels for row in file.rows if row.role == "test"}


def score_ladder(
    earlier: Mapping[str, Pooled], pooled: Pooled, aus: Sequence[int], *, bootstrap: int, seed: int
) -> list[LadderEntry] | None:
    """Score every stage and what it adds to the one before it.

    Args:
        earlier: pooled answers of the earlier stages, from `earlier_answers`.
        pooled: the final answers to the same clips.
        aus: the A AU numbers.
        bootstrap: R.
        seed: of the resampling.

    Returns:
        One entry for each stage, the last for the answer: `stage`, `mean` (fractions of `METRICS`) and `step`, None for
        the first stage: for each score its `difference` and the paired 95% interval `ci`. None without earlier stages.
    """
    if not earlier:
        return None
    entries: list[LadderEntry] = []
    before: _Scored | None = None
    for stage, rows in {**earlier, "deduction": pooled}.items():
        means = summarise((rows.labels, rows.logits), aus)["mean"]
        samples = resample(
            rows.labels, rows.logits, rows.logits > logit_of(HEADLINE_THRESHOLD), rows.subjects,
            resamples=bootstrap, seed=seed,
        )  # fmt: skip
        step = None if before is None else {name: _step(name, before, (means, samples)) for name in METRICS}
        entries.append({"stage": stage, "mean": means, "step": step})
        before = (means, samples)
    return entries


def _step(
    name: Metric,
    before: _Scored,
    now: _Scored,
) -> LadderStep:
    one, two = before[0][name], now[0][name]
    if one is None or two is None:
        return {"difference": None, "ci": None}
    spread = None
    if before[1] is not None and now[1] is not None:
        spread = interval(mean_defined(now[1][name] - before[1][name]))
    return {"difference": two - one, "ci": spread}
