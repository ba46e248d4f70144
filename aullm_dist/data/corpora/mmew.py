"""Describes MMEW (micro): 90 fps, colour, `Micro_Expression/<emotion>/<Filename>/<n>.jpg`, `n` from 1, unpadded.

The makers' page describes `<subject>/<emotion>/<Filename>` instead; the form that fits the sheet is taken.

The subject is the first part of the clip's name (`S01-07-001`). Clips called `others` in the sheet lie in the folder
`repression` in some releases; both are tried. Apex and offset of sixteen rows are corrected as published by the
field's harness (MEB).
"""

import re
from collections.abc import Sequence

from aullm_dist.data.corpora.drawn import AuCombination, Cell, ClipPlan, Layout, Look, Placed, SyntheticFacts, plain_aus
from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum, Provenance

__all__ = ["SPEC"]

_ROWS = (33, 35, 36, 37, 38, 39, 40, 41, 42, 142, 143, 145, 146, 148, 154, 156)
_APEXES = (40, 15, 46, 20, 25, 20, 23, 28, 32, 56, 32, 27, 22, 29, 31, 38)
_OFFSETS = (75, 54, 59, 98, 80, 93, 58, 61, 68, 88, 80, 85, 61, 108, 72, 106)


def _subject_of(_subject: str, clip: str) -> str | None:
    match = re.match(r"(S[0-9]{1,3})-", clip, re.IGNORECASE)
    return match[1].upper() if match else None


_MMEW_EMOTIONS = ("happiness", "anger", "surprise", "disgust", "fear", "sadness", "others", "repression", "contempt")
# Counts aimed at: CD6ME positives per AU (MEB, table 4 notebook).
_COMBINATIONS: dict[AuCombination, float] = {
    (1, 2): 20, (1, 2, 5): 18, (1,): 10, (2, 5): 3, (5,): 39, (4,): 45, (4, 7): 37, (4, 5): 10, (4, 10): 6,
    (4, 9): 5, (4, 17): 3, (1, 4): 2, (7,): 7, (7, 10): 3, (12,): 24, (6, 12): 8, (10, 12): 3, (10,): 26,
    (14,): 15, (12, 14): 2, (15,): 5, (15, 17): 1, (17,): 7, (9,): 3, (6,): 2, (24,): 6,
}  # fmt: skip


def _layout(clips: Sequence[ClipPlan], _context_frames: int) -> Layout:
    placed = []
    for plan in clips:
        # `others` in the sheet are the clips of the folder `repression`.
        emotion = {"repression": "others", "contempt": "others"}.get(plan.emotion, plan.emotion)
        code = _MMEW_EMOTIONS.index(emotion) + 1
        name = f"S{plan.subject + 1:02d}-{code:02d}-{plan.ordinal + 1:03d}"
        folder = "repression" if emotion == "others" else emotion
        row: list[Cell] = [plan.subject + 1, name, plan.onset, plan.apex, plan.offset, plain_aus(plan), emotion, None]
        placed.append(Placed(plan, f"Micro_Expression/{folder}/{name}", "{}.jpg", row))
    header: list[Cell] = ["Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Action Units"]
    header += ["Estimated Emotion", "remarks"]
    return Layout("MMEW_Micro_Exp.xlsx", "Sheet1", [], header, placed)


SPEC = CorpusSpec(
    name="mmew",
    title="MMEW",
    provenance=Provenance("its makers, by the licence form on dpailab.com"),
    fps=90.0,
    aus=(1, 2, 4, 5, 7, 10, 12, 14),  # MEB, utils.dataset_aus
    columns=Columns(
        subject="Subject",
        clip="Filename",
        onset="OnsetFrame",
        apex="ApexFrame",
        offset="OffsetFrame",
        aus="Action Units",
        emotion="Estimated Emotion",
    ),
    frame_folders=("Micro_Expression",),
    clip_folders=("{emotion}/{clip}", "{subject}/{emotion}/{clip}"),
    emotion_folders={"others": ("others", "repression")},
    subject_of=_subject_of,
    subject_in_clip=True,
    subject_form="a clip whose name starts with its subject, such as S01-07-001",
    errata=tuple(
        Erratum(row, apex=apex, offset=offset) for row, apex, offset in zip(_ROWS, _APEXES, _OFFSETS, strict=True)
    ),
    errata_rows=300,
    published_clips=300,
    published_aus={1: 50, 2: 41, 4: 109, 5: 70, 6: 10, 7: 47, 9: 8, 10: 38, 12: 37, 14: 17, 15: 6, 17: 11},
    synthetic=SyntheticFacts(
        stream=4,
        frame_size=(116, 116),
        clip_lengths=(30, 50),  # 39.9 frames on average
        combinations=_COMBINATIONS,
        layout=_layout,
        look=Look(gamma=0.85, blur_pixels=0.3, noise_factor=0.9),
        first_numbers=None,
    ),
)
