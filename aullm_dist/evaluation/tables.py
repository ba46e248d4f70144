"""Renders metrics as terminal text (at most 100 columns), Markdown, LaTeX, CSV or JSON.

Text, Markdown and LaTeX are in percent with one decimal; CSV and JSON keep fractions and say so.
"""

import csv
import io
import json
from collections.abc import Mapping
from typing import Any

from aullm_dist.errors import UserError
from aullm_dist.evaluation.blocks import Block, interval_text, percent, render_blocks
from aullm_dist.evaluation.caveats import caveat_notes, marked, marks_of
from aullm_dist.evaluation.more_tables import corpora_block, ladder_block, leaky_block, ranking_block
from aullm_dist.evaluation.scores import FloorScores, InnerScores, Metric, Metrics, MetricScores
from aullm_dist.facs import au_name

FORMATS: tuple[str, ...] = ("text", "markdown", "latex", "csv", "json")
# Named here and not taken from `metrics`, so that the command line can name the formats without numpy.
METRICS: tuple[Metric, ...] = ("f1_binary", "f1_macro", "auc")


def render(metrics: Metrics, fmt: str) -> str:
    """Render what `evaluate_run` returned, ending in a newline.

    Raises:
        UserError: If the format is unknown.
    """
    if fmt not in FORMATS:
        raise UserError(f"format {fmt!r} is unknown; allowed are {', '.join(FORMATS)}")
    if fmt == "json":
        return json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    if fmt == "csv":
        return _render_csv(metrics)
    return render_blocks(metric_blocks(metrics), fmt)


def metric_blocks(metrics: Metrics) -> list[Block]:
    """Return what `evaluate_run` returned as tables."""
    blocks = [_headline_block(metrics), ranking_block(metrics)]
    if metrics["ladder"]:
        blocks.insert(1, ladder_block(metrics["ladder"]))
    if metrics["inner_thresholds"]:
        blocks.append(_inner_block(metrics))
    if metrics["per_corpus"]:
        blocks.append(corpora_block(metrics))
    if metrics["leaky"]:
        blocks.append(leaky_block(metrics))
    return marked(blocks, metrics["caveats"])


def _describe(metrics: Metrics) -> str:
    folds = metrics["folds"]
    epochs = sorted(set(metrics["epochs"].values()))
    span = f"epoch {epochs[0]}" if len(epochs) == 1 else f"epochs {epochs[0]} to {epochs[-1]}"
    where = metrics["direction"] or ", ".join(metrics["corpora"])
    return (
        f"Protocol {metrics['protocol']} on {where}: {metrics['num_clips']} clips of "
        f"{metrics['num_subjects']} subjects, {folds['present']} of {folds['expected']} folds pooled, {span}; "
        "in percent."
    )


def _headline_block(metrics: Metrics) -> Block:
    ci, per_au = metrics["ci"], metrics["per_au"]
    rows = []
    for au in metrics["aus"]:
        row = per_au[f"AU{au}"]
        interval = interval_text(ci["per_au"][f"AU{au}"]["f1_macro"]) if ci else "-"
        rows.append((au_name(au), str(row["support"]), *_score_cells(row, row["floors"]), interval))
    support = str(sum(row["support"] for row in per_au.values()))
    rows.append((f"mean of {len(per_au)} AUs", support, *_score_cells(metrics["mean"], metrics["floors"]), ""))
    if ci:
        binary, macro, area = (interval_text(ci["mean"][metric]) for metric in METRICS)
        rows.append(("95% CI of the mean", "", binary, "", macro, "", area, ""))
    return Block(
        title=("Held-out subjects, threshold fixed at 0.5 on sigmoid(logit)", _describe(metrics)),
        header=("AU", "support", "f1_binary", "floor", "f1_macro", "floor", "auc", "f1_macro CI"),
        rows=tuple(rows),
        notes=tuple(_headline_notes(metrics)),
    )


def _score_cells(scores: MetricScores, floors: FloorScores) -> tuple[str, ...]:
    return (
        percent(scores["f1_binary"]),
        percent(floors["f1_binary"]),
        percent(scores["f1_macro"]),
        percent(floors["f1_macro"]),
        percent(scores["auc"]),
    )


def _headline_notes(metrics: Metrics) -> list[str]:
    random = metrics["floors"]["details"]["random"]["f1_macro"]
    notes = [
        "f1_binary: F1 of the positive class, floor = always predicting the AU. f1_macro: mean of the F1 of positives "
        f"and of negatives, floor = never predicting the AU; random scores reach {percent(random)}. auc: floor 50.0. "
        "0/0 in an F1 counts as 0.",
    ]
    empty = [key for key, row in metrics["per_au"].items() if row["support"] == 0]
    if empty:
        notes.append(f"Without a positive clip: {', '.join(empty)}. In the mean of both F1, not in the mean of auc.")
    full = [key for key, row in metrics["per_au"].items() if row["negatives"] == 0]
    if full:
        notes.append(f"Without a negative clip: {', '.join(full)}. In the mean of both F1, not in the mean of auc.")
    ci = metrics["ci"]
    if ci:
        notes.append(f"95% CI: {ci['resamples']} resamples of {ci['num_subjects']} subjects, seed {ci['seed']}.")
    if not metrics["inner_thresholds"]:
        notes.append("No inner held-out subjects were predicted, so no thresholds could be chosen without test labels.")
    return [*notes, *(f"Note: {note}." for note in metrics["notes"]), *caveat_notes(metrics["caveats"])]


def _inner_block(metrics: Metrics) -> Block:
    inner = metrics["inner_thresholds"]
    assert inner is not None, "a table of thresholds that were chosen"
    ci = inner["ci"]
    rows: list[tuple[str, ...]] = []
    for au in metrics["aus"]:
        row = inner["per_au"][f"AU{au}"]
        span = f"{row['threshold_low']:.2f}-{row['threshold_high']:.2f}"
        interval = interval_text(ci["per_au"][f"AU{au}"]["f1_macro"]) if ci else "-"
        rows.append((au_name(au), span, percent(row["f1_binary"]), percent(row["f1_macro"]), interval))
    both: tuple[Metric, ...] = ("f1_binary", "f1_macro")
    rows.append((f"mean of {len(inner['per_au'])} AUs", "", *(percent(inner["mean"][name]) for name in both), ""))
    if ci:
        rows.append(("95% CI of the mean", "", *(interval_text(ci["mean"][name]) for name in both), ""))
    notes = [
        "Floors and auc do not depend on thresholds: see the first table. An AU that the inner subjects show in one "
        "class only keeps 0.5."
    ]
    if inner["folds_without_inner"]:
        notes.append(f"Without inner subjects, hence at 0.5: {', '.join(inner['folds_without_inner'])}.")
    return Block(
        title=("Held-out subjects, thresholds chosen per fold and AU on inner held-out training subjects",),
        header=("AU", "thresholds", "f1_binary", "f1_macro", "f1_macro CI"),
        rows=tuple(rows),
        notes=tuple(notes),
    )


_CSV_HEADER = (
    "thresholds", "unit", "au", "name", "support", "negatives", "f1_binary", "f1_binary_floor", "f1_binary_low",
    "f1_binary_high", "f1_macro", "f1_macro_floor", "f1_macro_low", "f1_macro_high", "auc", "auc_floor", "auc_low",
    "auc_high", "auc_within_subject", "auc_within_subject_low", "auc_within_subject_high", "ap", "ap_floor", "ap_low",
    "ap_high", "brier", "brier_floor", "ece", "caveats",
)  # fmt: skip


def _render_csv(metrics: Metrics) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, _CSV_HEADER, restval="", lineterminator="\n")
    writer.writeheader()
    known = {"caveats": marks_of(metrics["caveats"])}
    policies: tuple[tuple[str, Metrics | InnerScores | None], ...]
    policies = (("fixed_0.5", metrics), ("inner", metrics["inner_thresholds"]))
    for policy, scores in policies:
        if not scores:
            continue
        ci_mean = scores["ci"]["mean"] if scores["ci"] else {}
        ci_per_au = scores["ci"]["per_au"] if scores["ci"] else {}
        for au in metrics["aus"]:
            key = f"AU{au}"
            shared = metrics["per_au"][key]
            counts = {"support": shared["support"], "negatives": shared["negatives"]}
            cells = _csv_scores(scores["per_au"][key], shared["floors"], ci_per_au.get(key, {}))
            if scores is metrics:
                cells |= _csv_ranking(metrics["ranking"]["per_au"][key], ci_per_au.get(key, {}))
            writer.writerow(
                {"thresholds": policy, "unit": "fraction", "au": au, "name": au_name(au), **counts, **cells, **known}
            )
        cells = _csv_scores(scores["mean"], metrics["floors"], ci_mean)
        if scores is metrics:
            cells |= _csv_ranking(metrics["ranking"]["mean"], ci_mean)
        writer.writerow(
            {"thresholds": policy, "unit": "fraction", "au": "mean", "name": "mean over AUs", **cells, **known}
        )
    return stream.getvalue()


def _csv_scores(scores: Mapping[str, Any], floors: Mapping[str, Any], ci: Mapping[str, Any]) -> dict[str, str]:
    cells = {}
    for metric in METRICS:
        low, high = ci.get(metric) or (None, None)
        values = {"": scores[metric], "_floor": floors[metric], "_low": low, "_high": high}
        cells.update({f"{metric}{end}": "" if value is None else f"{value:.6f}" for end, value in values.items()})
    return cells


def _csv_ranking(scores: Mapping[str, Any], ci: Mapping[str, Any]) -> dict[str, str]:
    values = {name: scores[name] for name in ("auc_within_subject", "ap", "ap_floor", "brier", "brier_floor", "ece")}
    for name in ("auc_within_subject", "ap"):
        values[f"{name}_low"], values[f"{name}_high"] = ci.get(name) or (None, None)
    return {name: "" if value is None else f"{value:.6f}" for name, value in values.items()}
