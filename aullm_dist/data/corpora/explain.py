"""Explains, clip by clip, why the clips per AU differ from the published counts.

Every row is read twice: by this project's grammar, as the dataset has it, and by the published rule of the field's
harness (MEB), which the published counts were made with. Clips on which the two disagree, or which were left out,
account for a difference; what remains lies in the sheet itself, which is then not the version that was counted.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aullm_dist.data.corpora.spec import CorpusIndex, CorpusSpec, Note
from aullm_dist.data.sheets import cell_text

__all__ = ["AuDifference", "ClipChange", "as_json", "explain", "harness_aus", "render_differences"]

_LISTED = 40


@dataclass(frozen=True, slots=True)
class ClipChange:
    """A clip that counts here and not in the harness (+1) or the other way round (-1)."""

    clip: str
    row: int
    change: int
    why: str


@dataclass(frozen=True, slots=True)
class AuDifference:
    """Clips with one AU: here, by the harness's rule on this very sheet, and as published."""

    au: int
    here: int
    by_harness: int
    published: int
    changes: tuple[ClipChange, ...]


def harness_aus(cell: object, spec: CorpusSpec) -> frozenset[int]:
    """Return the AUs that MEB's published rule reads in a cell: of each piece between plus signs the digits alone.

    Where the harness treats a corpus otherwise, `CorpusSpec.harness_text` says how.

    Source: MEB's loaders, as published; the rule alone, no code of theirs.
    """
    pieces = spec.harness_text(cell_text(cell)).split("+")
    digits = ("".join(re.findall(r"[0-9]", piece)) for piece in pieces)
    return frozenset(int(number) for number in digits if number)


def explain(spec: CorpusSpec, index: CorpusIndex, kept: Iterable[str], notes: Iterable[Note]) -> list[AuDifference]:
    """Compare the clips per AU with the published counts.

    Args:
        spec: The corpus.
        index: What was read of it.
        kept: Sample ids of the clips in the dataset.
        notes: Everything that was noted; those of kind "skipped" say why a clip is not among `kept`.

    Returns:
        One entry per published AU on which any two of the three counts differ.
    """
    present = set(kept)
    reasons = {note.where: note.text for note in notes if note.kind == "skipped"}
    rows = []
    for reading in index.readings:
        sample_id = f"{spec.name}/{reading.name}"
        ours, why = reading.ours, reading.why
        if ours is not None and sample_id not in present:
            ours, why = None, reasons.get(sample_id, "not in the dataset")
        rows.append((reading, ours or frozenset(), harness_aus(reading.cell, spec), why))
    differences = []
    for au, published in sorted(spec.published_aus.items()):
        changes = []
        for reading, ours, harness, why in rows:
            change = (au in ours) - (au in harness)
            if change:
                text = f"left out: {why}" if why else f"cell {cell_text(reading.cell)!r:.60} is read otherwise"
                changes.append(ClipChange(f"{spec.name}/{reading.name}", reading.row, change, text))
        here, by_harness = sum(au in row[1] for row in rows), sum(au in row[2] for row in rows)
        if not here == by_harness == published:
            differences.append(AuDifference(au, here, by_harness, published, tuple(changes)))
    return differences


def render_differences(spec: CorpusSpec, differences: Iterable[AuDifference], num_clips: int) -> str:
    """Return the comparison as text, each difference followed by the clips that make it."""
    if not spec.published_aus:
        return f"{spec.title}: no counts are published to compare with"
    lines = [f"{spec.title}: {num_clips} clips here, {spec.published_clips} published"]
    found = list(differences)
    if not found:
        lines.append("clips per AU: as published for every AU")
    for item in found:
        lines.append(f"AU{item.au}: {item.here} here, {item.published} published ({item.here - item.published:+d})")
        for change in item.changes[:_LISTED]:
            lines.append(f"  {change.change:+d}  {change.clip} (row {change.row}): {change.why}")
        if len(item.changes) > _LISTED:
            lines.append(f"  ... and {len(item.changes) - _LISTED} more clips")
        rest = item.by_harness - item.published
        if rest:
            text = "the sheet itself: by the harness's own rule it has"
            lines.append(f"  {rest:+d}  {text} {item.by_harness} clips; another version of it was counted")
    return "\n".join(lines)


def as_json(differences: Iterable[AuDifference]) -> dict[str, Mapping[str, object]]:
    """Return the differences for `report.json`."""
    return {
        f"AU{item.au}": {
            "here": item.here,
            "published": item.published,
            "clips": [
                {"clip": change.clip, "row": change.row, "change": change.change, "why": change.why}
                for change in item.changes
            ],
            "in_the_sheet_itself": item.by_harness - item.published,
        }
        for item in differences
    }
