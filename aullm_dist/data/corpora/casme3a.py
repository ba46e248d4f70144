"""Describes CAS(ME)^3, part A: 30 fps, colour and depth, as videos or clips; several movements in one video.

Subject and Filename name a video, so a clip is identified by its onset as well. Labels and folders differ in case, and
frames were dropped in recording: what exists is taken and what is missing is reported. The depth frames are not read.
Corrections of six rows as published by the field's harness (MEB) for the sheet of 860 rows.
"""

import re
from collections.abc import Sequence

from aullm_dist.data.corpora.drawn import (
    OBJECTIVE_CLASSES,
    AuCombination,
    Cell,
    ClipPlan,
    Layout,
    Look,
    Placed,
    SyntheticFacts,
    plain_aus,
)
from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum, Provenance, clip_part

__all__ = ["SPEC"]


def _subject_of(subject: str, _clip: str) -> str | None:
    match = re.fullmatch(r"spno\.?\s*0*([0-9]{1,4})", subject, re.IGNORECASE)
    return f"spNO.{match[1]}" if match else None


def _clip_of(text: str) -> str | None:
    return clip_part(text.lower())


# Counts aimed at: CD6ME positives per AU (MEB, table 4 notebook).
COMBINATIONS: dict[AuCombination, float] = {
    (1, 2): 105, (1,): 38, (2,): 14, (1, 2, 5): 9, (5,): 35, (4,): 226, (4, 7): 15, (4, 9): 24, (9,): 26,
    (7,): 12, (4, 14): 9, (14,): 181, (14, 17): 3, (12,): 10, (6, 12): 5, (6,): 3, (10,): 10, (15,): 4,
    (15, 17): 2, (17,): 15, (20,): 30, (24,): 50, (25,): 34,
}  # fmt: skip


def _layout(clips: Sequence[ClipPlan], context_frames: int) -> Layout:
    placed = []
    for plan in clips:
        number, video = plan.subject + 1, "abcdefghijklmnopqrstuvwxyz"[plan.ordinal // 2 % 26]
        if context_frames:  # whole videos, each with several clips
            folder, depth = (f"part_A/spNO.{number}/{video}/{kind}" for kind in ("color", "depth"))
        else:
            name = f"spNo.{number}_{video}_{plan.onset}"
            folder, depth = (f"Part_A_ME_clip/{kind}/{name}" for kind in ("frame", "depth"))
        dropped = frozenset({plan.onset + 2} if plan.index % 10 == 7 else ())
        written = video.upper() if plan.index % 9 == 4 else video
        emotion = {"happiness": "happy", "sadness": "sad", "repression": "others"}.get(plan.emotion, plan.emotion)
        emotion = "Others" if emotion == "others" and plan.index % 2 else emotion
        row: list[Cell] = [f"spNO.{number}", written, plan.onset, plan.apex, plan.offset, plain_aus(plan)]
        row += [OBJECTIVE_CLASSES.get(plan.emotion, 7), emotion]
        placed.append(Placed(plan, folder, "{}.jpg", row, dropped, depth))
    header: list[Cell] = ["Subject", "Filename", "Onset", "Apex", "Offset", "AU", "Objective class", "emotion"]
    return Layout("cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx", "label", [], header, placed)


SPEC = CorpusSpec(
    name="casme3a",
    title="CAS(ME)^3 part A",
    provenance=Provenance("Institute of Psychology, Chinese Academy of Sciences"),
    fps=30.0,
    # MEB has no set for CAS(ME)^3: the AUs of its cross-dataset set with at least 10 positives in part A **(ours)**.
    aus=(1, 2, 4, 5, 7, 9, 10, 12, 14, 17),
    columns=Columns(
        subject="Subject",
        clip="Filename",
        onset="Onset",
        apex="Apex",
        offset="Offset",
        aus=("AU", "Action Units"),
        emotion="emotion",
    ),
    frame_folders=("part_A", "frame", "Part_A_ME_clip"),
    clip_folders=("{subject}/{clip}/color", "{subject}_{clip}_{onset}"),
    key="{subject}/{clip}_{onset}",
    subject_of=_subject_of,
    subject_form="a subject such as spNO.1",
    clip_of=_clip_of,
    rows_with=("Expression type", "micro-expression"),
    errata=(
        Erratum(128, apex=123),
        Erratum(708, offset=34),
        Erratum(749, onset=2647),
        Erratum(750, onset=1, apex=1),
        Erratum(796, offset=1845),
        Erratum(798, offset=2403),
    ),
    errata_rows=860,
    drops_frames=True,
    published_clips=860,
    published_aus={1: 153, 2: 128, 4: 274, 5: 44, 6: 8, 7: 27, 9: 50, 10: 10, 12: 15, 14: 193, 15: 6, 17: 20},
    synthetic=SyntheticFacts(
        stream=5,
        frame_size=(90, 160),
        clip_lengths=(8, 18),  # no mean length is published: **(ours)**
        combinations=COMBINATIONS,
        layout=_layout,
        look=Look(gamma=1.2, blur_pixels=0.2, noise_factor=1.1),
        first_numbers=(1, 900),
        one_count=True,  # a video holds several clips
    ),
)
