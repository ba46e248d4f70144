"""CASME II: 26 subjects at 200 fps, colour, frames `img46.jpg` numbered absolutely and without padding.

Releases of the sheet differ (255 and 256 rows). Corrections: offset of one row, and the apexes that the sheet leaves
as `/`, both as published by the field's harness (MEB, for its 256-row sheet); any other missing apex becomes the
middle frame.
"""

import re

from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum

__all__ = ["SPEC"]

_APEXES = {
    29: 279, 35: 68, 43: 77, 45: 81, 51: 166, 53: 100, 117: 187, 118: 89, 126: 80, 136: 88, 147: 134, 155: 231,
    168: 53, 170: 329, 177: 111, 202: 91, 203: 103, 234: 98, 237: 153, 238: 98,
}  # fmt: skip


def _subject_of(subject: str, _clip: str) -> str | None:
    match = re.fullmatch(r"(?:sub)?0*([0-9]{1,3})", subject, re.IGNORECASE)
    return f"sub{int(match[1]):02d}" if match else None


SPEC = CorpusSpec(
    name="casme2",
    title="CASME II",
    fps=200.0,
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
)
