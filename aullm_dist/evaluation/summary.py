"""Prints the end of a run: the table, the comparison with its parts taken away, and what to do next."""

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from aullm_dist.config import Config
from aullm_dist.data.protocols import read_folds
from aullm_dist.errors import UserError
from aullm_dist.evaluation.blocks import percent
from aullm_dist.evaluation.caveats import caveats, in_title
from aullm_dist.evaluation.evaluate import evaluate_run, write_thresholds
from aullm_dist.evaluation.ladder import answers_of_last_evaluation
from aullm_dist.evaluation.metrics import probability_of, summarise
from aullm_dist.evaluation.scores import Metrics
from aullm_dist.evaluation.tables import render
from aullm_dist.log import get_logger
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runs.predictions import Pooled, find_predictions, pool, read_predictions
from aullm_dist.shell import command

logger = get_logger(__name__)


def print_summary(run: Path, config: Config) -> None:
    """Score a finished run and print it; a run without a test side gets the thresholds for its release instead."""
    out, paths = sys.stdout.write, RunPaths(run)
    has_test_side = any(fold.test for fold in read_folds(paths.folds_file).folds)
    if has_test_side:
        metrics = evaluate_run(run)
        out("\n" + render(metrics, "text") + "\n")
        _write_comparison(run, metrics, config.model.network)
    thresholds = write_thresholds(run) if any(fold.epochs() for fold in paths.folds().values()) else {}
    out(f"Run folder   {run}\n")
    out(f"Checkpoints  {run}/fold-*/checkpoints\n")
    if thresholds:
        out(f"Thresholds   {run}/fold-*/thresholds.json\n")
    if config.monitor.tensorboard:
        out(f"TensorBoard  {paths.tensorboard}   ({command('tensorboard', '--logdir', paths.tensorboard)})\n")
    if has_test_side:
        out(f"Numbers      {paths.metrics()}, {paths.table('md').name}, {paths.table('csv').name}\n")
    out(_next_steps(run, config, has_test_side=has_test_side))


def print_summaries(folders: Mapping[str, Path], sweep: Path) -> None:
    """Score the runs of a sweep as `print_summary` scores one, and print a line for each of them.

    Args:
        folders: of the finished runs, by name.
        sweep: the folder of the sweep.
    """
    out = sys.stdout.write
    lines = [
        (f"{name}, no LLM ({network})" if network else name, _scored(folder))
        for name, run in folders.items()
        for network, folder in {"": run, **RunPaths(run).baselines()}.items()
    ]
    width = max(len(label) for label, _ in lines) + 2
    known = in_title(caveats(list(folders.values())))
    out(f"\n{'run':<{width}}{'f1_macro':>9}{'auc':>7}   mean over AUs, in percent{known}\n")
    for label, scores in lines:
        out(f"{label:<{width}}{scores}\n")
    out(f"\nRun folders  {command(*folders.values())}\n")
    out(f"TensorBoard  {command('tensorboard', '--logdir', sweep)}\n")
    out(f"\nNext: {command('aullm-dist', 'report', 'ablation', *folders.values())}\n")


def _scored(run: Path) -> str:
    """Write the tables of a run and return its scores."""
    paths = RunPaths(run)
    scores = "no test side"
    if any(fold.test for fold in read_folds(paths.folds_file).folds):
        mean = evaluate_run(run)["mean"]
        scores = f"{percent(mean['f1_macro']):>9}{percent(mean['auc']):>7}"
    if any(fold.epochs() for fold in paths.folds().values()):
        write_thresholds(run)
    return scores


def _write_comparison(run: Path, metrics: Metrics, network: str) -> None:
    """Print the full model next to itself without CT, without IT, and to the baselines, all of them pooled."""
    out = sys.stdout.write
    zeroed = zeroed_scores(run)
    rows = [("AULLM++" if zeroed else network, metrics["mean"]["f1_macro"], "")]
    for token, (score, change) in zeroed.items():
        name = {"content": "content token (CT)", "instruction": "instruction token (IT)"}[token]
        rows.append((f"  with the {name} zeroed", score, f"answers move by {change:.3f} on average"))
    for name, folder in RunPaths(run).baselines().items():
        label = f"no-LLM baseline ({name})"
        try:
            rows.append((label, evaluate_run(folder)["mean"]["f1_macro"], "same folds and epochs"))
        except UserError as error:
            # The run itself is finished, and its own table stands above.
            logger.warning("%s cannot be scored: %s", label, error)
    rows.append(("floor: never predicting an AU", metrics["floors"]["f1_macro"], ""))
    if len(rows) > 2:
        out(f"Mean f1_macro, in percent{in_title(metrics['caveats'])}\n")
        for name, score, remark in rows:
            out(f"  {name:<40}{100 * score:6.1f}  {remark}".rstrip() + "\n")
        out("\n")


def zeroed_answers(run: Path) -> dict[str, Pooled]:
    """Return the pooled test answers without each soft token; one that is not there for every scored fold is left out.

    Raises:
        UserError: predictions are missing or malformed.
    """
    finals = {index: read_predictions(path) for index, path in find_predictions(run).items()}
    full = pool(row for file in finals.values() for row in file.rows if row.role == "test")
    paths = {
        token: {index: RunPaths(run).fold(index).zeroed(token) for index in finals}
        for token in ("content", "instruction")
    }
    found = {token: answers_of_last_evaluation(each, finals, full) for token, each in paths.items()}
    return {token: answers for token, answers in found.items() if answers is not None}


def zeroed_scores(run: Path) -> dict[str, tuple[float, float]]:
    """Return, per soft token, the pooled f1_macro without it and the mean change of the probabilities."""
    answers = zeroed_answers(run)
    if not answers:
        return {}
    finals = [read_predictions(path) for path in find_predictions(run).values()]
    full = pool(row for file in finals for row in file.rows if row.role == "test")
    scores = {}
    for token, without in answers.items():
        change = np.abs(probability_of(full.logits) - probability_of(without.logits)).mean()
        mean = summarise((without.labels, without.logits), finals[0].aus)["mean"]
        scores[token] = (mean["f1_macro"], float(change))
    return scores


def _next_steps(run: Path, config: Config, *, has_test_side: bool) -> str:
    evaluate = command("aullm-dist", "evaluate", run)
    if not has_test_side:
        # There is nothing to evaluate: such a run is trained to answer other clips, or to be given away.
        fold = RunPaths(run).fold(config.data.fold or 0).folder
        release = command("aullm-dist", "merge", fold, "--format", "adapter", "--out", "RELEASE")
        predict = command("aullm-dist", "predict", fold, "CLIPS")
        return f"\nNext: {predict}\n" + ("" if config.model.llm == "none" else f"      {release}\n")
    if config.data.train:
        return f"\nNext: {evaluate}\n"
    steps = {
        "aullm-dist prepare casme2 --root /path/to/CASME2 --out data/casme2": "your licensed corpus",
        "accelerate launch --quiet aullm_dist/train.py --config casme2_loso model.llm=/path/to/llm": "LOSO on it",
        evaluate: "the tables again",
    }
    width = max(map(len, steps)) + 2
    lines = "".join(f"  {step:<{width}}{meaning}\n" for step, meaning in steps.items())
    return (
        "\nThe corpus above is synthetic: it shows that the machinery works and says nothing about real faces. Next:\n"
        + lines
    )
