"""Builds the tables below the headline: ranking and calibration, scores per corpus, the gain from test labels."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from aullm_dist.evaluation.blocks import Block, interval_text, percent
from aullm_dist.evaluation.scores import Metrics
from aullm_dist.facs import au_name

_BOTH: tuple[Literal["f1_binary", "f1_macro"], ...] = ("f1_binary", "f1_macro")


def ranking_block(metrics: Metrics) -> Block:
    """Return the table of AUC, AUC within subjects, average precision and calibration."""
    scores, ci = metrics["ranking"], metrics["ci"]
    rows = []
    for au in metrics["aus"]:
        row = scores["per_au"][f"AU{au}"]
        rows.append((au_name(au), *_ranking_cells(row, str(row["subjects_with_both"]))))
    rows.append((f"mean of {len(scores['per_au'])} AUs", *_ranking_cells(scores["mean"], "")))
    if ci:
        area, within, precision = (interval_text(ci["mean"][name]) for name in ("auc", "auc_within_subject", "ap"))
        rows.append(("95% CI of the mean", area, within, "", precision, "", "", "", ""))
    return Block(
        title=("Ranking and calibration, without thresholds",),
        header=("AU", "auc", "within", "n", "ap", "floor", "brier", "floor", "ece"),
        rows=tuple(rows),
        notes=(
            "auc and ap are pooled over the folds. Each fold's model has its own offset, so comparing clips of "
            "different folds adds noise: both are biased low. within: AUC over pairs of clips of one subject, answered "
            "by one model, free of that offset; n: subjects with clips of both classes, who alone count in it.",
            "Floors: ap, the share of positives; brier, always answering that share. ece: mean gap between probability "
            "and share of positives, 10 bins; lower is better for brier and ece.",
        ),
    )


def _ranking_cells(row: Mapping[str, Any], subjects: str) -> tuple[str, ...]:
    first = (percent(row["auc"]), percent(row["auc_within_subject"]), subjects)
    return (*first, *(percent(row[name]) for name in ("ap", "ap_floor", "brier", "brier_floor", "ece")))


def corpora_block(metrics: Metrics) -> Block:
    """Return the scores of each tested corpus, where there are several."""
    parts = metrics["per_corpus"]
    assert parts is not None, "a table of several corpora"
    rows = []
    for name, part in parts.items():
        mean = part["mean"]
        scores = (percent(mean["f1_binary"]), percent(mean["f1_macro"]), percent(mean["auc"]))
        rows.append((name, str(part["num_clips"]), " ".join(map(str, part["aus"])), *scores))
    return Block(
        title=("Each corpus on its own, threshold fixed at 0.5, mean over the AUs of its own set",),
        header=("corpus", "clips", "AUs", "f1_binary", "f1_macro", "auc"),
        rows=tuple(rows),
        notes=("The AU sets are those of the corpora (docs/corpora.md) as far as they are under test.",),
    )


def leaky_block(metrics: Metrics) -> Block:
    """Return what choices made on the test labels would have added to the headline scores."""
    honest, leaky = metrics["mean"], metrics["leaky"]
    assert leaky is not None, "a table of leaky choices that were scored"
    rows: list[tuple[str, ...]] = [
        ("reported: last epoch, threshold 0.5", percent(honest["f1_binary"]), "", percent(honest["f1_macro"]), "")
    ]
    for variant in leaky["variants"]:
        cells = []
        for name in _BOTH:
            cells += [percent(variant["mean"][name]), f"{100 * (variant['mean'][name] - honest[name]):+.1f}"]
        rows.append((f"LEAKY: {variant['name']}", *cells))
    return Block(
        title=("Not results: what choices made on the test labels would have added to them",),
        header=("choice", "f1_binary", "gain", "f1_macro", "gain"),
        rows=tuple(rows),
        notes=(
            "Other papers report numbers of these kinds; compare like with like. Epochs are those whose answers were "
            f"kept: {', '.join(map(str, leaky['epochs']))}. Thresholds: the grid 0.10 to 0.85 in steps of "
            "0.05, per AU, by f1_macro.",
        ),
    )


_METRICS = ("f1_binary", "f1_macro", "auc")
_STAGES = {"evidence": "evidence", "structure": "+ structure", "deduction": "+ deduction (the answer)"}


def ladder_block(ladder: Sequence[Mapping[str, Any]]) -> Block:
    """Return the ladder as a table."""
    rows = []
    for entry in ladder:
        cells = [_STAGES[entry["stage"]], *(percent(entry["mean"][name]) for name in _METRICS)]
        for name in ("f1_macro", "auc"):
            cells += ["", ""] if entry["step"] is None else _step_cells(entry["step"][name])
        rows.append(tuple(cells))
    return Block(
        title=("Ladder: the answer stage by stage, means over the AUs in percent, steps in points",),
        header=("stage", *_METRICS, "f1_macro step", "95% CI", "auc step", "95% CI"),
        rows=tuple(rows),
        notes=(
            "Each stage adds its logits to those before it. Steps are paired: both answers are scored on the same "
            "resamples of the subjects. An interval that holds 0 shows no gain.",
        ),
    )


def _step_cells(step: Mapping[str, Any]) -> list[str]:
    if step["difference"] is None:
        return ["-", "-"]
    pair = step["ci"]
    return [
        f"{100 * step['difference']:+.1f}",
        "-" if pair is None else f"{100 * pair[0]:+.1f}..{100 * pair[1]:+.1f}",
    ]
