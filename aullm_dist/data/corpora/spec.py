"""Defines a corpus as data, and the result of reading one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from aullm_dist.data.corpora.drawn import SyntheticFacts
from aullm_dist.data.sheets import Row, Table, column_key

__all__ = [
    "Amend",
    "BadRows",
    "ClipRecord",
    "Columns",
    "CorpusIndex",
    "CorpusSpec",
    "Correction",
    "Erratum",
    "Note",
    "NoteKind",
    "Noter",
    "Provenance",
    "RawClip",
    "Reading",
    "clip_part",
]

BadRows = Literal["stop", "skip"]
NoteKind = Literal["repaired", "skipped", "unmatched", "noted"]
Names = tuple[str, ...]


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
    fps: float | None
    """None where no source says it."""
    aus: tuple[int, ...]
    """Active AU numbers, ascending."""
    emotion: str
    folder: Path | None
    """None where the release has no folder for the row."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something done or found while reading, to be reported to the user; `where` names the clip or the row."""

    kind: NoteKind
    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}".replace("\n", "\\n").replace("\r", "\\r")


CorrectionState = Literal["applied", "already there", "does not fit"]
"""What became of a correction."""


@dataclass(frozen=True, slots=True)
class Correction:
    """A published correction of one cell and what became of it; `clip` is the row's `subject/clip` as it was read."""

    clip: str
    row: int
    """As the spreadsheet shows it."""
    column: str
    found: int | str | None
    value: int | str
    state: CorrectionState


@dataclass(frozen=True, slots=True)
class Reading:
    """How one row's AU cell was read: `ours` is None where the row was left out, for the reason in `why`."""

    name: str
    row: int
    cell: object
    ours: frozenset[int] | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class CorpusIndex:
    """All usable rows of a corpus, in the order of the sheet, and what was noted on the way."""

    corpus: str
    frames_root: Path
    table: Table
    records: tuple[ClipRecord, ...]
    notes: tuple[Note, ...]
    corrections: tuple[Correction, ...] = ()
    readings: tuple[Reading, ...] = ()


@dataclass(frozen=True, slots=True)
class Columns:
    """Column names of a corpus's sheet; a tuple lists what different releases call one column, () is a column that the
    corpus does not have."""

    subject: str | Names
    clip: str | Names
    onset: str | Names
    apex: str | Names
    offset: str | Names
    aus: str | Names
    emotion: str | Names

    def required(self) -> tuple[Names, ...]:
        """Return the names of each column that a sheet must have, in the order of a release's sheet."""
        every = (getattr(self, f.name) for f in fields(self))
        return tuple((names,) if isinstance(names, str) else names for names in every if names)

    def in_table(self, table: Table) -> "SheetColumns":
        """Return the one name of each column that `table` uses."""
        present = {column_key(name) for name in table.columns}
        chosen = {}
        for f in fields(self):
            names = getattr(self, f.name)
            names = (names,) if isinstance(names, str) else names
            chosen[f.name] = next((name for name in names if column_key(name) in present), "")
        return SheetColumns(**chosen)


@dataclass(frozen=True, slots=True)
class SheetColumns:
    """The column names of one sheet; empty for a column that it does not have."""

    subject: str
    clip: str
    onset: str
    apex: str
    offset: str
    aus: str
    emotion: str


@dataclass(frozen=True, slots=True)
class Erratum:
    """A published correction of one row, counted from 0 at the first row below the header; None changes nothing."""

    row: int
    onset: int | None = None
    apex: int | None = None
    offset: int | None = None
    length: int | None = None
    """Frames from onset to offset, for corrections that were published so."""
    aus: str | None = None


@dataclass(slots=True)
class RawClip:
    """A row while it is being corrected; None stands for an empty or `/` frame number."""

    row: Row
    where: str
    """File and row for messages."""
    name: str
    """`subject/clip` as the sample id has it; fixed before anything is corrected."""
    subject: str
    clip: str
    onset: int | None
    apex: int | None
    offset: int | None
    aus: object
    emotion: str
    folder: Path | None
    problem: str | None = None


Noter = Callable[[NoteKind, RawClip, str], None]
Amend = Callable[[list[RawClip], Noter], None]


def clip_part(text: str) -> str | None:
    """Return a cell's text if it can be part of a folder's name, else None; line ends are none of a name's."""
    return None if text in {"", ".", ".."} or set(text) & set("/\\") or not text.isprintable() else text


@dataclass(frozen=True, slots=True)
class Provenance:
    """Who a corpus comes from, as the model card of a release says it: `<title>: of <makers>, <licence>.`"""

    makers: str = "its makers"
    licence: str = "who give it to research groups that sign for it; read what you signed"
    """A clause about the makers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSpec:
    """All that is known of a corpus: data, plus the few functions in which it differs from the others."""

    name: str
    """Used on the command line and in sample ids; a-z, 0-9 and _."""
    title: str
    """As its makers write it."""
    provenance: Provenance = Provenance()
    fps: float | None
    aus: tuple[int, ...]
    """AUs under test, ascending: the set that the field's harness publishes for the corpus, with the source."""
    columns: Columns
    frame_folders: Names
    """Names of the folders that hold the clip folders, best first, compared without case."""
    clip_folders: Names = ("{subject}/{clip}",)
    """Where a clip's frames lie below one of them, in `{subject}`, `{clip}`, `{onset}` and `{emotion}`; the form that
    fits most rows is used."""
    emotion_folders: Mapping[str, Names] = field(default_factory=dict)
    """Folder names of an emotion, where they differ from the sheet's word."""
    key: str = "{subject}/{clip}"
    """What tells two clips apart."""
    subject_of: Callable[[str, str], str | None]
    """Subject from the texts of the subject and the clip cell, or None where they name none of this corpus."""
    subject_form: str
    subject_in_clip: bool = False
    """Whether the subject stands in the clip's name; the subject cell is then not read."""
    clip_of: Callable[[str], str | None] = clip_part
    clip_like: str = ""
    """Regular expression that clip names begin with, to tell the corpus's sheet from another's with equal columns."""
    rows_with: tuple[str, str] | None = None
    """Column and value of the rows that count, in sheets that have the column."""
    errata: tuple[Erratum, ...] = ()
    errata_rows: int = 0
    """Rows of the sheet that the corrections were published for; with another number none is applied."""
    errata_extra_clip: tuple[int, str] | None = None
    """Row and name of a clip that another release of the sheet lacks; there, later rows sit one higher."""
    amend: Amend | None = None
    """Corrections that look at more than one cell; runs before AU cells are parsed."""
    drops_frames: bool = False
    """Frames are known to be missing inside clips of the release: no defect, but reported."""
    published_clips: int = 0
    published_aus: Mapping[int, int] = field(default_factory=dict)
    """Clips and positives per AU as the field's harness counts them (MEB, CD6ME set): a checksum of the ingestion."""
    harness_text: Callable[[str], str] = str
    """An AU cell's text as the harness's common rule takes it: AUs between plus signs; see `explain.harness_aus`."""
    synthetic: SyntheticFacts | None = None
    """How a synthetic corpus in this layout is drawn; None where none can be."""
