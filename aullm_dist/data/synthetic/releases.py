"""Where each corpus puts what: folders, file names, the sheet's columns and the ways its cells are written.

A generator for tests and demos: no claim about real faces is made from it. The layouts follow the public loaders of the
corpora; no file of a real corpus was opened for it. The folders of CAS(ME)^3 part C are not public and are (ours).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from aullm_dist.data.synthetic.labels import ClipPlan, Movement
from aullm_dist.data.synthetic.spec import SyntheticSpec

Cell = str | int | float | None
COLOUR = frozenset({"casme", "casme2", "mmew", "casme3a", "casme3c"})

NOTICE = "Synthetic corpus for tests and demos. No claim about real faces is made from it."
_SIDE_LETTERS = {"left": "L", "right": "R", "both": ""}
_OBJECTIVE_CLASSES = {"happiness": 1, "surprise": 2, "anger": 3, "disgust": 4, "sadness": 5, "fear": 6}
_FOURD_AUS = (1, 2, 4, 5, 6, 7, 9, 10, 12, 13, 14, 15, 16, 17, 18, 20, 23, 24, 25, 26, 28, 45)
_FOURD_EMOTIONS = {
    "happiness": "Positive",
    "surprise": "Surprise",
    "repression": "Repression",
    "others": "Others",
}
_FOURD_CATEGORIES = ("Positive", "Negative", "Surprise", "Repression", "Others")


@dataclass(frozen=True, slots=True)
class Placed:
    """A clip with its place on disk, its workbook row and the way its frames are named."""

    plan: ClipPlan
    folder: str
    file_name: str
    row: list[Cell]
    dropped: frozenset[int] = frozenset()
    """Frame numbers that were lost in recording."""
    depth_folder: str | None = None
    """Folder of a depth frame beside the colour frames."""
    again: list[Cell] = field(default_factory=list)
    """A second row of the clip, filled by damage alone."""


@dataclass(frozen=True, slots=True)
class Layout:
    """A corpus on disk: workbook name, sheet, the rows above the table, the table's header, the clips."""

    workbook: str
    sheet: str
    rows_above: list[list[Cell]]
    header: list[Cell]
    clips: list[Placed]

    @property
    def au_column(self) -> int:
        """Index of the column of AU texts."""
        return next(i for i, name in enumerate(self.header) if name in ("AU", "AUs", "Action Units", "au"))

    @property
    def onset_offset_columns(self) -> tuple[int, int]:
        """Indices of the columns of onset and offset."""
        onset, offset = (i for i, name in enumerate(self.header) if str(name).lower().startswith(("onset", "offset")))
        return onset, offset


def _casme2(spec: SyntheticSpec, clips: list[ClipPlan]) -> Layout:
    # CASME2-RAW is the release with frames around the movement, CASME2_RAW_selected the one without.
    tree = "CASME2-RAW" if spec.context_frames else "CASME2_RAW_selected"
    placed = []
    for plan in clips:
        name = f"EP{plan.ordinal // 4 + 1:02d}_{plan.ordinal % 4 + 1:02d}" + ("f" if plan.index % 3 else "")
        aus: Cell = _plus_joined(plan)
        # Excel turns a lone number into a number.
        aus = int(aus) if aus.isdigit() else aus
        apex: Cell = "/" if plan.apex_missing else plan.apex
        # The column has no contempt and no anger; both are "others" there.
        emotion = {"contempt": "others", "anger": "others"}.get(plan.emotion, plan.emotion)
        row: list[Cell] = [plan.subject + 1, name, None, plan.onset, apex, plan.offset, None, aus, emotion]
        placed.append(Placed(plan, f"{tree}/sub{plan.subject + 1:02d}/{name}", "img{}.jpg", row))
    header: list[Cell] = ["Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None]
    header += ["Action Units", "Estimated Emotion"]
    return Layout("CASME2-coding-20190701.xlsx", "Sheet1", [], header, placed)


def _plus_joined(plan: ClipPlan) -> str:
    return "+".join(f"{_SIDE_LETTERS[m.side]}{m.au}" for m in plan.movements)


def _samm(spec: SyntheticSpec, clips: list[ClipPlan]) -> Layout:
    placed = []
    for plan in clips:
        subject = f"{plan.subject + 6:03d}"
        name = f"{subject}_{plan.ordinal // 3 + 1}_{plan.ordinal % 3 + 1}"
        # Most clips number their files with five digits, a few with four.
        digits = 4 if plan.index % 25 == 7 else 5
        emotion = {"others": "Other", "repression": "Other"}.get(plan.emotion, plan.emotion.capitalize())
        row: list[Cell] = [subject, name, plan.ordinal // 3 + 1, plan.onset, plan.apex, plan.offset, plan.num_frames]
        row += ["Micro - 1/2", _samm_aus(plan), emotion, _OBJECTIVE_CLASSES.get(plan.emotion, 7), None]
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
        side = _SIDE_LETTERS[movement.side] or ("A" if style == 3 and len(plan.movements) > 1 else "")
        tokens.append(f"{side}{movement.au}{letter}")
    return (" + " if style == 1 else "+").join(tokens)


def _intensity_letter(movement: Movement) -> str:
    return "ABC"[min(2, int((movement.strength - 0.75) * 6.0))]


def _fourd(spec: SyntheticSpec, clips: list[ClipPlan]) -> Layout:
    placed = []
    for plan in clips:
        subject = f"S{plan.subject + 1:02d}"
        name = f"{subject}_1st_{plan.ordinal + 1:03d}_01_1"
        emotions = _fourd_emotions(plan)
        active = set(plan.active_aus)
        row: list[Cell] = [subject, name, float(plan.onset), float(plan.apex), float(plan.offset)]
        row += ["+".join(emotions), _fourd_aus(plan)]
        row += [int(au in active) for au in _FOURD_AUS]
        row += [plan.subject + 1, int(45 in active), *(int(c in emotions) for c in _FOURD_CATEGORIES), len(active)]
        placed.append(Placed(plan, f"gray_micro/{subject}/{name}", "{:04d}.png", row))
    header: list[Cell] = ["sub_ID", "fold_name", "Onset", "Apex", "Offset", "Emotion", "AUs"]
    header += [f"AU{au}" for au in _FOURD_AUS]
    header += ["fold", "eye blink", *_FOURD_CATEGORIES, "Total"]
    return Layout("4DME_Labelling_Micro_release v1.xlsx", "Sheet1", [], header, placed)


def _fourd_aus(plan: ClipPlan) -> str:
    """Spell the AUs with the prefix on the first token only, the side letter after it and `(k)` for static ones."""
    tokens = [f"{_SIDE_LETTERS[m.side]}{m.au}{'(k)' if m.static else ''}" for m in plan.movements]
    return "AU" + "+".join(tokens)


def _fourd_emotions(plan: ClipPlan) -> list[str]:
    """Translate to the corpus's categories; a few clips bear two, as in `Negative+Repression`."""
    first = _FOURD_EMOTIONS.get(plan.emotion, "Negative")
    second = {"Negative": "Repression", "Surprise": "Positive"}.get(first)
    return [first, second] if second and plan.ordinal % 3 == 1 else [first]


def _plain(plan: ClipPlan) -> Cell:
    """AUs joined by plus signs; a lone one becomes a number, as spreadsheets make of it."""
    text = _plus_joined(plan)
    return int(text) if text.isdigit() else text


def _casme(spec: SyntheticSpec, clips: list[ClipPlan]) -> Layout:
    placed = []
    # Numbers are padded from row 92 on; in a corpus too small for that, from its middle on.
    padded_from = 92 if len(clips) > 92 else len(clips) // 2
    for plan in clips:
        name = f"EP{plan.ordinal // 9 + 1:02d}_{plan.ordinal % 9 + 1}"
        pattern = f"{name}-{{:03d}}.jpg" if plan.index >= padded_from else f"{name}-{{}}.jpg"
        emotion = {"others": "tense", "contempt": "comtempt", "anger": "tense"}.get(plan.emotion, plan.emotion)
        row: list[Cell] = [plan.subject + 1, name, None, plan.onset, plan.apex, 0, plan.offset, None]
        row += [_plain(plan), emotion]
        placed.append(Placed(plan, f"CASME_raw_selected/sub{plan.subject + 1:02d}/{name}", pattern, row))
    header: list[Cell] = ["Subject", "Filename", None, "OnsetF", "ApexF1", "ApexF2", "OffsetF", None, "AU", "Emotion"]
    return Layout("casme.xlsx", "Sheet1", [], header, placed)


_MMEW_EMOTIONS = ("happiness", "anger", "surprise", "disgust", "fear", "sadness", "others", "repression", "contempt")


def _mmew(spec: SyntheticSpec, clips: list[ClipPlan]) -> Layout:
    placed = []
    for plan in clips:
        # `others` in the sheet are the clips of the folder `repression`.
        emotion = {"repression": "others", "contempt": "others"}.get(plan.emotion, plan.emotion)
        code = _MMEW_EMOTIONS.index(emotion) + 1
        name = f"S{plan.subject + 1:02d}-{code:02d}-{plan.ordinal + 1:03d}"
        folder = "repression" if emotion == "others" else emotion
        row: list[Cell] = [plan.subject + 1, name, plan.onset, plan.apex, plan.offset, _plain(plan), emotion, None]
        placed.append(Placed(plan, f"Micro_Expression/{folder}/{name}", "{}.jpg", row))
    header: list[Cell] = ["Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Action Units"]
    header += ["Estimated Emotion", "remarks"]
    return Layout("MMEW_Micro_Exp.xlsx", "Sheet1", [], header, placed)


def _casme3a(spec: SyntheticSpec, clips: list[ClipPlan]) -> Layout:
    placed = []
    for plan in clips:
        number, video = plan.subject + 1, "abcdefghijklmnopqrstuvwxyz"[plan.ordinal // 2 % 26]
        if spec.context_frames:  # whole videos, each with several clips
            folder, depth = (f"part_A/spNO.{number}/{video}/{kind}" for kind in ("color", "depth"))
        else:
            name = f"spNo.{number}_{video}_{plan.onset}"
            folder, depth = (f"Part_A_ME_clip/{kind}/{name}" for kind in ("frame", "depth"))
        dropped = frozenset({plan.onset + 2} if plan.index % 10 == 7 else ())
        written = video.upper() if plan.index % 9 == 4 else video
        emotion = {"happiness": "happy", "sadness": "sad", "repression": "others"}.get(plan.emotion, plan.emotion)
        emotion = "Others" if emotion == "others" and plan.index % 2 else emotion
        row: list[Cell] = [f"spNO.{number}", written, plan.onset, plan.apex, plan.offset, _plain(plan)]
        row += [_OBJECTIVE_CLASSES.get(plan.emotion, 7), emotion]
        placed.append(Placed(plan, folder, "{}.jpg", row, dropped, depth))
    header: list[Cell] = ["Subject", "Filename", "Onset", "Apex", "Offset", "AU", "Objective class", "emotion"]
    return Layout("cas(me)3_part_A_ME_label_JpgIndex_v2.xlsx", "label", [], header, placed)


def _casme3c(spec: SyntheticSpec, clips: list[ClipPlan]) -> Layout:
    placed = []
    several = [plan.index for plan in clips if len(plan.movements) > 1]
    # Row 16 has a Chinese comma; where that row has one AU only, the next that has several.
    chinese = min(several, key=lambda index: (index < 16, index), default=None)
    for plan in clips:
        comma = "\uff0c" if plan.index == chinese else ","
        aus: Cell = comma.join(str(movement.au) for movement in plan.movements)
        aus = int(aus) if aus.isdigit() else aus
        row: list[Cell] = [plan.subject + 1, plan.ordinal + 1, plan.onset, plan.offset, aus]
        placed.append(Placed(plan, f"part_C/{plan.subject + 1:02d}/{plan.ordinal + 1}", "{}.jpg", row))
    return Layout("CAS(ME)3_part_C_ME.xlsx", "Sheet1", [], ["sub", "count", "onset", "offset", "au"], placed)


RELEASES: dict[str, Callable[[SyntheticSpec, list[ClipPlan]], Layout]] = {
    "casme": _casme,
    "casme2": _casme2,
    "samm": _samm,
    "4dme": _fourd,
    "mmew": _mmew,
    "casme3a": _casme3a,
    "casme3c": _casme3c,
}
"""The layout of each corpus, as a function of what is to be written."""
