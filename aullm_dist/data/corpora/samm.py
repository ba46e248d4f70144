"""Describes SAMM: 29 subjects at 200 fps, gray, frames `006_05562.jpg` whose padding differs between clips.

The table starts below a block of notes. Cells that offer alternatives (`R14A or 17A`) are settled as published by the
field's harness (MEB, from optical flow) in the rows that it names; elsewhere the first alternative counts and is
reported.
"""

import re
from collections.abc import Sequence

from aullm_dist.data.corpora.drawn import (
    NOTICE,
    OBJECTIVE_CLASSES,
    SIDE_LETTERS,
    AuCombination,
    Cell,
    ClipPlan,
    Layout,
    Look,
    Movement,
    Placed,
    SyntheticFacts,
)
from aullm_dist.data.corpora.spec import Columns, CorpusSpec, Erratum, Provenance

__all__ = ["SPEC"]


def _subject_of(subject: str, _clip: str) -> str | None:
    # Spreadsheet software turns the text "006" into the number 6.
    match = re.fullmatch(r"0*([0-9]{1,3})", subject)
    return match[1].zfill(3) if match else None


# Counts aimed at: CD6ME positives per AU (MEB, table 4 notebook).
_COMBINATIONS: dict[AuCombination, float] = {
    (7,): 30, (4, 7): 8, (4,): 12, (4, 9): 2, (12,): 16, (6, 12): 3, (7, 12): 4, (12, 14): 3, (12, 25): 2,
    (1, 2): 5, (2,): 7, (2, 5): 4, (2, 20): 2, (1,): 1, (5,): 6, (14,): 9, (15,): 3, (15, 17): 1, (17,): 5,
    (10,): 5, (9,): 3, (20,): 6, (24,): 8, (25,): 6, (7, 43): 4, (43,): 4,
}  # fmt: skip


def _layout(clips: Sequence[ClipPlan], _context_frames: int) -> Layout:
    placed = []
    for plan in clips:
        subject = f"{plan.subject + 6:03d}"
        name = f"{subject}_{plan.ordinal // 3 + 1}_{plan.ordinal % 3 + 1}"
        # Most clips number their files with five digits, a few with four.
        digits = 4 if plan.index % 25 == 7 else 5
        emotion = {"others": "Other", "repression": "Other"}.get(plan.emotion, plan.emotion.capitalize())
        row: list[Cell] = [subject, name, plan.ordinal // 3 + 1, plan.onset, plan.apex, plan.offset, plan.num_frames]
        row += ["Micro - 1/2", _samm_aus(plan), emotion, OBJECTIVE_CLASSES.get(plan.emotion, 7), None]
        placed.append(Placed(plan, f"SAMM/{subject}/{name}", f"{subject}_{{:0{digits}d}}.jpg", row))
    header: list[Cell] = ["Subject", "Filename", "Inducement Code", "Onset Frame", "Apex Frame", "Offset Frame"]
    header += ["Duration", "Micro", "Action Units", "Estimated Emotion", "Objective Classes", "Notes"]
    # The table's header stands on Excel's row 14.
    above: list[list[Cell]] = [[None], ["SAMM layout"], [NOTICE], [None], ["Letters A to E: intensity"]]
    above += [[None], ["L and R: one side of the face"]]
    above += [[None]] * (13 - len(above))
    return Layout("SAMM_Micro_FACS_Codes_v2.xlsx", "MICRO ONLY", above, header, placed)


def _samm_aus(plan: ClipPlan) -> str:
    """Spell the AUs as one of the coders would: `4+7`, `R12 + R15`, `12C`, `A1B+A2C`."""
    style = plan.index % 4
    tokens = []
    for movement in plan.movements:
        letter = _intensity_letter(movement) if style in (2, 3) else ""
        side = SIDE_LETTERS[movement.side] or ("A" if style == 3 and len(plan.movements) > 1 else "")
        tokens.append(f"{side}{movement.au}{letter}")
    return (" + " if style == 1 else "+").join(tokens)


def _intensity_letter(movement: Movement) -> str:
    return "ABC"[min(2, int((movement.strength - 0.75) * 6.0))]


SPEC = CorpusSpec(
    name="samm",
    title="SAMM",
    provenance=Provenance("Manchester Metropolitan University"),
    fps=200.0,
    aus=(2, 4, 7, 12),  # MEB, utils.dataset_aus
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
    synthetic=SyntheticFacts(
        stream=1,
        frame_size=(130, 192),
        clip_lengths=(56, 92),  # 74.3 frames on average
        combinations=_COMBINATIONS,
        layout=_layout,
        look=Look(gamma=0.75, blur_pixels=0.5, noise_factor=1.4),
        colour=False,
        first_numbers=(900, 6000),
        one_count=True,  # through a subject's session
    ),
)
