"""Small hand-written releases of all seven corpora, made from what is known of the real ones.

Written apart from the synthetic generator on purpose: an error in one of them is not repeated by the other.
"""

import io
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


_PICTURES: dict[tuple, bytes] = {}


def write_frame(path: Path, number: int, *, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    """A picture whose gray level is the frame's number (modulo 200), so that a test can tell frames apart."""
    key = (number % 200, size, mode, path.suffix)
    if key not in _PICTURES:
        pixels = np.full((size[1], size[0]), number % 200, np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels, "L").convert(mode).save(buffer, Image.registered_extensions()[path.suffix], quality=95)
        _PICTURES[key] = buffer.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_PICTURES[key])


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


CASME_HEADER = [
    "Subject", "Filename", "Unnamed: 2", "OnsetF", "ApexF1", "ApexF2", "OffsetF", "Unnamed: 7", "AU", "Emotion",
]  # fmt: skip


def casme_row(subject, clip, onset, apex, offset, aus, emotion="tense") -> list[object]:
    return [subject, clip, None, onset, apex, 0, offset, None, aus, emotion]


CASME_ROWS = [
    casme_row(1, "EP01_5", 98, 100, 103, "4+9", "comtempt"),
    casme_row(7, "EP03_12", 9, 10, 12, 14, "repression"),
]


def make_casme(root: Path, rows: list[list[object]] | None = None) -> Path:
    """`CASME_raw_selected/sub01/<Filename>/<Filename>-<n>.jpg`; the second clip's numbers are padded to 3 digits."""
    rows = CASME_ROWS if rows is None else rows
    write_book(root / "casme.xlsx", [CASME_HEADER, *rows])
    for position, (subject, clip, _, onset, _, _, offset, *_) in enumerate(rows):
        pattern = f"{clip}-{{:03d}}.jpg" if position == 1 else f"{clip}-{{}}.jpg"
        write_frames(root / "CASME_raw_selected" / f"sub{subject:02d}" / clip, pattern, range(onset, offset + 1))
    return root


MMEW_HEADER = [
    "Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Action Units", "Estimated Emotion", "remarks",
]  # fmt: skip


def mmew_row(clip, onset, apex, offset, aus, emotion) -> list[object]:
    return [int(clip[1:3]), clip, onset, apex, offset, aus, emotion, None]


MMEW_ROWS = [
    mmew_row("S01-07-001", 1, 4, 9, "12", "happiness"),
    mmew_row("S02-06-003", 1, 5, 11, "L14+4", "others"),
    mmew_row("S02-06-004", 1, 2, 5, "/", "Others"),
]


def make_mmew(root: Path, rows: list[list[object]] | None = None) -> Path:
    """`Micro_Expression/<emotion>/<Filename>/<n>.jpg`; `others` lies in `repression` or `others`."""
    rows = MMEW_ROWS if rows is None else rows
    write_book(root / "MMEW_Micro_Exp.xlsx", [MMEW_HEADER, *rows])
    for _, clip, onset, _, offset, _, emotion, _ in rows:
        folder = "repression" if emotion == "others" else emotion.lower()
        write_frames(root / "Micro_Expression" / folder / clip, "{}.jpg", range(onset, offset + 1))
    write_frame(root / "Macro_Expression" / "S01" / "anger" / "S01-07-001.jpg", 1)
    return root


CASME3A_HEADER = ["Subject", "Filename", "Onset", "Apex", "Offset", "AU", "Objective class", "emotion", "shade"]


def casme3a_row(subject, video, onset, apex, offset, aus, emotion="Others") -> list[object]:
    return [subject, video, onset, apex, offset, aus, "I", emotion, 0]


# The third and the fourth are two movements of one video; the last but one lacks a frame; the last is written twice.
CASME3A_ROWS = [
    casme3a_row("spNO.1", "a", 8, 10, 12, "1+2", "surprise"),
    casme3a_row("spNO.10", "A", 116, 118, 121, 4, "others"),
    casme3a_row("spNO.10", "b", 9, 11, 13, "4+R14", "disgust"),
    casme3a_row("spNO.10", "b", 98, 100, 102, "14", "Others"),
    casme3a_row("spNO.2", "c", 5, 7, 9, "12", "happy"),
    casme3a_row("spNO.2", "c", 5, 7, 9, "12", "happy"),
]


def _casme3a_frames(folder, subject: str, onset: int, offset: int) -> None:
    numbers = [n for n in range(onset, offset + 1) if not (subject == "spNO.2" and n == 6)]
    write_frames(folder, "{}.jpg", numbers)


def make_casme3a(root: Path, rows: list[list[object]] | None = None) -> Path:
    """`Part_A_ME_clip/frame/spNo.10_a_116/116.jpg` `depth` beside `frame`; the sheet writes `spNO`."""
    rows = CASME3A_ROWS if rows is None else rows
    write_book(root / "cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx", [CASME3A_HEADER, *rows], sheet="label")
    for subject, video, onset, _, offset, *_ in rows:
        name = f"{subject.replace('NO', 'No')}_{video.lower()}_{onset}"
        _casme3a_frames(root / "Part_A_ME_clip" / "frame" / name, subject, onset, offset)
        write_frame(root / "Part_A_ME_clip" / "depth" / name / f"{onset}.png", 1, mode="L")
    return root


def make_casme3a_videos(root: Path) -> Path:
    """`part_A/spNO.1/a/color/<n>.jpg` and `depth` beside it; frames go on around and between the movements."""
    write_book(root / "cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx", [CASME3A_HEADER, *CASME3A_ROWS], sheet="label")
    for subject, video, onset, _, offset, *_ in CASME3A_ROWS:
        folder = root / "part_A" / subject / video.lower()
        _casme3a_frames(folder / "color", subject, onset - 3, offset + 3)
        write_frame(folder / "depth" / f"{onset}.png", 1, mode="L")
    return root


CASME3C_HEADER = ["sub", "count", "onset", "offset", "au"]
CASME3C_ROWS = [[1, 1, 8, 12, "4,7"], [1, 2, 97, 101, 12], ["12", 1, 3, 9, "1\uff0c2"]]


def make_casme3c(root: Path, rows: list[list[object]] | None = None) -> Path:
    """`part_C/01/1/<n>.jpg`; commas between AUs, one of them a Chinese one; no apex column."""
    rows = CASME3C_ROWS if rows is None else rows
    write_book(root / "CAS(ME)3_part_C_ME.xlsx", [CASME3C_HEADER, *rows])
    for subject, count, onset, offset, _ in rows:
        write_frames(root / "part_C" / f"{int(subject):02d}" / str(count), "{}.jpg", range(onset, offset + 1))
    return root


MAKERS = {
    "casme": make_casme,
    "casme2": make_casme2,
    "samm": make_samm,
    "4dme": make_fourdme,
    "mmew": make_mmew,
    "casme3a": make_casme3a,
    "casme3c": make_casme3c,
}
