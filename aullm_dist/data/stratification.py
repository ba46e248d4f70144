"""Reports how positives spread over folds and sides, for readers; nothing that is trained ever sees it.

Folds are made without labels (`protocols`), so AUs may be missing from a side by chance; this says where.
"""

from collections.abc import Sequence
from typing import Any

from aullm_dist.data.protocols import FoldPlan, SampleInfo

__all__ = ["render_stratification", "stratification"]

SIDES = ("train", "inner", "test")


def stratification(plan: FoldPlan, samples: Sequence[SampleInfo]) -> dict[str, Any]:
    """Count clips, subjects and positives per AU on each side of each fold.

    Returns:
        `folds`: per fold its `name` and per side `clips`, `subjects` and `positives` per AU; `empty`: per AU the number
        of folds whose test clips, and of those whose training clips, hold no positive.
    """
    by_id = {sample.sample_id: sample for sample in samples}
    keys = [f"AU{au}" for au in plan.aus]
    folds: list[dict[str, Any]] = []
    for fold in plan.folds:
        entry: dict[str, Any] = {"name": fold.name}
        for side in SIDES:
            clips = [by_id[name] for name in getattr(fold, side)]
            entry[side] = {
                "clips": len(clips),
                "subjects": len({clip.subject for clip in clips}),
                "positives": {f"AU{au}": sum(au in clip.aus for clip in clips) for au in plan.aus},
            }
        folds.append(entry)
    empty = {
        side: {key: sum(fold[side]["clips"] > 0 and not fold[side]["positives"][key] for fold in folds) for key in keys}
        for side in ("test", "train")
    }
    return {"protocol": plan.protocol, "corpora": list(plan.corpora), "folds": folds, "empty": empty}


def render_stratification(report: dict[str, Any]) -> str:
    """Return the report as text: a line per fold with the positives of its test side, then what is missing where."""
    keys = list(report["empty"]["test"])
    width = max(len(fold["name"]) for fold in report["folds"])
    lines = [
        f"Protocol {report['protocol']} on {', '.join(report['corpora'])}: {len(report['folds'])} folds",
        "Clips per side, and positives among the test clips",
        f"{'fold':<{width}}  {'train':>6}{'inner':>6}{'test':>6}  " + "".join(f"{key:>6}" for key in keys),
    ]
    for fold in report["folds"]:
        counts = "".join(f"{fold[side]['clips']:>6}" for side in SIDES)
        lines.append(
            f"{fold['name']:<{width}}  {counts}  " + "".join(f"{fold['test']['positives'][key]:>6}" for key in keys)
        )
    for side, name in (("test", "test"), ("train", "training")):
        missing = {key: count for key, count in report["empty"][side].items() if count}
        if missing:
            text = ", ".join(f"{key} in {count}" for key, count in missing.items())
            lines.append(f"Folds without a positive {name} clip: {text}.")
    return "\n".join(lines) + "\n"
