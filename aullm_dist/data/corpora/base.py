"""Reads a release on disk into an index of clips, and reports every repair and every skip.

A corpus describes itself as data (`spec.CorpusSpec`). Finding and listing folders is in `layout.py`, published
corrections are in `errata.py`; no image is opened here.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aullm_dist.data.annotations import Annotation, has_alternatives, parse_aus
from aullm_dist.data.corpora.choice import choose_table
from aullm_dist.data.corpora.errata import apply_frozen, apply_published, read_frozen
from aullm_dist.data.corpora.layout import FolderTree, find_frames_root, require_folder
from aullm_dist.data.corpora.spec import (
    BadRows,
    ClipRecord,
    CorpusIndex,
    CorpusSpec,
    Note,
    NoteKind,
    Noter,
    RawClip,
    Reading,
    SheetColumns,
)
from aullm_dist.data.sheets import Defect, Merged, Row, Table, cell_text, column_key, column_letter
from aullm_dist.errors import UserError

__all__ = ["read_with"]

_EMOTIONS = {"comtempt": "contempt", "other": "others", "other(s)": "others"}
_LISTED = 3
_MAY_BE_MERGED = ("subject", "emotion")
"""A label or a frame number that is shown once for several rows may be meant for one of them alone."""


def read_with(
    spec: CorpusSpec, root: str | Path, *, bad_rows: BadRows = "stop", errata: str | Path | None = None
) -> CorpusIndex:
    """Read the annotation sheet below `root`, correct it and find each clip's folder.

    Args:
        spec: The corpus.
        root: The release's folder, the folder above it, or the folder of clips itself.
        bad_rows: What to do with a row that cannot be used (unreadable frame number, onset after offset, AU cell
            outside the grammar, clip named twice): raise, or skip and note it.
        errata: Frozen corrections to use in place of the published row numbers; see `errata.freeze`.

    Raises:
        UserError: No such folder, no workbook of this corpus, no frames, or a bad row under "stop".
    """
    root = require_folder(root, spec.title)
    frozen = None if errata is None else read_frozen(Path(errata), spec.name)
    notes: list[Note] = []
    table = choose_table(spec, root, notes)
    columns = spec.columns.in_table(table)
    rows = _rows_that_count(spec, table, notes)
    clips = [_raw_clip(spec, columns, table, row) for row in rows]
    _refuse_slipped_emotions(columns, clips)

    def note(kind: NoteKind, clip: RawClip, text: str) -> None:
        notes.append(Note(kind, f"{spec.name}/{clip.name} (row {clip.row.number})", text))

    tree, template = _find_folders(spec, root, clips, notes)
    if frozen is None:
        corrections = apply_published(spec, clips, note, notes)
    else:
        corrections = apply_frozen(frozen, clips, note, notes, spec.name)
    if spec.amend:
        spec.amend(clips, note)
    finished = _Finished(spec, columns, note)
    for clip in clips:
        finished.add(clip, bad_rows)
    known = {clip.folder for clip in clips}
    for folder in tree.like(template):
        if folder not in known:
            name = folder.relative_to(tree.root).as_posix()
            notes.append(Note("skipped", f"{spec.name}/{name}", f"clip folder without a row in {table.file.name}"))
    _note_columns(spec, columns, table, notes)
    return CorpusIndex(
        spec.name, tree.root, table, tuple(finished.records), tuple(notes), tuple(corrections), tuple(finished.readings)
    )


def _rows_that_count(spec: CorpusSpec, table: Table, notes: list[Note]) -> list[Row]:
    if spec.rows_with is None or column_key(spec.rows_with[0]) not in map(column_key, table.columns):
        return list(table.rows)
    column, value = spec.rows_with
    kept = [row for row in table.rows if cell_text(row[column]).casefold() == value]
    if len(kept) < len(table.rows):
        text = f"{len(table.rows) - len(kept)} rows left out, as column {column} is not {value!r} there"
        notes.append(Note("noted", str(table.file), text))
    return kept


def _raw_clip(spec: CorpusSpec, columns: SheetColumns, table: Table, row: Row) -> RawClip:
    where = f"{table.file} row {row.number}"
    problems = _cell_problems(columns, table, row)
    subject_text, clip_text = cell_text(row[columns.subject]), cell_text(row[columns.clip])
    subject, clip = spec.subject_of(subject_text, clip_text), spec.clip_of(clip_text)
    if clip is None:
        problems.append(f"column {columns.clip}: {clip_text!r:.60}; allowed: the name of a clip folder")
    if subject is None:
        column, text = (columns.clip, clip_text) if spec.subject_in_clip else (columns.subject, subject_text)
        problems.append(f"column {column}: {text!r:.60}; allowed: {spec.subject_form}")
    frames: list[int | None] = []
    for column in (columns.onset, columns.apex, columns.offset):
        number, problem = _frame_number(row[column])
        frames.append(number)
        if problem:
            problems.append(f"column {column}: {problem}")
    subject, clip = subject or "?", clip or "?"
    name = spec.key.format(subject=subject, clip=clip, onset="?" if frames[0] is None else frames[0])
    emotion = _emotion(row[columns.emotion])
    problem = problems[0] if problems else None
    onset, apex, offset = frames
    return RawClip(
        row, where, name, subject, clip, onset, apex, offset, row[columns.aus], emotion, folder=None, problem=problem
    )


def _cell_problems(columns: SheetColumns, table: Table, row: Row) -> list[str]:
    """Say which cells of a row bear content that cannot be used; no part of a row is read without the rest."""
    problems = [row.problem] if row.problem else []
    for role in SheetColumns.__slots__:
        column = getattr(columns, role)
        if not column:
            continue
        cell = row[column]
        if column_key(column) not in row.cells:
            problems.append(f"column {column}: the row ends before it; was the file copied in full?")
        elif (
            isinstance(cell, Merged) and (cell.value is None or role not in _MAY_BE_MERGED) or isinstance(cell, Defect)
        ):
            problems.append(f"column {column}: {cell.reason}")
    place = table.positions[column_key(columns.aus)] + 1
    while place in row.unnamed:
        if re.search("[0-9]", row.unnamed[place]):
            letter = column_letter(place)
            text = f"column {letter}, which has no name, holds {row.unnamed[place]!r:.60}"
            problems.append(f"column {columns.aus}: {text}, next to the AUs; allowed: all AUs in one cell")
        place += 1
    return problems


def _refuse_slipped_emotions(columns: SheetColumns, clips: Sequence[RawClip]) -> None:
    """Refuse rows whose emotion is a number, in a sheet of words: an AU cell has spread into it."""
    numbers = [clip for clip in clips if re.match("[A-Za-z]{0,3}[0-9]", clip.emotion)]
    if 2 * len(numbers) >= sum(bool(clip.emotion) for clip in clips):
        return
    for clip in numbers:
        text = f"column {columns.emotion}: {clip.emotion!r:.60}; allowed: a word, as in the other rows"
        clip.problem = clip.problem or f"{text}: has an AU cell spread over two?"


def _frame_number(cell: object) -> tuple[int | None, str | None]:
    text = cell_text(cell)
    if text in {"", "/", "-"}:
        return None, None
    # A frame number of more digits than any video has is a date or a sum that slipped into the column.
    if text.isascii() and text.isdigit() and len(text) <= 9:
        return int(text), None
    return None, f"{text!r:.60}; allowed: a frame number from 0 up"


def _emotion(cell: object) -> str:
    """Normalise an emotion; the parts of a multi-label text (`Surprise+Positive`) are sorted."""
    parts = (part.strip().casefold() for part in cell_text(cell).split("+"))
    return "+".join(sorted(_EMOTIONS.get(part, part) for part in parts if part))


def _find_folders(spec: CorpusSpec, root: Path, clips: Sequence[RawClip], notes: list[Note]) -> tuple[FolderTree, str]:
    """Set each clip's folder; return the tree and the form of `spec.clip_folders` that fits most rows."""
    usable = [clip for clip in clips if clip.problem is None]
    paths = {template: [_relative_folders(spec, template, clip) for clip in usable] for template in spec.clip_folders}
    first = {path.split("/")[0] for several in paths.values() for names in several for path in names}

    def tell(where: str, text: str) -> None:
        notes.append(Note("noted", where, text))

    tree = FolderTree(find_frames_root(root, spec.frame_folders, first, spec.title, notes_to=tell))
    found = {
        template: [next(filter(None, map(tree.find, names)), None) for names in several]
        for template, several in paths.items()
    }
    template = max(found, key=lambda name: sum(folder is not None for folder in found[name]))
    other_case = []
    for clip, folder, names in zip(usable, found[template], paths[template], strict=True):
        clip.folder = folder
        if folder is not None and folder.relative_to(tree.root).as_posix() not in names:
            other_case.append(clip.name)
    if other_case:
        text = f"{len(other_case)} clip folders found by another case of their names: {_some(other_case)}"
        notes.append(Note("noted", spec.name, text))
    return tree, template


def _relative_folders(spec: CorpusSpec, template: str, clip: RawClip) -> list[str]:
    if "{emotion}" not in template:
        return [template.format(subject=clip.subject, clip=clip.clip, onset=clip.onset)]
    emotions = spec.emotion_folders.get(clip.emotion, (clip.emotion,))
    return [template.format(subject=clip.subject, clip=clip.clip, emotion=emotion) for emotion in emotions if emotion]


def _some(names: Sequence[str]) -> str:
    more = ", ..." if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def _note_columns(spec: CorpusSpec, columns: SheetColumns, table: Table, notes: list[Note]) -> None:
    used = {column_key(getattr(columns, name)) for name in SheetColumns.__slots__} - {""}
    extra = [" ".join(name.split()) for name in table.columns if column_key(name) not in used]
    if extra:
        notes.append(Note("noted", str(table.file), f"columns not read: {', '.join(extra)}"))
    notes += [Note("noted", str(table.file), text) for text in table.notes]


@dataclass(slots=True)
class _Finished:
    """Turns corrected rows into records, and remembers which clips there are already."""

    spec: CorpusSpec
    columns: SheetColumns
    note: Noter
    records: list[ClipRecord] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    _seen: dict[str, tuple[object, ...]] = field(default_factory=dict)

    def add(self, clip: RawClip, bad_rows: BadRows) -> None:
        """Add a row's record, or leave it out and say why.

        Raises:
            UserError: The row cannot be used, under "stop".
        """
        content = (clip.onset, clip.apex, clip.offset, cell_text(clip.aus), clip.emotion)
        if self._seen.get(clip.name.casefold()) == content:
            self._leave_out(clip, "the row repeats an earlier one word for word")
            return
        record = self._record(clip)
        if isinstance(record, ClipRecord):
            self._seen[clip.name.casefold()] = content
            self.records.append(record)
            self.readings.append(Reading(clip.name, clip.row.number, clip.aus, frozenset(record.aus)))
        elif bad_rows == "stop":
            raise UserError(f"{record}; correct the sheet, or use --bad-clips repair|skip to leave the row out")
        else:
            self._leave_out(clip, record)

    def _leave_out(self, clip: RawClip, why: str) -> None:
        self.note("skipped", clip, why)
        self.readings.append(Reading(clip.name, clip.row.number, clip.aus, None, why))

    def _record(self, clip: RawClip) -> ClipRecord | str:
        """Return the record of a corrected row, or one line that says why there is none."""
        columns, spec = self.columns, self.spec
        if clip.problem:
            return f"{clip.where}, {clip.problem}"
        for name, value in ((columns.onset, clip.onset), (columns.offset, clip.offset)):
            if value is None:
                return f"{clip.where} ({clip.name}), column {name}: empty; allowed: a frame number from 0 up"
        assert clip.onset is not None
        assert clip.offset is not None
        if clip.onset > clip.offset:
            return (
                f"{clip.where} ({clip.name}): {columns.onset} {clip.onset} > {columns.offset} {clip.offset}; "
                "allowed: onset <= offset"
            )
        try:
            annotation = parse_aus(clip.aus)
        except UserError as error:
            return f"{clip.where} ({clip.name}), column {columns.aus}: {error}"
        if clip.name.casefold() in self._seen:
            return f"{clip.where} ({clip.name}): this clip has a row already; allowed: one row per clip"
        self._tell_of_cell(clip, annotation)
        return ClipRecord(
            sample_id=f"{spec.name}/{clip.name}",
            corpus=spec.name,
            subject=f"{spec.name}/{clip.subject}",
            onset=clip.onset,
            apex=self._apex(clip),
            offset=clip.offset,
            fps=spec.fps,
            aus=tuple(sorted(annotation.active)),
            emotion=clip.emotion,
            folder=clip.folder,
        )

    def _apex(self, clip: RawClip) -> int:
        onset, offset = clip.onset, clip.offset
        assert onset is not None, "a clip without it is left out before"
        assert offset is not None, "likewise"
        if clip.apex is not None and onset <= clip.apex <= offset:
            return clip.apex
        middle = (onset + offset) // 2
        if self.columns.apex:
            found = "missing" if clip.apex is None else f"{clip.apex}, outside {onset}..{offset}"
            self.note("repaired", clip, f"apex {found}: set to the middle frame {middle}")
        return middle

    def _tell_of_cell(self, clip: RawClip, annotation: Annotation) -> None:
        if has_alternatives(clip.aus):
            kept = ", ".join(f"AU{number}" for number in sorted(annotation.active))
            self.note("repaired", clip, f"AU cell {clip.aus!r} offers alternatives: the first was taken ({kept})")
        if annotation.dropped:
            letters = ", ".join(annotation.dropped)
            self.note("noted", clip, f"AU cell {cell_text(clip.aus)!r:.60}: {letters} without an AU: not read")
        static = [f"AU{unit.number}" for unit in annotation.units if unit.static]
        if static:
            self.note("noted", clip, f"{', '.join(static)} marked (k), held and not moving: no positive")
        text = clip.aus if isinstance(clip.aus, str) else ""
        if unicodedata.normalize("NFKC", text) != text or "\u3001" in text:
            self.note("noted", clip, f"AU cell {text!r:.60} has full-width signs: read as the ASCII ones")
