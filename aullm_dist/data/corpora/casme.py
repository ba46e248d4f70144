"""CASME: 60 fps, colour, frames `<Filename>-<n>.jpg`, `n` padded in the later part of the release and not before.

The sheet has two apex columns; the first counts, as in the field's harness (MEB), which also published the corrections
of five rows.
"""

import re

from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum

__all__ = ["SPEC"]


def _subject_of(subject: str, _clip: str) -> str | None:
    match = re.fullmatch(r"(?:sub)?0*([0-9]{1,3})", subject, re.IGNORECASE)
    return f"sub{int(match[1]):02d}" if match else None


SPEC = CorpusSpec(
    name="casme",
    title="CASME",
    fps=60.0,
    columns=Columns(
        subject="Subject",
        clip="Filename",
        onset="OnsetF",
        apex="ApexF1",
        offset="OffsetF",
        aus="AU",
        emotion="Emotion",
    ),
    frame_folders=("CASME_raw_selected", "Cropped"),
    subject_of=_subject_of,
    subject_form="a subject's number such as 1",
    errata=(
        Erratum(40, onset=100, apex=120, offset=149),
        Erratum(42, onset=101, apex=110, offset=119),
        Erratum(43, onset=57, apex=65, offset=74),
        Erratum(54, offset=40),
        Erratum(140, offset=142),
    ),
    errata_rows=189,
    published_clips=189,
    published_aus={1: 23, 2: 17, 4: 70, 5: 0, 6: 1, 7: 4, 9: 40, 10: 3, 12: 9, 14: 23, 15: 14, 17: 13},
)
