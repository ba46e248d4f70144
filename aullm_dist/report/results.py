"""Shows the tables of a run, per AU and next to its baseline, and the differences between two runs as a figure."""

from pathlib import Path
from typing import Any

from aullm_dist.errors import UserError
from aullm_dist.evaluation.blocks import Block, interval_text, percent
from aullm_dist.evaluation.caveats import KNOWN_CAVEATS, caveat_notes, caveats, marked
from aullm_dist.evaluation.compare import compare_blocks, compare_runs, scores_of
from aullm_dist.evaluation.evaluate import read_run, score_run
from aullm_dist.evaluation.scores import Metric
from aullm_dist.evaluation.summary import zeroed_answers
from aullm_dist.evaluation.tables import metric_blocks
from aullm_dist.figures.differences import draw_differences
from aullm_dist.figures.style import new_figure
from aullm_dist.report.sections import Gallery, Picture, Section
from aullm_dist.runs.paths import RunPaths

SCORES: tuple[Metric, ...] = ("f1_binary", "f1_macro", "auc")


def tables(section: Section, run: Path, bootstrap: int, seed: int) -> None:
    """Add the tables of `aullm-dist evaluate`."""
    metrics = score_run(run, bootstrap=bootstrap, seed=seed)
    section.missing += metrics["notes"]
    section.tables += metric_blocks(metrics)


def methods(section: Section, run: Path, label: str) -> None:
    """Add one table per score with methods as rows and AUs as columns, the shape of published tables."""
    plan, _, rows = read_run(run)
    metrics = score_run(run, bootstrap=0)
    scored = {label: scores_of(rows, plan.aus)}
    names = {"content": "content token (CT) zeroed", "instruction": "instruction token (IT) zeroed"}
    try:
        for token, without in zeroed_answers(run).items():
            scored[f"{label}, {names[token]}"] = scores_of(without, plan.aus)
    except UserError as error:
        section.missing.append(f"soft tokens zeroed: {error}")
    for name, folder in RunPaths(run).baselines().items():
        try:
            other, _, answers = read_run(folder)
        except UserError as error:
            section.missing.append(f"baseline {name}: {error}")
        else:
            scored[f"no LLM ({name})"] = scores_of(answers, other.aus)
    keys = [f"AU{au}" for au in plan.aus]
    for score in SCORES:
        body = [
            (name, *(percent(parts[key][score]) if key in parts else "-" for key in (*keys, "mean")))
            for name, parts in scored.items()
        ]
        floors = [metrics["per_au"][key]["floors"][score] for key in keys]
        body.append(("floor", *map(percent, floors), percent(metrics["floors"][score])))
        title = (f"{score} per AU{'' if score == 'auc' else ', threshold 0.5'}, in percent",)
        block = Block(title, ("method", *keys, "mean"), tuple(body), notes=())
        section.tables += marked([block], metrics["caveats"])


def differences(
    section: Section, gallery: Gallery, pair: tuple[Path, Path], names: tuple[str, str], bootstrap: int, seed: int
) -> None:
    """Add the second run minus the first per AU, as a figure for f1_macro and auc and as tables."""
    result = compare_runs(*pair, bootstrap=bootstrap, seed=seed)
    result = {**result, "first": names[0], "second": names[1]}
    section.pictures += [_difference_picture(gallery, result, score) for score in ("f1_macro", "auc")]
    section.tables += compare_blocks(result)
    section.missing += [text for text in result["caveats"] if text not in KNOWN_CAVEATS]


def _difference_picture(gallery: Gallery, result: dict[str, Any], score: str) -> Picture:
    parts = [(f"AU{au}", result["per_au"][f"AU{au}"][score]) for au in result["aus"]]
    parts.append(("mean", result["mean"][score]))
    rows = [
        (
            name,
            None if part["difference"] is None else 100 * part["difference"],
            None if part["ci"] is None else [100 * end for end in part["ci"]],
        )
        for name, part in parts
    ]
    figure, axes = new_figure(4.6, 0.9 + 0.26 * len(rows))
    draw_differences(axes[0, 0], rows, xlabel=f"difference of {score} (percentage points)")
    said = "; ".join(f"{name} {'-' if value is None else f'{value:+.1f}'}" for name, value, _ in rows)
    first, second = result["first"], result["second"]
    return gallery.add(
        figure, f"difference-{score}", f"{second} minus {first}, {score}, with paired 95% intervals over "
        f"{result['num_subjects']} subjects. A filled point's interval leaves 0 out. It holds both models fixed.",
        f"{second} minus {first} in points of {score}: {said}",
    )  # fmt: skip


def overview(section: Section, runs: list[tuple[str, Path]], bootstrap: int, seed: int) -> None:
    """Add one row per run: what it was tested on and its mean scores."""
    body = []
    for name, run in runs:
        try:
            metrics = score_run(run, bootstrap=bootstrap, seed=seed)
        except UserError as error:
            section.missing.append(str(error))
            continue
        where = metrics["direction"] or f"{metrics['protocol']} {', '.join(metrics['corpora'])}"
        cells = [name, where, str(metrics["num_clips"])]
        for score in SCORES:
            pair = metrics["ci"]["mean"][score] if metrics["ci"] else None
            cells += [percent(metrics["mean"][score]), interval_text(pair)]
        body.append(tuple(cells))
    if body:
        header = ("run", "tested on", "clips", *(text for score in SCORES for text in (score, "95% CI")))
        note = (
            "Means over the AUs of each run. Runs of other AUs, or tested on other clips, cannot be compared by them."
        )
        known = caveats([run for _, run in runs])
        block = Block(("Mean scores of each run, in percent",), header, tuple(body), (note, *caveat_notes(known)))
        section.tables += marked([block], known)
