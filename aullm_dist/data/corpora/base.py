"""What all corpora share: from a release on disk to an index of clips, with every repair and every skip told.

A corpus describes itself as data (`CorpusSpec`): column names, folder names, frame rate, published corrections.
Corrections are indexed by row and hold only for the release they were written for, so each is applied only where the
row shows the very defect that it corrects, and is reported as unmatched otherwise.

Finding and listing folders is in `layout.py`; no image is opened here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from aullm_dist.data.annotations import has_alternatives, parse_aus
from aullm_dist.data.corpora.layout import ClipFolders, find_frames_root, list_frames, require_folder, search_folders
from aullm_dist.data.workbook import Row, Table, cell_text, find_workbooks, read_table
from aullm_dist.errors import UserError

__all__ = ["BadRows", "ClipRecord", "Columns", "CorpusIndex", "CorpusSpec", "Erratum", "Note", "RawClip", "read_with"]

BadRows = Literal["stop", "skip"]
NoteKind = Literal["repaired", "skipped", "unmatched", "noted"]

_EMOTIONS = {"comtempt": "contempt", "other": "others", "other(s)": "others"}


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """One annotated clip; onset, apex and offset are file frame numbers, both ends inclusive."""

    sample_id: str
    corpus: str
    subject: str
    """Corpus-qualified, e.g. "casme2/sub01"."""
    onset: int
    apex: int
    offset: int
    fps: float
    aus: tuple[int, ...]
    """Active AU numbers, ascending."""
    emotion: str
    folder: Path | None
    """None where the release has no folder for the row."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something done or found while reading, to be told to the user; `where` names the clip or the row."""

    kind: NoteKind
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


@dataclass(frozen=True, slots=True)
class CorpusIndex:
    """All usable rows of a corpus, in the order of the sheet, and what was noted on the way."""

    corpus: str
    frames_root: Path
    table: Table
    records: tuple[ClipRecord, ...]
    notes: tuple[Note, ...]


@dataclass(frozen=True, slots=True)
class Columns:
    """Column names of a corpus' sheet, as its release writes them."""

    subject: str
    clip: str
    onset: str
    apex: str
    offset: str
    aus: str
    emotion: str

    def names(self) -> tuple[str, ...]:
        """Return all names, in the order of a release's sheet."""
        return (self.subject, self.clip, self.onset, self.apex, self.offset, self.aus, self.emotion)


@dataclass(frozen=True, slots=True)
class Erratum:
    """A published correction of one cell; `row` counts from 0 at the first row below the header."""

    row: int
    column: Literal["apex", "offset", "aus"]
    value: int | str


@dataclass(slots=True)
class RawClip:
    """A row while it is being corrected; None stands for an empty or `/` frame number."""

    row: Row
    where: str
    """File and row for messages."""
    subject: str
    clip: str
    onset: int | None
    apex: int | None
    offset: int | None
    aus: object
    emotion: str
    folder: Path | None
    problem: str | None = None

    @property
    def name(self) -> str:
        return f"{self.subject}/{self.clip}"


Amend = Callable[[list[RawClip], Callable[[NoteKind, RawClip, str], None]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSpec:
    """A corpus as data, plus the few functions in which it differs from the others."""

    name: str
    title: str
    fps: float
    columns: Columns
    frame_folders: tuple[str, ...]
    """Names of the folders that hold the subjects, best first, compared without case."""
    subject_folder: Callable[[object], str | None]
    """Folder name of a subject cell, or None where the cell names no subject of this corpus."""
    subject_form: str
    errata: tuple[Erratum, ...] = ()
    errata_extra_clip: tuple[int, str] | None = None
    """Row and name of a clip that only the corrections' own release has; without it, later rows sit one higher."""
    amend: Amend | None = None
    """Corrections that look at more than one cell; runs before AU cells are parsed."""
    published_clips: int = 0
    published_aus: Mapping[int, int] = field(default_factory=dict)
    """Clips and positives per AU as the field's harness counts them (MEB, CD6ME set): a checksum of the ingestion."""


def read_with(spec: CorpusSpec, root: str | Path, *, bad_rows: BadRows = "stop") -> CorpusIndex:
    """Read the annotation sheet below `root`, correct it and find each clip's folder.

    Args:
        spec: The corpus.
        root: The release's folder, the folder above it, or the folder of subjects itself.
        bad_rows: What to do with a row that cannot be used (unreadable frame number, onset after offset, AU cell
            outside the grammar, clip named twice): raise, or skip and note it.

    Raises:
        UserError: No such folder, no workbook of this corpus, no frames, or a bad row under "stop".
    """
    root = require_folder(root, spec.title)
    notes: list[Note] = []
    table = _find_table(spec, root, notes)
    subjects = {spec.subject_folder(row[spec.columns.subject]) for row in table.rows} - {None}
    frames_root = find_frames_root(root, spec.frame_folders, subjects, spec.title, notes_to=_noter(notes))
    folders = ClipFolders(frames_root)
    clips = [_raw_clip(spec, table, row, folders) for row in table.rows]

    def note(kind: NoteKind, clip: RawClip, text: str) -> None:
        notes.append(Note(kind, f"{spec.name}/{clip.name} (row {clip.row.number})", text))

    _apply_errata(spec, clips, note, notes)
    if spec.amend:
        spec.amend(clips, note)
    records = []
    seen: set[str] = set()
    for clip in clips:
        record = _finish(spec, clip, seen, note)
        if isinstance(record, ClipRecord):
            records.append(record)
        elif bad_rows == "stop":
            raise UserError(f"{record}; correct the sheet, or use --bad-clips repair|skip to leave the row out")
        else:
            note("skipped", clip, record)
    for name in folders.without(clip.name for clip in clips):
        notes.append(Note("skipped", f"{spec.name}/{name}", f"clip folder without a row in {table.file.name}"))
    return CorpusIndex(spec.name, frames_root, table, tuple(records), tuple(notes))


def _noter(notes: list[Note]) -> Callable[[str, str], None]:
    return lambda where, text: notes.append(Note("noted", where, text))


def _find_table(spec: CorpusSpec, root: Path, notes: list[Note]) -> Table:
    """Read the workbook of this corpus; of several releases side by side the last by name wins, and that is noted."""
    files = find_workbooks(search_folders(root, spec.frame_folders))
    tables, first_error = [], None
    for file in files:
        try:
            tables.append(read_table(file, spec.columns.names(), corpus=spec.title))
        except UserError as error:
            first_error = first_error or error
    if not tables:
        assert first_error is not None
        raise first_error
    chosen = max(tables, key=lambda table: table.file.name.casefold())
    for table in tables:
        if table is not chosen:
            notes.append(Note("noted", str(table.file), f"not used: {chosen.file.name} is the later release by name"))
    return chosen


def _raw_clip(spec: CorpusSpec, table: Table, row: Row, folders: ClipFolders) -> RawClip:
    columns = spec.columns
    where = f"{table.file} row {row.number}"
    problems = []
    subject = spec.subject_folder(row[columns.subject])
    name = cell_text(row[columns.clip])
    if subject is None:
        problems.append(f"column {columns.subject}: {cell_text(row[columns.subject])!r}; allowed: {spec.subject_form}")
    if not name or "/" in name or "\\" in name or name in {".", ".."}:
        problems.append(f"column {columns.clip}: {name!r}; allowed: the name of a clip folder")
    frames = []
    for column in (columns.onset, columns.apex, columns.offset):
        number, problem = _frame_number(row[column])
        frames.append(number)
        if problem:
            problems.append(f"column {column}: {problem}")
    clip = RawClip(
        row, where, subject or "?", name or "?", *frames, row[columns.aus], _emotion(row[columns.emotion]), folder=None
    )
    clip.problem = problems[0] if problems else None
    clip.folder = folders.get(clip.subject, clip.clip)
    return clip


def _frame_number(cell: object) -> tuple[int | None, str | None]:
    text = cell_text(cell)
    if text in {"", "/", "-"}:
        return None, None
    if text.isascii() and text.isdigit():
        return int(text), None
    return None, f"{text!r}; allowed: a frame number from 0 up"


def _emotion(cell: object) -> str:
    """Normalise an emotion; the parts of a multi-label text (`Surprise+Positive`) are sorted."""
    parts = (part.strip().casefold() for part in cell_text(cell).split("+"))
    return "+".join(sorted(_EMOTIONS.get(part, part) for part in parts if part))


def _finish(
    spec: CorpusSpec, clip: RawClip, seen: set[str], note: Callable[[NoteKind, RawClip, str], None]
) -> ClipRecord | str:
    """Return the record of a corrected row, or one line that says why there is none."""
    columns = spec.columns
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
    sample_id = f"{spec.name}/{clip.name}"
    if sample_id.casefold() in seen:
        return f"{clip.where} ({clip.name}): this clip has a row already; allowed: one row per clip"
    seen.add(sample_id.casefold())
    if has_alternatives(clip.aus):
        kept = ", ".join(f"AU{number}" for number in sorted(annotation.active))
        note("repaired", clip, f"AU cell {clip.aus!r} offers alternatives: the first was taken ({kept})")
    if clip.apex is None or not clip.onset <= clip.apex <= clip.offset:
        middle = (clip.onset + clip.offset) // 2
        found = "missing" if clip.apex is None else f"{clip.apex}, outside {clip.onset}..{clip.offset}"
        note("repaired", clip, f"apex {found}: set to the middle frame {middle}")
        clip.apex = middle
    return ClipRecord(
        sample_id=sample_id,
        corpus=spec.name,
        subject=f"{spec.name}/{clip.subject}",
        onset=clip.onset,
        apex=clip.apex,
        offset=clip.offset,
        fps=spec.fps,
        aus=tuple(sorted(annotation.active)),
        emotion=clip.emotion,
        folder=clip.folder,
    )


def _apply_errata(
    spec: CorpusSpec, clips: list[RawClip], note: Callable[[NoteKind, RawClip, str], None], notes: list[Note]
) -> None:
    """Apply each correction to the row that shows its defect.

    Offsets come first, since an apex is judged by its interval.
    """
    by_index = {clip.row.index: clip for clip in clips}
    length = max(by_index, default=-1) + 1
    beyond = 0
    for erratum in sorted(spec.errata, key=lambda erratum: erratum.column != "offset"):
        clip = by_index.get(_errata_row(spec, erratum.row, clips, length))
        if clip is None:
            beyond += 1
            continue
        old = getattr(clip, erratum.column)
        if _shows_defect(spec, clip, erratum):
            setattr(clip, erratum.column, erratum.value)
            shown = "missing" if old is None else repr(old) if erratum.column == "aus" else old
            note("repaired", clip, f"{erratum.column} {shown}: set to {erratum.value} (published correction)")
        elif old == erratum.value:
            note("noted", clip, f"{erratum.column} {old}: the published correction is in the sheet already")
        else:
            shown = "missing" if old is None else repr(old)
            text = f"published correction {erratum.column} -> {erratum.value} does not fit the row's {shown}"
            note("unmatched", clip, f"{text}: not applied")
    if beyond:
        text = f"{beyond} published corrections are for rows beyond this sheet's {len(clips)}: not applied"
        notes.append(Note("unmatched", spec.name, text))


def _errata_row(spec: CorpusSpec, row: int, clips: list[RawClip], length: int) -> int:
    if spec.errata_extra_clip is None:
        return row
    extra_row, extra_name = spec.errata_extra_clip
    lacks_extra = length > extra_row and all(clip.name.casefold() != extra_name.casefold() for clip in clips)
    return row - 1 if lacks_extra and row > extra_row else row


def _shows_defect(spec: CorpusSpec, clip: RawClip, erratum: Erratum) -> bool:
    """Whether the row has the defect that the correction is for, and the corrected value would make sense in it."""
    value = erratum.value
    if erratum.column == "aus":
        if not has_alternatives(clip.aus):
            return False
        try:
            return parse_aus(value).active <= parse_aus(clip.aus, alternatives="all").active
        except UserError:
            return False
    if clip.onset is None:
        return False
    if erratum.column == "apex":
        if clip.offset is None or not clip.onset <= value <= clip.offset:
            return False
        return clip.apex is None or not clip.onset <= clip.apex <= clip.offset
    # The published apex stands in only where the row has none of its own; a sound row is never measured against it.
    published = [other.value for other in spec.errata if (other.row, other.column) == (erratum.row, "apex")]
    needed = max([clip.onset, *(published if clip.apex is None else [clip.apex])])
    if value < needed:
        return False
    # The row bears the published apex, so it is the row that the offset was published for.
    if clip.apex in published and clip.offset is not None and clip.offset > value:
        return True
    if clip.offset is None or clip.offset < needed:
        return True
    # An offset that the sheet alone does not give away: its frame is not on disk, the corrected one is.
    frames = list_frames(clip.folder) if clip.folder else {}
    return clip.offset not in frames and value in frames
