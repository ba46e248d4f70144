"""Evaluates a run folder: reads every fold's predictions, checks, pools and scores them, writes the tables."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from aullm_dist.config import TrainingConfig, load_recorded
from aullm_dist.data.corpora import find_corpus
from aullm_dist.data.order import total_steps
from aullm_dist.data.protocols import Fold, FoldPlan, read_folds
from aullm_dist.errors import UserError
from aullm_dist.evaluation.bootstrap import subject_bootstrap
from aullm_dist.evaluation.caveats import caveats
from aullm_dist.evaluation.ladder import earlier_answers, score_ladder
from aullm_dist.evaluation.leaky import leaky_variants
from aullm_dist.evaluation.metrics import HEADLINE_THRESHOLD, logit_of, probability_of, summarise
from aullm_dist.evaluation.ranking import ranking
from aullm_dist.evaluation.scores import CorpusScores, InnerScores, Metrics, Scored
from aullm_dist.evaluation.tables import render
from aullm_dist.evaluation.thresholds import choose_thresholds
from aullm_dist.files import write_text
from aullm_dist.runs.paths import RunPaths, fold_name
from aullm_dist.runs.predictions import (
    Pooled,
    PredictionFile,
    StoredPrediction,
    find_predictions,
    pool,
    read_predictions,
)

THRESHOLD_POLICY = "per fold and AU, highest f1_macro on the fold's own inner held-out subjects"


def evaluate_run(
    run_dir: Path | str, *, epoch: int | None = None, bootstrap: int = 1000, seed: int = 0, leaky: bool = False
) -> Metrics:
    """Score the pooled test predictions of a run and write `metrics.json`, `table.md` and `table.csv` into its folder.

    Args: as `score_run` has them. The files of an `epoch` bear its number in their names, so that they never replace
    the run's result.

    Returns:
        The contents of `metrics.json`, in fractions.

    Raises:
        UserError: What `score_run` raises, or the folder cannot be written.
    """
    run_dir = Path(run_dir)
    metrics = score_run(run_dir, epoch=epoch, bootstrap=bootstrap, seed=seed, leaky=leaky)
    run = RunPaths(run_dir)
    outputs = {run.table("md", epoch): "markdown", run.table("csv", epoch): "csv", run.metrics(epoch): "json"}
    for path, fmt in outputs.items():
        try:
            write_text(path, render(metrics, fmt))
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return metrics


def score_run(
    run_dir: Path, *, epoch: int | None = None, bootstrap: int = 1000, seed: int = 0, leaky: bool = False
) -> Metrics:
    """Score the pooled test predictions of a run; nothing is written.

    Args:
        run_dir: Folder with `folds.json` and `fold-*/predictions/`.
        epoch: None takes each fold's last epoch, the only one that may be reported. A number is for looking at
            training.
        bootstrap: Resamples of subjects for the confidence intervals; 0 leaves them out.
        seed: Seed of the resampling.
        leaky: Also score choices made on the test labels, as `leaky`; they change nothing else.

    Returns:
        What `metrics.json` holds, in fractions.

    Raises:
        UserError: If predictions are missing, malformed, overlapping or not those of `folds.json`.
    """
    if bootstrap < 0 or seed < 0:
        raise UserError(f"bootstrap {bootstrap}, seed {seed}: both must be at least 0")
    plan, files, pooled = read_run(run_dir, epoch)
    aus = plan.aus
    predicted = pooled.logits > logit_of(HEADLINE_THRESHOLD)
    # What is stored of the earlier stages is of the last evaluation.
    earlier = earlier_answers(run_dir, files, pooled) if epoch is None else {}
    return {
        "unit": "fraction",
        "threshold": HEADLINE_THRESHOLD,
        "threshold_policy": "fixed 0.5 on sigmoid(logit)",
        "aus": list(aus),
        **_describe(plan, files, pooled, epoch, RunPaths(run_dir)),
        **summarise((pooled.labels, pooled.logits), aus),
        "ci": subject_bootstrap(
            pooled.labels, pooled.logits, predicted, pooled.subjects, aus, resamples=bootstrap, seed=seed
        ),
        "ranking": ranking(pooled.labels, pooled.logits, pooled.subjects, aus),
        "ladder": score_ladder(earlier, pooled, aus, bootstrap=bootstrap, seed=seed),
        "inner_thresholds": _score_inner(files, pooled, aus, bootstrap, seed),
        "per_corpus": _score_corpora(pooled, aus),
        "leaky": leaky_variants(run_dir, aus, sorted(files)) if leaky else None,
    }


def read_run(run_dir: Path, epoch: int | None = None) -> tuple[FoldPlan, dict[int, PredictionFile], Pooled]:
    """Return a run's folds, the predictions of each and its pooled test clips, all checked against each other.

    Raises:
        UserError: If predictions are missing, malformed, overlapping or not those of `folds.json`.
    """
    paths = find_predictions(run_dir, epoch)
    plan = read_folds(RunPaths(run_dir).folds_file)
    files = {index: read_predictions(path) for index, path in paths.items()}
    _check_files(files, plan)
    tests = [row for file in files.values() for row in file.rows if row.role == "test"]
    if not tests:
        raise UserError(f"{run_dir}: no test predictions; protocol {plan.protocol} has nothing to evaluate here")
    return plan, files, pool(tests)


def inner_thresholds(files: Mapping[int, PredictionFile]) -> dict[int, np.ndarray]:
    """Return each fold's logit thresholds `[A]`, from its own inner rows; folds without inner rows are left out."""
    chosen = {}
    for index, file in files.items():
        rows = [row for row in file.rows if row.role == "inner"]
        if rows:
            inner = pool(rows)
            chosen[index] = choose_thresholds(inner.labels, inner.logits)
    return chosen


def write_thresholds(run_dir: Path | str) -> dict[int, Path]:
    """Write each fold's `thresholds.json`: the probability per AU chosen on its inner subjects, for use on new clips.

    Returns:
        The file of each fold that has inner subjects.

    Raises:
        UserError: If predictions are missing or malformed.
    """
    run_dir = Path(run_dir)
    files = {index: read_predictions(path) for index, path in find_predictions(run_dir).items()}
    written = {}
    for index, values in inner_thresholds(files).items():
        probabilities = probability_of(values).tolist()
        content = {
            "threshold_policy": THRESHOLD_POLICY,
            "epoch": files[index].epoch,
            "thresholds": {f"AU{au}": value for au, value in zip(files[index].aus, probabilities, strict=True)},
        }
        written[index] = RunPaths(run_dir).fold(index).thresholds
        write_text(written[index], json.dumps(content, indent=1) + "\n")
    return written


def _score_inner(
    files: Mapping[int, PredictionFile], pooled: Pooled, aus: Sequence[int], bootstrap: int, seed: int
) -> InnerScores | None:
    chosen = inner_thresholds(files)
    if not chosen:
        return None
    default = np.zeros(len(aus))
    predicted = pooled.logits > np.stack([chosen.get(fold, default) for fold in pooled.folds])
    scores = summarise((pooled.labels, pooled.logits), aus, predicted=predicted)
    as_probability = {index: probability_of(values).tolist() for index, values in sorted(chosen.items())}
    keys = [f"AU{au}" for au in aus]
    return {
        "threshold_policy": THRESHOLD_POLICY,
        "mean": scores["mean"],
        "per_au": {
            key: {
                "f1_binary": scores["per_au"][key]["f1_binary"],
                "f1_macro": scores["per_au"][key]["f1_macro"],
                "auc": scores["per_au"][key]["auc"],
                "threshold_low": min(values[column] for values in as_probability.values()),
                "threshold_high": max(values[column] for values in as_probability.values()),
            }
            for column, key in enumerate(keys)
        },
        "ci": subject_bootstrap(
            pooled.labels, pooled.logits, predicted, pooled.subjects, aus, resamples=bootstrap, seed=seed
        ),
        "folds": {fold_name(i): dict(zip(keys, v, strict=True)) for i, v in as_probability.items()},
        "folds_without_inner": [fold_name(index) for index in sorted(files) if index not in chosen],
    }


def _score_corpora(pooled: Pooled, aus: Sequence[int]) -> dict[str, CorpusScores] | None:
    """Score each tested corpus on the AUs of its own set that are under test; None with one corpus."""
    names = sorted(set(pooled.corpora))
    if len(names) < 2:
        return None
    scores: dict[str, CorpusScores] = {}
    for name in names:
        rows = np.array([corpus == name for corpus in pooled.corpora])
        spec = find_corpus(name)
        under_test = aus if spec is None else spec.aus
        own = [column for column, au in enumerate(aus) if au in under_test] or list(range(len(aus)))
        numbers = [aus[column] for column in own]
        part = summarise((pooled.labels[rows][:, own], pooled.logits[rows][:, own]), numbers)
        scores[name] = {"num_clips": int(rows.sum()), "aus": numbers, **part}
    return scores


def unfinished(files: Mapping[int, PredictionFile], plan: FoldPlan, training: TrainingConfig) -> list[str]:
    """Name the folds whose training had not reached its last step: to stop a run at a good score is to choose by it."""
    notes = []
    for index, file in sorted(files.items()):
        last = total_steps(len(plan.folds[index].train), training.epochs, training.global_batch, training.max_steps)
        if file.step < last:
            notes.append(f"{fold_name(index)} is unfinished: these are the answers of step {file.step} of {last}")
    return notes


def _describe(
    plan: FoldPlan, files: Mapping[int, PredictionFile], pooled: Pooled, epoch: int | None, run: RunPaths
) -> Scored:
    """Say what was scored, and in words whatever makes it less than the whole run."""
    expected = [fold for fold in plan.folds if fold.test]
    missing = [fold.name for fold in expected if fold.index not in files]
    epochs = {index: file.epoch for index, file in sorted(files.items())}
    notes = []
    if missing:
        here = f"{len(expected) - len(missing)} of {len(expected)} folds are here"
        notes.append(f"{here}; the scores leave out {', '.join(missing)}")
    if len(set(epochs.values())) > 1:
        longest = max(epochs.values())
        short = [f"{fold_name(index)} (epoch {done})" for index, done in epochs.items() if done < longest]
        notes.append(f"folds ended at different epochs; behind epoch {longest}: {', '.join(short)}")
    if run.config.exists():
        notes += unfinished(files, plan, load_recorded(run.config).training)
    if epoch is not None:
        notes.append(f"epoch {epoch} was chosen by hand: report the last epoch, or test labels choose the epoch")
    return {
        "protocol": plan.protocol,
        "corpora": list(plan.corpora),
        # Which way a cross-domain run goes stands in the name of its one fold.
        "direction": plan.folds[0].name if plan.protocol == "cross" else None,
        "num_clips": len(pooled.sample_ids),
        "num_subjects": len(set(pooled.subjects)),
        "folds": {"expected": len(expected), "present": len(expected) - len(missing), "missing": missing},
        "epochs": {fold_name(index): done for index, done in epochs.items()},
        "notes": notes,
        "caveats": caveats([run.root]),
    }


def _check_files(files: Mapping[int, PredictionFile], plan: FoldPlan) -> None:
    """Check all files against each other and against `folds.json`."""
    labels: dict[str, StoredPrediction] = {}
    tested_in: dict[str, int] = {}
    for index, file in sorted(files.items()):
        if index >= len(plan.folds):
            raise UserError(f"{file.path}: folds.json has no fold {index}; it has {len(plan.folds)} fold(s)")
        if file.aus != plan.aus:
            raise UserError(f"{file.path}: AUs {list(file.aus)}; folds.json has {list(plan.aus)}")
        _check_rows(file, plan.folds[index])
        for row in file.rows:
            known = labels.setdefault(row.sample_id, row)
            if (known.labels, known.subject, known.corpus) != (row.labels, row.subject, row.corpus):
                raise UserError(
                    f"{file.path}: {row.sample_id} has other labels or another subject than in fold {known.fold}"
                )
            if row.role == "test" and tested_in.setdefault(row.subject, index) != index:
                raise UserError(
                    f"{file.path}: subject {row.subject} is also tested in fold {tested_in[row.subject]}; "
                    "all clips of a subject belong to one fold"
                )


def _check_rows(file: PredictionFile, fold: Fold) -> None:
    for row in file.rows:
        if row.fold != fold.index:
            raise UserError(f"{file.path}: {row.sample_id} says fold {row.fold}, the file lies in fold {fold.index}")
    for role, planned in (("test", set(fold.test)), ("inner", set(fold.inner))):
        present = set(pool(row for row in file.rows if row.role == role).sample_ids)
        if foreign := sorted(present - planned):
            raise UserError(f"{file.path}: {foreign[0]} is no {role} clip of fold {fold.index} in folds.json")
        # A clip that silently drops out would be neither right nor wrong. Inner rows are optional as a whole.
        if (role == "test" or present) and (lost := sorted(planned - present)):
            raise UserError(f"{file.path}: {len(lost)} of {len(planned)} {role} clips have no row, first {lost[0]}")
    sides = [{row.subject for row in file.rows if row.role == role} for role in ("test", "inner")]
    if both := sorted(sides[0] & sides[1]):
        raise UserError(f"{file.path}: subject {both[0]} is both test and inner; thresholds would see the test side")
