"""Describes CASME II: 26 subjects at 200 fps, colour, frames `img46.jpg` numbered absolutely, without padding.

Releases of the sheet differ (255 and 256 rows). Corrections: offset of one row, and the apexes that the sheet leaves
as `/`, both as published by the field's harness (MEB, for its 256-row sheet); any other missing apex becomes the
middle frame.
"""

import re
from collections.abc import Sequence

from aullm_dist.data.corpora.drawn import (
    AuCombination,
    Cell,
    ClipPlan,
    Layout,
    Look,
    Placed,
    SyntheticFacts,
    plus_joined,
)
from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum, Provenance

__all__ = ["SPEC"]

_APEXES = {
    29: 279, 35: 68, 43: 77, 45: 81, 51: 166, 53: 100, 117: 187, 118: 89, 126: 80, 136: 88, 147: 134, 155: 231,
    168: 53, 170: 329, 177: 111, 202: 91, 203: 103, 234: 98, 237: 153, 238: 98,
}  # fmt: skip


def _subject_of(subject: str, _clip: str) -> str | None:
    match = re.fullmatch(r"(?:sub)?0*([0-9]{1,3})", subject, re.IGNORECASE)
    return f"sub{int(match[1]):02d}" if match else None


# Counts aimed at: CD6ME positives per AU (MEB, table 4 notebook).
_COMBINATIONS: dict[AuCombination, float] = {
    (4,): 60, (4, 7): 33, (4, 9): 8, (4, 10): 6, (4, 15): 4, (4, 17): 4, (4, 14): 3, (4, 12): 4, (1, 4): 4,
    (1, 2): 14, (1,): 6, (2,): 5, (2, 15): 1, (1, 2, 5): 2, (7,): 3, (6, 7, 12): 3, (12,): 11, (6, 12): 8,
    (12, 15): 4, (12, 14): 4, (14,): 13, (14, 15): 2, (14, 17): 5, (15,): 2, (15, 17): 3, (17,): 10, (10,): 6,
    (10, 17): 3, (9,): 5, (6,): 2, (24,): 6, (25,): 4, (20,): 4,
}  # fmt: skip


def _layout(clips: Sequence[ClipPlan], context_frames: int) -> Layout:
    # CASME2-RAW is the release with frames around the movement, CASME2_RAW_selected the one without.
    tree = "CASME2-RAW" if context_frames else "CASME2_RAW_selected"
    placed = []
    for plan in clips:
        name = f"EP{plan.ordinal // 4 + 1:02d}_{plan.ordinal % 4 + 1:02d}" + ("f" if plan.index % 3 else "")
        joined = plus_joined(plan)
        # Excel turns a lone number into a number.
        aus: Cell = int(joined) if joined.isdigit() else joined
        apex: Cell = "/" if plan.apex_missing else plan.apex
        # The column has no contempt and no anger; both are "others" there.
        emotion = {"contempt": "others", "anger": "others"}.get(plan.emotion, plan.emotion)
        row: list[Cell] = [plan.subject + 1, name, None, plan.onset, apex, plan.offset, None, aus, emotion]
        placed.append(Placed(plan, f"{tree}/sub{plan.subject + 1:02d}/{name}", "img{}.jpg", row))
    header: list[Cell] = ["Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None]
    header += ["Action Units", "Estimated Emotion"]
    return Layout("CASME2-coding-20190701.xlsx", "Sheet1", [], header, placed)


SPEC = CorpusSpec(
    name="casme2",
    title="CASME II",
    provenance=Provenance("Institute of Psychology, Chinese Academy of Sciences"),
    fps=200.0,
    aus=(1, 2, 4, 7, 12, 14, 15, 17),  # MEB, utils.dataset_aus
    columns=Columns(
        subject="Subject",
        clip="Filename",
        onset="OnsetFrame",
        apex="ApexFrame",
        offset="OffsetFrame",
        aus="Action Units",
        emotion="Estimated Emotion",
    ),
    frame_folders=("CASME2_RAW_selected", "CASME2-RAW", "CASME2_RAW", "Cropped"),
    subject_of=_subject_of,
    subject_form="a subject's number such as 1",
    clip_like="(?i)EP[0-9]",
    errata=(
        Erratum(60, apex=78, offset=91),
        *(Erratum(row, apex=frame) for row, frame in _APEXES.items()),
    ),
    errata_rows=256,
    errata_extra_clip=(222, "sub24/EP02_07"),
    published_clips=256,
    published_aus={1: 26, 2: 22, 4: 130, 5: 2, 6: 13, 7: 39, 9: 13, 10: 16, 12: 34, 14: 27, 15: 16, 17: 25},
    synthetic=SyntheticFacts(
        stream=0,
        frame_size=(136, 112),  # of the face region
        clip_lengths=(50, 84),  # 66.8 frames on average
        combinations=_COMBINATIONS,
        layout=_layout,
        look=Look(gamma=0.95),
        # Frame numbers cross 999, where sorting by name goes wrong, and lie above every number of the published errata,
        # which must find nothing to correct here.
        first_numbers=(900, 960),
    ),
)
