"""Renders an ablation as tables: the differences with their intervals, and how they vary over seeds and test sides."""

from collections.abc import Mapping
from typing import Any

from aullm_dist.evaluation.blocks import Block, percent
from aullm_dist.evaluation.caveats import caveat_notes, marked
from aullm_dist.evaluation.compare import signed, span


def ablation_blocks(result: Mapping[str, Any]) -> list[Block]:
    """Return what `ablation` returned as tables: differences, their spread and the ladder of each family."""
    blocks = []
    for family, part in result["families"].items():
        blocks += [_differences(family, part, result), _spread(family, part)]
        if part["ladder"]:
            blocks.append(_ladder(family, part))
    if result["notes"] or result["caveats"]:
        first = blocks[0]
        more = (*map(_sentence, result["notes"]), *caveat_notes(result["caveats"]))
        blocks[0] = Block(first.title, first.header, first.rows, (*first.notes, *more))
    return marked(blocks, result["caveats"])


def _differences(family: str, part: Mapping[str, Any], result: Mapping[str, Any]) -> Block:
    rows = []
    for name, arm in part["arms"].items():
        cells = [name, str(arm["runs"])]
        for score in ("f1_macro", "auc"):
            own = arm[score]
            cells += [percent(own["score"]), signed(own.get("difference")), span(own.get("ci"))]
        rows.append(tuple(cells))
    sides, seeds = part["sides"], part["seeds"]
    over = f"mean over {_counted(len(sides), 'test side')} and {_counted(len(seeds), 'seed')}"
    compared = len(rows) - 1
    notes = (
        "change: arm minus full model of the same test side and seed, in points, threshold 0.5. 95% CI: paired, "
        f"{result['resamples']} resamples of the test subjects, seed {result['seed']}; it holds the trained models "
        f"fixed. Of {_counted(2 * compared, 'interval')} about {0.05 * 2 * compared:.1f} would leave out 0 by chance "
        "alone.",
    )
    return Block(
        (f"Ablation, {family}: {over}, in percent",),
        ("arm", "runs", "f1_macro", "change", "95% CI", "auc", "change", "95% CI"),
        tuple(rows),
        notes,
    )


def _spread(family: str, part: Mapping[str, Any]) -> Block:
    sides = part["sides"] if len(part["sides"]) > 1 else []
    columns = [("by_seed", str(seed), f"seed {seed}") for seed in part["seeds"]]
    columns += [("by_side", side, side) for side in sides]
    rows = []
    for name, arm in part["arms"].items():
        if "by_seed" in arm["f1_macro"]:
            rows.append((name, *(signed(arm["f1_macro"][key].get(label)) for key, label, _ in columns)))
    return Block(
        (f"Change of f1_macro in each seed{' and test side' if sides else ''}, {family}, in points",),
        ("arm", *(head for _, _, head in columns)),
        tuple(rows),
        ("Signs that differ from column to column mean that another seed may turn the table around.",),
    )


def _ladder(family: str, part: Mapping[str, Any]) -> Block:
    stages = list(dict.fromkeys(stage for arm in part["ladder"].values() for stage in arm))
    rows = tuple(
        (
            name,
            *(percent(arm[stage][score]) if stage in arm else "-" for score in ("f1_macro", "auc") for stage in stages),
        )
        for name, arm in part["ladder"].items()
    )
    heads = [stage if stage == stages[0] else f"+ {stage}" for stage in stages]
    return Block(
        (f"Ladder of the arms that answer in stages, {family}: f1_macro, then auc, in percent",),
        ("arm", *heads, *heads),
        rows,
        ("Means over the same runs as above; each stage adds to the ones before it.",),
    )


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _sentence(note: str) -> str:
    return f"Note: {note}."
