"""4DME: the registered gray micro clips at 60 fps, with AUs both as text and as one-hot columns.

The text is the label; `(k)` in it marks an AU that does not move and is no positive. The one-hot columns only check
the text. Two rows of the release are known to carry each other's labels; they are exchanged only where the sheet
itself shows it.
"""

import re

from aullm_dist.data.annotations import Annotation, parse_aus
from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum, Noter, RawClip, clip_part
from aullm_dist.data.workbook import cell_text
from aullm_dist.errors import UserError

__all__ = ["SPEC"]

_AU_COLUMN = re.compile(r"au\s*(\d{1,2})")
_EMOTION_COLUMNS = ("positive", "negative", "surprise", "repression", "others")
_SWAPPED_ROWS = (144, 145)
_SHEET_ROWS = 267


def _subject_of(subject: str, _clip: str) -> str | None:
    return clip_part(subject)


def _amend(clips: list[RawClip], note: Noter) -> None:
    marked = {clip.row.index: _marked_aus(clip) for clip in clips}
    _exchange_swapped(clips, marked, note)
    for clip in clips:
        written, columns = _annotation(clip), marked[clip.row.index]
        if written is None or columns is None:
            continue
        # Releases may mark a static AU in its column or not: both agree with the text.
        static = frozenset(unit.number for unit in written.units) - written.active
        if columns - static != written.active:
            text = f"AU columns mark {_names(columns)}, the text {cell_text(clip.aus)!r} says {_names(written.active)}"
            note("noted", clip, f"{text}: the text was kept")


def _exchange_swapped(clips: list[RawClip], marked: dict[int, frozenset[int] | None], note: Noter) -> None:
    """Exchange the labels of the two rows known to be swapped, where the sheet contradicts itself crosswise.

    Either the emotion text (left of the AU columns) fits only the other row's emotion columns (right of them), so
    that all columns from the AUs on are swapped, or the AU text fits only the other row's one-hot columns.
    """
    pair = [clip for clip in clips if clip.row.index in _SWAPPED_ROWS]
    if len(pair) != len(_SWAPPED_ROWS):
        return
    if len(clips) != _SHEET_ROWS:
        for clip in pair:
            note("unmatched", clip, f"published exchange of AUs not applied: made for a sheet of {_SHEET_ROWS} rows")
        return
    first, second = pair
    emotions = [set(clip.emotion.split("+")) & set(_EMOTION_COLUMNS) for clip in pair]
    all_columns = _crossed(emotions, [_emotions(clip) for clip in pair])
    texts = [written and written.active for written in map(_annotation, pair)]
    if not all_columns and not _crossed(texts, [marked[clip.row.index] for clip in pair]):
        for clip in pair:
            note("unmatched", clip, "published exchange of AUs not applied: the row does not contradict itself")
        return
    first.aus, second.aus = second.aus, first.aus
    if all_columns:
        marked[first.row.index], marked[second.row.index] = marked[second.row.index], marked[first.row.index]
    for clip, other in ((first, second), (second, first)):
        note("repaired", clip, f"AUs exchanged with row {other.row.number} (published correction): now {clip.aus!r}")


def _crossed(texts: list[object], columns: list[object]) -> bool:
    """Whether each text differs from its own row's columns and equals those of the other row."""
    return None not in (*texts, *columns) and texts[0] != texts[1] and texts == columns[::-1]


def _annotation(clip: RawClip) -> Annotation | None:
    try:
        return parse_aus(clip.aus)
    except UserError:
        return None


def _marked_aus(clip: RawClip) -> frozenset[int] | None:
    """AUs marked in the one-hot columns, or None where the sheet has none."""
    matches = {key: _AU_COLUMN.fullmatch(key) for key in clip.row.cells}
    if not any(matches.values()):
        return None
    return frozenset(int(match[1]) for key, match in matches.items() if match and _is_marked(clip.row.cells[key]))


def _emotions(clip: RawClip) -> set[str] | None:
    if not any(column in clip.row.cells for column in _EMOTION_COLUMNS):
        return None
    return {column for column in _EMOTION_COLUMNS if _is_marked(clip.row.cells.get(column))}


def _is_marked(cell: object) -> bool:
    return cell_text(cell) not in {"", "0"}


def _names(aus: frozenset[int]) -> str:
    return ", ".join(f"AU{number}" for number in sorted(aus)) or "none"


SPEC = CorpusSpec(
    name="4dme",
    title="4DME",
    fps=60.0,
    columns=Columns(
        subject="sub_ID",
        clip="fold_name",
        onset="Onset",
        apex="Apex",
        offset="Offset",
        aus="AUs",
        emotion="Emotion",
    ),
    frame_folders=("gray_micro", "gray_micro_crop"),
    subject_of=_subject_of,
    subject_form="the name of a subject's folder",
    # Both are of an earlier version of the sheet; where its defects are gone they find nothing.
    errata=(Erratum(26, apex=2490), Erratum(245, length=24)),
    errata_rows=_SHEET_ROWS,
    amend=_amend,
    published_clips=267,
    published_aus={1: 46, 2: 54, 4: 102, 5: 8, 6: 25, 7: 89, 9: 1, 10: 2, 12: 53, 14: 4, 15: 6, 17: 11},
)
