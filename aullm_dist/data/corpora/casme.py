"""Describes CASME: 60 fps, colour, frames `<Filename>-<n>.jpg`, `n` padded in the later part of the release only.

The sheet has two apex columns; the first counts, as in the field's harness (MEB), which also published the corrections
of five rows.
"""

import re
from collections.abc import Sequence

from aullm_dist.data.corpora.drawn import AuCombination, Cell, ClipPlan, Layout, Look, Placed, SyntheticFacts, plain_aus
from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum, Provenance

__all__ = ["SPEC"]


def _subject_of(subject: str, _clip: str) -> str | None:
    match = re.fullmatch(r"(?:sub)?0*([0-9]{1,3})", subject, re.IGNORECASE)
    return f"sub{int(match[1]):02d}" if match else None


# Counts aimed at: CD6ME positives per AU (MEB, table 4 notebook).
_COMBINATIONS: dict[AuCombination, float] = {
    (4,): 50, (4, 9): 14, (9,): 25, (1, 2): 12, (1,): 8, (2,): 5, (1, 4): 3, (4, 7): 3, (7,): 1, (12,): 8,
    (6, 12): 1, (14,): 21, (14, 17): 2, (15,): 11, (15, 17): 3, (17,): 8, (10,): 3, (24,): 6, (20,): 5,
}  # fmt: skip


def _layout(clips: Sequence[ClipPlan], _context_frames: int) -> Layout:
    placed = []
    # Numbers are padded from row 92 on; in a corpus too small for that, from its middle on.
    padded_from = 92 if len(clips) > 92 else len(clips) // 2
    for plan in clips:
        name = f"EP{plan.ordinal // 9 + 1:02d}_{plan.ordinal % 9 + 1}"
        pattern = f"{name}-{{:03d}}.jpg" if plan.index >= padded_from else f"{name}-{{}}.jpg"
        emotion = {"others": "tense", "contempt": "comtempt", "anger": "tense"}.get(plan.emotion, plan.emotion)
        row: list[Cell] = [plan.subject + 1, name, None, plan.onset, plan.apex, 0, plan.offset, None]
        row += [plain_aus(plan), emotion]
        placed.append(Placed(plan, f"CASME_raw_selected/sub{plan.subject + 1:02d}/{name}", pattern, row))
    header: list[Cell] = ["Subject", "Filename", None, "OnsetF", "ApexF1", "ApexF2", "OffsetF", None, "AU", "Emotion"]
    return Layout("casme.xlsx", "Sheet1", [], header, placed)


SPEC = CorpusSpec(
    name="casme",
    title="CASME",
    provenance=Provenance("Institute of Psychology, Chinese Academy of Sciences"),
    fps=60.0,
    aus=(1, 4, 9, 14),  # MEB, utils.dataset_aus
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
    synthetic=SyntheticFacts(
        stream=3,
        frame_size=(90, 160),
        clip_lengths=(16, 28),  # 22.1 frames on average
        combinations=_COMBINATIONS,
        layout=_layout,
        look=Look(gamma=1.1, blur_pixels=0.4, noise_factor=1.2),
        first_numbers=(20, 900),
    ),
)
