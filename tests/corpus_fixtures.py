"""Small hand-written releases of CASME II, SAMM and 4DME, made from what is known of the real ones.

Written apart from the synthetic generator on purpose: an error in one of them is not repeated by the other.
"""

from pathlib import Path

import numpy as np
from openpyxl import Workbook
from PIL import Image

CASME2_HEADER = [
    "Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None, "Action Units", "Estimated Emotion",
]  # fmt: skip
SAMM_HEADER = [
    "Subject", "Filename", "Inducement Code", "Onset Frame", "Apex Frame", "Offset Frame", "Duration", "Micro",
    "Action Units", "Estimated Emotion", "Objective Classes", "Notes",
]  # fmt: skip
FOURDME_HEADER = [
    "sub_ID", "fold_name", "Onset", "Apex", "Offset", "Emotion", "AUs", "AU1", "AU2", "AU4", "AU7", "AU12", "AU45",
    "fold", "eye blink", "Positive", "Negative", "Surprise", "Repression", "Others", "Total",
]  # fmt: skip
FOURDME_AUS = (1, 2, 4, 7, 12, 45)
FOURDME_EMOTIONS = ("Positive", "Negative", "Surprise", "Repression", "Others")


def write_book(path: Path, rows: list[list[object]], *, sheet: str = "Sheet1") -> Path:
    book = Workbook()
    book.active.title = sheet
    for row in rows:
        book.active.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path


def write_frame(path: Path, number: int, *, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    """A picture whose gray level is the frame's number (modulo 200), so that a test can tell frames apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((size[1], size[0]), number % 200, np.uint8)
    Image.fromarray(pixels, "L").convert(mode).save(path, quality=95)


def write_frames(folder: Path, pattern: str, numbers, **options) -> None:
    for number in numbers:
        write_frame(folder / pattern.format(number), number, **options)


def casme2_row(subject, clip, onset, apex, offset, aus, emotion="happiness") -> list[object]:
    return [subject, clip, None, onset, apex, offset, None, aus, emotion]


CASME2_ROWS = [
    casme2_row(1, "EP02_01f", 46, 59, 86, "4+R12", "happiness"),
    casme2_row(1, "EP03_02", 98, "/", 104, 4, "others"),
    casme2_row(2, "EP01_11f", 9, 12, 14, "L1+R2", "comtempt"),
    casme2_row(17, "EP05_09", 5, 8, 11, "14?", "disgust"),
]


def make_casme2(root: Path, rows: list[list[object]] | None = None) -> Path:
    """`CASME2_RAW_selected/sub01/EP02_01f/img46.jpg`: absolute numbers, no padding, across 9 -> 10 and 99 -> 100."""
    rows = CASME2_ROWS if rows is None else rows
    write_book(root / "CASME2-coding-20190701.xlsx", [CASME2_HEADER, *rows])
    for subject, clip, _, onset, _, offset, *_ in rows:
        folder = root / "CASME2_RAW_selected" / f"sub{int(subject):02d}" / clip
        write_frames(folder, "img{}.jpg", range(int(onset), int(offset) + 1))
    return root


def samm_row(subject, clip, onset, apex, offset, aus, emotion="Anger") -> list[object]:
    return [subject, clip, 1, onset, apex, offset, offset - onset + 1, "Micro - 1/2", aus, emotion, 1, None]


SAMM_ROWS = [
    samm_row("006", "006_1_2", 562, 566, 570, "4+7+A", "Anger"),
    samm_row(6, "006_1_3", 98, 101, 104, "A1B+A2C", "Other"),
    samm_row("013", "013_1_8", 9998, 10001, 10003, "R14A or 17A", "Contempt"),
]


def make_samm(root: Path, rows: list[list[object]] | None = None) -> Path:
    """`SAMM/006/006_1_2/006_05562.jpg`, gray; 13 rows of notes on top; the last clip has its own padding."""
    rows = SAMM_ROWS if rows is None else rows
    above = [["Notes on the coding"], *([[None]] * 11), ["Subject numbers are those of the release"]]
    write_book(root / "SAMM_Micro_FACS_Codes_v2.xlsx", [*above, SAMM_HEADER, *rows], sheet="MICRO ONLY")
    for subject, clip, _, onset, _, offset, *_ in rows:
        name = f"{int(subject):03d}"
        pattern = f"{name}_{{:04d}}.jpg" if clip == "013_1_8" else f"{name}_{{:05d}}.jpg"
        # The release has frames before the onset and after the offset too.
        write_frames(root / "SAMM" / name / clip, pattern, range(onset - 2, offset + 3), mode="L")
    return root


def fourdme_row(subject, clip, onset, apex, offset, emotion, aus, one_hot, emotions=None) -> list[object]:
    """`one_hot`: the AUs that are marked; `emotions`: those marked, by default the ones in the text."""
    marked = emotion.split("+") if emotions is None else emotions
    return [
        subject, clip, float(onset), float(apex), float(offset), emotion, aus,
        *[int(au in one_hot) for au in FOURDME_AUS], 1, 0, *[int(name in marked) for name in FOURDME_EMOTIONS], 1,
    ]  # fmt: skip


FOURDME_ROWS = [
    fourdme_row("S1", "S1_1st_001_01_1", 120, 124, 129, "Negative+Repression", "AU4+L7", {4, 7}),
    fourdme_row("S1", "S1_1st_001_01_2", 95, 99, 103, "Surprise+Positive", "AUR2+12(k)+45", {2, 12, 45}),
    fourdme_row("S2", "S2_1st_001_03_1", 7, 9, 12, "Others", "AU1+2", {1, 4}),
]


def make_fourdme(root: Path, rows: list[list[object]] | None = None, *, frames: bool = True) -> Path:
    """`gray_micro/<sub_ID>/<fold_name>/`, with the folder that is known to have no row."""
    rows = FOURDME_ROWS if rows is None else rows
    write_book(root / "4DME_Labelling_Micro_release v1.xlsx", [FOURDME_HEADER, *rows])
    extras = [["sub_ID", "fold_name", "self-report emo'", "video emo'"], ["S1", "S1_1st_001_01_1", "x", "y"]]
    write_book(root / "4DME_Labelling_Micro_extras_release v1.xlsx", extras)
    for subject, clip, onset, _, offset, *_ in rows if frames else []:
        write_frames(root / "gray_micro" / subject / clip, "{:04d}.png", range(int(onset), int(offset) + 1), mode="L")
    write_frames(root / "gray_micro" / "S13" / "S13_1st_001_01_1", "{:04d}.png", range(1, 4), mode="L")
    return root
