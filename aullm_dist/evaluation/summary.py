"""What a run prints when it ends: the table, the comparison with its parts taken away, and what to do next."""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from aullm_dist.config import Config
from aullm_dist.data.protocols import read_folds
from aullm_dist.evaluation.evaluate import evaluate_run, write_thresholds
from aullm_dist.evaluation.metrics import probability_of, summarise
from aullm_dist.evaluation.tables import render
from aullm_dist.training.predictions import Pooled, find_predictions, pool, read_predictions, zeroed_path


def print_summary(run: Path, config: Config) -> None:
    """Score a finished run and print it; a run without a test side gets the thresholds for its release instead."""
    out = sys.stdout.write
    has_test_side = any(fold.test for fold in read_folds(run / "folds.json").folds)
    if has_test_side:
        metrics = evaluate_run(run)
        out("\n" + render(metrics, "text") + "\n")
        _write_comparison(run, metrics)
    thresholds = write_thresholds(run) if any(run.glob("fold-*/predictions")) else {}
    out(f"Run folder   {run}\n")
    out(f"Checkpoints  {run}/fold-*/checkpoints\n")
    if thresholds:
        out(f"Thresholds   {run}/fold-*/thresholds.json\n")
    if config.monitor.tensorboard:
        out(f"TensorBoard  {run}/tensorboard   (tensorboard --logdir {run}/tensorboard)\n")
    if has_test_side:
        out(f"Numbers      {run}/metrics.json, table.md, table.csv\n")
    out(_next_steps(run, config))


def _write_comparison(run: Path, metrics: dict[str, Any]) -> None:
    """Print the full model beside itself without CT, without IT, and beside the no-LLM baseline, all of them pooled."""
    out = sys.stdout.write
    zeroed = zeroed_scores(run)
    rows = [("AULLM++" if zeroed else "led_cnn", metrics["mean"]["f1_macro"], "")]
    for token, (score, change) in zeroed.items():
        name = {"content": "content token (CT)", "instruction": "instruction token (IT)"}[token]
        rows.append((f"  with the {name} zeroed", score, f"answers move by {change:.3f} on average"))
    baseline = run / "baseline"
    if (baseline / "folds.json").exists():
        rows.append(("no-LLM baseline (led_cnn)", evaluate_run(baseline)["mean"]["f1_macro"], "same folds and epochs"))
    rows.append(("floor: never predicting an AU", metrics["floors"]["f1_macro"], ""))
    if len(rows) > 2:
        out("Mean f1_macro, in percent\n")
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
    answers = {}
    for token in ("content", "instruction"):
        paths = [zeroed_path(run, index, token) for index in finals]
        if not all(path.exists() for path in paths):
            continue
        without = pool(row for path in paths for row in read_predictions(path).rows if row.role == "test")
        if without.sample_ids == full.sample_ids:
            answers[token] = without
    return answers


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


def _next_steps(run: Path, config: Config) -> str:
    if config.data.train:
        return f"\nNext: aullm-dist evaluate {run}\n"
    steps = {
        "aullm-dist prepare casme2 --root /path/to/CASME2 --out data/casme2": "your licensed corpus",
        "accelerate launch --quiet aullm_dist/train.py --config casme2_loso model.llm=/path/to/llm": "LOSO on it",
        f"aullm-dist evaluate {run}": "the tables again",
    }
    width = max(map(len, steps)) + 2
    lines = "".join(f"  {command:<{width}}{meaning}\n" for command, meaning in steps.items())
    return (
        "\nThe corpus above is synthetic: it shows that the machinery works and says nothing about real faces. Next:\n"
        + lines
    )
