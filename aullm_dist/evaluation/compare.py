"""Compares runs: two of them clip by clip, or several seeds of one.

Two runs are compared on the same clips and the same resamples of the subjects, so that what both find hard cancels out
of the difference. Shapes: n clips, A action units, R resamples.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aullm_dist.errors import UserError
from aullm_dist.evaluation.blocks import Block, percent
from aullm_dist.evaluation.bootstrap import interval, mean_defined, resample
from aullm_dist.evaluation.caveats import caveat_notes, caveats, marked
from aullm_dist.evaluation.evaluate import evaluate_run, read_run
from aullm_dist.evaluation.metrics import HEADLINE_THRESHOLD, logit_of, mean_of, summarise
from aullm_dist.evaluation.ranking import ranking
from aullm_dist.evaluation.scores import Metric, MetricScores
from aullm_dist.facs import au_name
from aullm_dist.runs.predictions import Pooled

__all__ = [
    "check_same_clips",
    "compare_blocks",
    "compare_runs",
    "scores_of",
    "seed_blocks",
    "seed_summary",
    "signed",
    "span",
]

SCORES = ("f1_binary", "f1_macro", "auc", "ap")


def compare_runs(first: Path | str, second: Path | str, *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Score two runs on the same clips and return second minus first, with paired intervals.

    Args:
        first: Run folder, the one to compare with.
        second: Run folder.
        bootstrap: Resamples of subjects, the same for both runs; 0 leaves the intervals out.
        seed: Seed of the resampling.

    Returns:
        `per_au` and `mean`, each with `first`, `second`, `difference` and `ci` of every score in `SCORES`; fractions.

    Raises:
        UserError: A run cannot be read, or the two have other AUs, test clips or labels.
    """
    if bootstrap < 0 or seed < 0:
        raise UserError(f"bootstrap {bootstrap}, seed {seed}: both must be at least 0")
    (plan, _, one), (other_plan, _, two) = (read_run(Path(run)) for run in (first, second))
    if plan.aus != other_plan.aus:
        raise UserError(f"{second}: AUs {list(other_plan.aus)}; {first} has {list(plan.aus)}; the two must be equal")
    check_same_clips(first, one, second, two)
    scores = [scores_of(rows, plan.aus) for rows in (one, two)]
    samples = [
        resample(
            rows.labels, rows.logits, rows.logits > logit_of(HEADLINE_THRESHOLD), rows.subjects,
            resamples=bootstrap, seed=seed,
        )
        for rows in (one, two)
    ]  # fmt: skip
    result: dict[str, Any] = {
        "unit": "fraction",
        "first": str(first),
        "second": str(second),
        "aus": list(plan.aus),
        "num_clips": len(one.sample_ids),
        "num_subjects": len(set(one.subjects)),
        "resamples": bootstrap if samples[0] else 0,
        "seed": seed,
        "caveats": caveats([first, second]),
    }
    differences = None
    if samples[0] is not None and samples[1] is not None:
        differences = {name: samples[1][name] - samples[0][name] for name in SCORES}

    def entry(key: str, name: str, column: int | None) -> dict[str, Any]:
        a, b = (part[key][name] for part in scores)
        spread = None
        if differences is not None:
            values = differences[name]
            spread = interval(mean_defined(values) if column is None else values[:, column])
        if a is None or b is None:
            return {"first": a, "second": b, "difference": None, "ci": None}
        return {"first": a, "second": b, "difference": b - a, "ci": spread}

    keys = [f"AU{au}" for au in plan.aus]
    result["per_au"] = {key: {name: entry(key, name, c) for name in SCORES} for c, key in enumerate(keys)}
    result["mean"] = {name: entry("mean", name, None) for name in SCORES}
    return result


def scores_of(rows: Pooled, aus: Sequence[int]) -> dict[str, dict[str, float | None]]:
    """Return every score of `SCORES` per AU, and in the mean under `mean`; fractions, None where undefined."""
    summary = summarise((rows.labels, rows.logits), aus)
    ranks = ranking(rows.labels, rows.logits, rows.subjects, aus)
    merged = {key: {**part, "ap": ranks["per_au"][key]["ap"]} for key, part in summary["per_au"].items()}
    return {**merged, "mean": {**summary["mean"], "ap": ranks["mean"]["ap"]}}


def check_same_clips(first: Path | str, one: Pooled, second: Path | str, two: Pooled) -> None:
    """Refuse two runs that cannot be compared clip by clip.

    Raises:
        UserError: they test other clips, or a clip has other labels.
    """
    if one.sample_ids != two.sample_ids:
        only = sorted(set(one.sample_ids) ^ set(two.sample_ids))[0]
        has, lacks = (first, second) if only in one.sample_ids else (second, first)
        raise UserError(f"{lacks}: does not test clip {only}, {has} does; compare runs that test the same clips")
    different = np.flatnonzero((one.labels != two.labels).any(1))
    if different.size:
        raise UserError(f"{second}: clip {one.sample_ids[different[0]]} has other labels than in {first}")


def compare_blocks(result: dict[str, Any]) -> list[Block]:
    """Return the comparison as tables: difference and paired interval per AU and of the mean."""
    means = [f"{name} {percent(part['first'])} and {percent(part['second'])}" for name, part in result["mean"].items()]
    title = (
        f"{result['second']} minus {result['first']}, in points",
        f"{result['num_clips']} clips of {result['num_subjects']} subjects. Means: {', '.join(means)}.",
    )
    note = (
        f"Paired: both runs are scored on the same {result['resamples']} resamples of the subjects, seed "
        f"{result['seed']}. Threshold 0.5. An interval that holds 0 shows no difference. It holds both trained "
        "models fixed: train several seeds before calling one better."
    )
    blocks = [
        Block(title, *_difference_rows(result, SCORES[:2]), notes=()),
        Block(
            ("The same without a threshold",),
            *_difference_rows(result, SCORES[2:]),
            notes=(note, *caveat_notes(result["caveats"])),
        ),
    ]
    return marked(blocks, result["caveats"])


def _difference_rows(
    result: dict[str, Any], names: Sequence[str]
) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    def cells(part: dict[str, Any]) -> tuple[str, ...]:
        return tuple(text for name in names for text in (signed(part[name]["difference"]), span(part[name]["ci"])))

    rows = [(au_name(au), *cells(result["per_au"][f"AU{au}"])) for au in result["aus"]]
    rows.append((f"mean of {len(rows)} AUs", *cells(result["mean"])))
    return ("AU", *(text for name in names for text in (name, "95% CI"))), tuple(rows)


def signed(value: float | None) -> str:
    """Return a difference of fractions in points with its sign, `-` for None."""
    return "-" if value is None else f"{100 * value:+.1f}"


def span(pair: Sequence[float] | None) -> str:
    """Return low and high of a difference in points, `-` for None."""
    return "-" if pair is None else f"{100 * pair[0]:+.1f}..{100 * pair[1]:+.1f}"


def seed_summary(runs: Sequence[Path | str]) -> dict[str, Any]:
    """Evaluate several runs that differ in their seed and return mean and standard deviation of each score.

    Raises:
        UserError: What `evaluate_run` raises, or the runs differ in AUs or test clips.
    """
    metrics = []
    clips: Pooled | None = None
    for run in runs:
        metrics.append(evaluate_run(run, bootstrap=0))
        rows = read_run(Path(run))[2]
        if metrics[-1]["aus"] != metrics[0]["aus"]:
            raise UserError(f"{run}: AUs {metrics[-1]['aus']}; {runs[0]} has {metrics[0]['aus']}")
        if clips is not None:
            check_same_clips(runs[0], clips, run, rows)
        clips = clips or rows
    names: tuple[Metric, ...] = ("f1_binary", "f1_macro", "auc")
    parts: dict[str, list[MetricScores]] = {
        key: [*(item["per_au"][key] for item in metrics)] for key in metrics[0]["per_au"]
    }
    parts["mean"] = [item["mean"] for item in metrics]

    def spread(values: list[float | None]) -> dict[str, float | None]:
        known = [value for value in values if value is not None]
        deviation = float(np.std(known, ddof=1)) if len(known) > 1 else None
        return {"mean": mean_of(values), "sd": deviation}

    scores = {key: {name: spread([row[name] for row in rows]) for name in names} for key, rows in parts.items()}
    return {
        "unit": "fraction",
        "runs": [str(run) for run in runs],
        "aus": metrics[0]["aus"],
        "num_clips": metrics[0]["num_clips"],
        "caveats": caveats(runs),
        "mean": scores.pop("mean"),
        "per_au": scores,
    }


def seed_blocks(result: dict[str, Any]) -> list[Block]:
    """Return mean and standard deviation over runs as a table."""

    def cells(part: dict[str, Any]) -> tuple[str, ...]:
        return tuple(percent(part[name][key]) for name in ("f1_binary", "f1_macro", "auc") for key in ("mean", "sd"))

    rows = [(au_name(au), *cells(result["per_au"][f"AU{au}"])) for au in result["aus"]]
    rows.append((f"mean of {len(rows)} AUs", *cells(result["mean"])))
    blocks = [
        Block(
            title=(f"Mean and standard deviation over {len(result['runs'])} runs, {result['num_clips']} clips each",),
            header=("AU", "f1_binary", "sd", "f1_macro", "sd", "auc", "sd"),
            rows=tuple(rows),
            notes=(
                "Each run is pooled and scored on its own first, threshold 0.5; sd with n - 1.",
                *caveat_notes(result["caveats"]),
            ),
        )
    ]
    return marked(blocks, result["caveats"])
