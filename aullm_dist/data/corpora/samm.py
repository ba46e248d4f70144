"""SAMM: 29 subjects at 200 fps, gray, frames `006_05562.jpg` whose padding differs between clips.

The table starts below a block of notes. Cells that offer alternatives (`R14A or 17A`) are settled as published by the
field's harness (MEB, from optical flow) in the rows that it names; elsewhere the first alternative counts and is
reported.
"""

import re

from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum

__all__ = ["SPEC"]


def _subject_of(subject: str, _clip: str) -> str | None:
    # Spreadsheet software turns the text "006" into the number 6.
    match = re.fullmatch(r"0*([0-9]{1,3})", subject)
    return match[1].zfill(3) if match else None


SPEC = CorpusSpec(
    name="samm",
    title="SAMM",
    fps=200.0,
    columns=Columns(
        subject="Subject",
        clip="Filename",
        onset="Onset Frame",
        apex="Apex Frame",
        offset="Offset Frame",
        aus="Action Units",
        emotion="Estimated Emotion",
    ),
    frame_folders=("SAMM",),
    subject_of=_subject_of,
    subject_form="a subject's number such as 006",
    errata=(
        Erratum(56, offset=5739),
        Erratum(125, apex=1105),
        Erratum(132, apex=4945),
        Erratum(133, apex=5130),
        Erratum(15, aus="R12 + R15"),
        Erratum(18, aus="R12 + R15"),
        Erratum(41, aus="L14"),
        Erratum(64, aus="R14"),
        Erratum(154, aus="R14A"),
    ),
    errata_rows=159,
    published_clips=159,
    published_aus={1: 6, 2: 18, 4: 23, 5: 10, 6: 3, 7: 46, 9: 5, 10: 6, 12: 28, 14: 13, 15: 4, 17: 6},
)
