"""MMEW, micro-expressions: 90 fps, colour, `Micro_Expression/<emotion>/<Filename>/<n>.jpg`, `n` from 1, not padded.

The makers' page describes `<subject>/<emotion>/<Filename>` instead; the form that fits the sheet is taken.

The subject is the first part of the clip's name (`S01-07-001`). Clips called `others` in the sheet lie in the folder
`repression` in some releases; both are tried. Apex and offset of sixteen rows are corrected as published by the
field's harness (MEB).
"""

import re

from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum

__all__ = ["SPEC"]

_ROWS = (33, 35, 36, 37, 38, 39, 40, 41, 42, 142, 143, 145, 146, 148, 154, 156)
_APEXES = (40, 15, 46, 20, 25, 20, 23, 28, 32, 56, 32, 27, 22, 29, 31, 38)
_OFFSETS = (75, 54, 59, 98, 80, 93, 58, 61, 68, 88, 80, 85, 61, 108, 72, 106)


def _subject_of(_subject: str, clip: str) -> str | None:
    match = re.match(r"(S[0-9]{1,3})-", clip, re.IGNORECASE)
    return match[1].upper() if match else None


SPEC = CorpusSpec(
    name="mmew",
    title="MMEW",
    fps=90.0,
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
)
