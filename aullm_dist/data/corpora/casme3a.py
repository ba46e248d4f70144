"""CAS(ME)^3, part A: 30 fps, colour beside depth, as whole videos or as clips; several movements in one video.

Subject and Filename name a video, so a clip is told by its onset as well. Labels and folders differ in case, and frames
were dropped in recording: what exists is taken and what is missing is told. The depth frames are not read. Corrections
of six rows as published by the field's harness (MEB) for the sheet of 860 rows.
"""

import re

from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum, clip_part

__all__ = ["SPEC"]


def _subject_of(subject: str, _clip: str) -> str | None:
    match = re.fullmatch(r"spno\.?\s*0*([0-9]{1,4})", subject, re.IGNORECASE)
    return f"spNO.{match[1]}" if match else None


def _clip_of(text: str) -> str | None:
    return clip_part(text.lower())


SPEC = CorpusSpec(
    name="casme3a",
    title="CAS(ME)^3 part A",
    fps=30.0,
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
)
