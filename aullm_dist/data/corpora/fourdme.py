"""Describes 4DME: registered gray micro clips at 60 fps, with AUs both as text and as one-hot columns.

The text is the label; `(k)` in it marks an AU that does not move and is no positive. The one-hot columns only check
the text. Two rows of the release are known to carry each other's labels; they are exchanged only where the sheet
itself shows it.
"""

import re
from collections.abc import Sequence

from aullm_dist.data.annotations import Annotation, parse_aus
from aullm_dist.data.corpora.drawn import (
    SIDE_LETTERS,
    AuCombination,
    Cell,
    ClipPlan,
    Layout,
    Look,
    Placed,
    SyntheticFacts,
)
from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum, Noter, Provenance, RawClip, clip_part
from aullm_dist.data.sheets import cell_text
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


def _crossed(texts: Sequence[object], columns: Sequence[object]) -> bool:
    """Whether each text differs from its own row's columns and equals those of the other row."""
    return None not in (*texts, *columns) and texts[0] != texts[1] and list(texts) == list(columns)[::-1]


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


def _moving(text: str) -> str:
    """An AU marked `(k)` counts as absent."""
    return "+".join(piece for piece in text.split("+") if "(k)" not in piece)


_FOURD_AUS = (1, 2, 4, 5, 6, 7, 9, 10, 12, 13, 14, 15, 16, 17, 18, 20, 23, 24, 25, 26, 28, 45)
_FOURD_EMOTIONS = {
    "happiness": "Positive",
    "surprise": "Surprise",
    "repression": "Repression",
    "others": "Others",
}
_FOURD_CATEGORIES = ("Positive", "Negative", "Surprise", "Repression", "Others")
# Counts aimed at: CD6ME positives per AU (MEB, table 4 notebook).
_COMBINATIONS: dict[AuCombination, float] = {
    (4,): 30, (4, 7): 48, (7,): 20, (1, 2): 26, (2,): 12, (1,): 7, (1, 2, 4): 5, (2, 7): 3, (1, 2, 5): 5,
    (4, 12): 3, (12,): 18, (6, 12): 14, (6, 7, 12): 6, (7, 12): 6, (12, 45): 4, (45,): 12, (4, 45): 8,
    (1, 2, 45): 3, (2, 45): 2, (7, 45): 6, (17,): 5, (4, 17): 3, (15, 17): 3, (6,): 5, (14,): 4, (10,): 2,
    (15,): 3, (4, 5): 3,
}  # fmt: skip


def _layout(clips: Sequence[ClipPlan], _context_frames: int) -> Layout:
    placed = []
    for plan in clips:
        subject = f"S{plan.subject + 1:02d}"
        name = f"{subject}_1st_{plan.ordinal + 1:03d}_01_1"
        emotions = _fourd_emotions(plan)
        active = set(plan.active_aus)
        row: list[Cell] = [subject, name, float(plan.onset), float(plan.apex), float(plan.offset)]
        row += ["+".join(emotions), _fourd_aus(plan)]
        row += [int(au in active) for au in _FOURD_AUS]
        row += [plan.subject + 1, int(45 in active), *(int(c in emotions) for c in _FOURD_CATEGORIES), len(active)]
        placed.append(Placed(plan, f"gray_micro/{subject}/{name}", "{:04d}.png", row))
    header: list[Cell] = ["sub_ID", "fold_name", "Onset", "Apex", "Offset", "Emotion", "AUs"]
    header += [f"AU{au}" for au in _FOURD_AUS]
    header += ["fold", "eye blink", *_FOURD_CATEGORIES, "Total"]
    return Layout("4DME_Labelling_Micro_release v1.xlsx", "Sheet1", [], header, placed)


def _fourd_aus(plan: ClipPlan) -> str:
    """Spell the AUs with the prefix on the first token only, the side letter after it and `(k)` for static ones."""
    tokens = [f"{SIDE_LETTERS[m.side]}{m.au}{'(k)' if m.static else ''}" for m in plan.movements]
    return "AU" + "+".join(tokens)


def _fourd_emotions(plan: ClipPlan) -> list[str]:
    """Translate to the corpus's categories; a few clips bear two, as in `Negative+Repression`."""
    first = _FOURD_EMOTIONS.get(plan.emotion, "Negative")
    second = {"Negative": "Repression", "Surprise": "Positive"}.get(first)
    return [first, second] if second and plan.ordinal % 3 == 1 else [first]


SPEC = CorpusSpec(
    name="4dme",
    title="4DME",
    provenance=Provenance("University of Oulu, Center for Machine Vision and Signal Analysis"),
    fps=60.0,
    aus=(1, 2, 4, 6, 7, 12, 17, 45),  # MEB, utils.dataset_aus
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
    harness_text=_moving,
    synthetic=SyntheticFacts(
        stream=2,
        frame_size=(96, 128),
        clip_lengths=(16, 27),  # 21.4 frames on average
        combinations=_COMBINATIONS,
        layout=_layout,
        look=Look(gamma=1.3, blur_pixels=0.7, noise_factor=0.8),
        colour=False,
        first_numbers=(20, 120),
        static_aus=True,
    ),
)
