"""Describes CAS(ME)^3, part C: AUs separated by commas, one a Chinese one; no apex column: the middle frame stands in.

No public source that we read shows the folders of part C or its frame rate. Clips are looked for as
`<subject>/<count>/<frames>`, with a folder `color` below or without **(ours)**; the frame rate is left open.
"""

import re
from collections.abc import Sequence

from aullm_dist.data.corpora.casme3a import COMBINATIONS
from aullm_dist.data.corpora.drawn import Cell, ClipPlan, Layout, Look, Placed, SyntheticFacts
from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Provenance

__all__ = ["SPEC"]


def _subject_of(subject: str, _clip: str) -> str | None:
    match = re.fullmatch(r"0*([0-9]{1,3})", subject)
    return match[1].zfill(2) if match else None


def _with_plus(text: str) -> str:
    """Commas, a Chinese one among them, stand for plus signs."""
    return text.replace("\uff0c", ",").replace(",", "+")


def _layout(clips: Sequence[ClipPlan], _context_frames: int) -> Layout:
    placed = []
    several = [plan.index for plan in clips if len(plan.movements) > 1]
    # Row 16 has a Chinese comma; where that row has one AU only, the next that has several.
    chinese = min(several, key=lambda index: (index < 16, index), default=None)
    for plan in clips:
        comma = "\uff0c" if plan.index == chinese else ","
        joined = comma.join(str(movement.au) for movement in plan.movements)
        aus: Cell = int(joined) if joined.isdigit() else joined
        row: list[Cell] = [plan.subject + 1, plan.ordinal + 1, plan.onset, plan.offset, aus]
        placed.append(Placed(plan, f"part_C/{plan.subject + 1:02d}/{plan.ordinal + 1}", "{}.jpg", row))
    return Layout("CAS(ME)3_part_C_ME.xlsx", "Sheet1", [], ["sub", "count", "onset", "offset", "au"], placed)


SPEC = CorpusSpec(
    name="casme3c",
    title="CAS(ME)^3 part C",
    provenance=Provenance("Institute of Psychology, Chinese Academy of Sciences"),
    fps=None,
    # MEB has no set for CAS(ME)^3: the AUs of its cross-dataset set with at least 10 positives in part A **(ours)**.
    aus=(1, 2, 4, 5, 7, 9, 10, 12, 14, 17),
    columns=Columns(
        subject="sub",
        clip="count",
        onset="onset",
        apex=(),
        offset="offset",
        aus="au",
        emotion=(),
    ),
    frame_folders=("part_C",),
    clip_folders=("{subject}/{clip}", "{subject}/{clip}/color"),
    key="{subject}/{clip}_{onset}",
    subject_of=_subject_of,
    subject_form="a subject's number such as 1",
    drops_frames=True,
    harness_text=_with_plus,
    synthetic=SyntheticFacts(
        stream=6,
        frame_size=(90, 160),
        clip_lengths=(8, 18),  # no mean length is published: **(ours)**
        combinations=COMBINATIONS,  # no counts are published: those of part A stand in **(ours)**
        layout=_layout,
        look=Look(gamma=1.25, blur_pixels=0.2, noise_factor=1.3),
        first_numbers=(1, 900),
    ),
)
