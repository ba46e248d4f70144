"""Writes a synthetic corpus to disk as CASME II, SAMM or 4DME lay theirs out: folders, file names, workbook, quirks.

A generator for tests and demos: no claim about real faces is made from it. The layouts follow the public loaders of the
corpora; no file of a real corpus was opened for it. Equal specs give equal bytes, workbook included.
"""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import openpyxl
from PIL import Image

from aullm_dist.data.synthetic.faces import Subject
from aullm_dist.data.synthetic.labels import ClipPlan, Movement, plan_clips
from aullm_dist.data.synthetic.spec import DAMAGES, Damage, SyntheticSpec
from aullm_dist.errors import UserError

SPEC_FILE = "SYNTHETIC.json"
"""File in the corpus's root that says the corpus is synthetic and how it was made; loaders need not know it."""

Cell = str | int | float | None

_NOTICE = "Synthetic corpus for tests and demos. No claim about real faces is made from it."
_EPOCH = (1980, 1, 1, 0, 0, 0)
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
class _Placed:
    """A clip with its place on disk, its workbook row and the way its frames are named."""

    plan: ClipPlan
    folder: str
    file_name: str
    row: list[Cell]


@dataclass(frozen=True, slots=True)
class _Layout:
    """A corpus on disk: workbook name, sheet, the rows above the table, the table's header, the clips."""

    workbook: str
    sheet: str
    rows_above: list[list[Cell]]
    header: list[Cell]
    clips: list[_Placed]

    def column(self, name: str) -> int:
        """Index of a header cell."""
        return self.header.index(name)


def write_corpus(spec: SyntheticSpec, root: str | Path, *, damage: Collection[Damage] = ()) -> Path:
    """Write the corpus below `root`, whole or not at all.

    A root that already holds this very corpus is left as it is. Each damage hits one clip of its own, counted in
    workbook order: `missing_frame` the first (its middle frame is not there), `unreadable_frame` the second (its middle
    frame is cut short), `missing_folder` the third, `unlabelled_folder` the fourth (its row is not there),
    `bad_au_cell` the fifth (`banana`), `onset_after_offset` the sixth.

    Args:
        spec: what to write.
        root: folder of the corpus, as `aullm-dist prepare --root` takes it; new or empty.
        damage: defects to write into it, for tests.

    Returns:
        `root`.

    Raises:
        UserError: `root` holds something else, an unknown damage, or fewer clips than the damage needs.
    """
    root = Path(root)
    clips = plan_clips(spec)
    for name in damage:
        if name not in DAMAGES:
            raise UserError(f"synthetic corpus: damage is {name!r}; allowed: {', '.join(DAMAGES)}")
        if DAMAGES.index(name) >= len(clips):
            raise UserError(f"synthetic corpus: damage {name} needs {DAMAGES.index(name) + 1} clips, got {len(clips)}")
    stamp = json.dumps({"notice": _NOTICE, "spec": asdict(spec), "damage": sorted(damage)}, indent=2) + "\n"
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        if (root / SPEC_FILE).is_file() and (root / SPEC_FILE).read_text(encoding="utf-8") == stamp:
            return root
        raise UserError(f"{root}: is not empty and does not hold this synthetic corpus; give a new or empty folder")
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    layout = {"casme2": _casme2, "samm": _samm, "4dme": _fourd}[spec.corpus](spec, clips)
    _write_frames(spec, layout, partial)
    _apply_damage(layout, partial, damage)
    rows = [*layout.rows_above, layout.header, *(clip.row for clip in layout.clips if clip.row)]
    (partial / layout.workbook).write_bytes(_workbook_bytes(layout.sheet, rows))
    (partial / SPEC_FILE).write_text(stamp, encoding="utf-8")
    if root.is_dir():
        root.rmdir()
    partial.replace(root)
    return root


def _casme2(spec: SyntheticSpec, clips: list[ClipPlan]) -> _Layout:
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
        placed.append(_Placed(plan, f"{tree}/sub{plan.subject + 1:02d}/{name}", "img{}.jpg", row))
    header: list[Cell] = ["Subject", "Filename", None, "OnsetFrame", "ApexFrame", "OffsetFrame", None]
    header += ["Action Units", "Estimated Emotion"]
    return _Layout("CASME2-coding-20190701.xlsx", "Sheet1", [], header, placed)


def _plus_joined(plan: ClipPlan) -> str:
    return "+".join(f"{_SIDE_LETTERS[m.side]}{m.au}" for m in plan.movements)


def _samm(spec: SyntheticSpec, clips: list[ClipPlan]) -> _Layout:
    placed = []
    for plan in clips:
        subject = f"{plan.subject + 6:03d}"
        name = f"{subject}_{plan.ordinal // 3 + 1}_{plan.ordinal % 3 + 1}"
        # Most clips number their files with five digits, a few with four.
        digits = 4 if plan.index % 25 == 7 else 5
        emotion = {"others": "Other", "repression": "Other"}.get(plan.emotion, plan.emotion.capitalize())
        row: list[Cell] = [subject, name, plan.ordinal // 3 + 1, plan.onset, plan.apex, plan.offset, plan.num_frames]
        row += ["Micro - 1/2", _samm_aus(plan), emotion, _OBJECTIVE_CLASSES.get(plan.emotion, 7), None]
        placed.append(_Placed(plan, f"SAMM/{subject}/{name}", f"{subject}_{{:0{digits}d}}.jpg", row))
    header: list[Cell] = ["Subject", "Filename", "Inducement Code", "Onset Frame", "Apex Frame", "Offset Frame"]
    header += ["Duration", "Micro", "Action Units", "Estimated Emotion", "Objective Classes", "Notes"]
    # The table's header stands on Excel's row 14.
    above: list[list[Cell]] = [[None], ["SAMM layout"], [_NOTICE], [None], ["Letters A to E: intensity"]]
    above += [[None], ["L and R: one side of the face"]]
    above += [[None]] * (13 - len(above))
    return _Layout("SAMM_Micro_FACS_Codes_v2.xlsx", "MICRO ONLY", above, header, placed)


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


def _fourd(spec: SyntheticSpec, clips: list[ClipPlan]) -> _Layout:
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
        placed.append(_Placed(plan, f"gray_micro/{subject}/{name}", "{:04d}.png", row))
    header: list[Cell] = ["sub_ID", "fold_name", "Onset", "Apex", "Offset", "Emotion", "AUs"]
    header += [f"AU{au}" for au in _FOURD_AUS]
    header += ["fold", "eye blink", *_FOURD_CATEGORIES, "Total"]
    return _Layout("4DME_Labelling_Micro_release v1.xlsx", "Sheet1", [], header, placed)


def _fourd_aus(plan: ClipPlan) -> str:
    """Spell the AUs with the prefix on the first token only, the side letter after it and `(k)` for static ones."""
    tokens = [f"{_SIDE_LETTERS[m.side]}{m.au}{'(k)' if m.static else ''}" for m in plan.movements]
    return "AU" + "+".join(tokens)


def _fourd_emotions(plan: ClipPlan) -> list[str]:
    """Translate to the corpus's categories; a few clips bear two, as in `Negative+Repression`."""
    first = _FOURD_EMOTIONS.get(plan.emotion, "Negative")
    second = {"Negative": "Repression", "Surprise": "Positive"}.get(first)
    return [first, second] if second and plan.ordinal % 3 == 1 else [first]


def _write_frames(spec: SyntheticSpec, layout: _Layout, root: Path) -> None:
    subject: Subject | None = None
    previous = -1
    for clip in layout.clips:
        if subject is None or clip.plan.subject != previous:
            subject, previous = Subject(spec, clip.plan.subject), clip.plan.subject
        folder = root / clip.folder
        folder.mkdir(parents=True)
        for number, frame in enumerate(subject.render(clip.plan), start=clip.plan.onset - spec.context_frames):
            _write_frame(frame, folder / clip.file_name.format(number), colour=spec.corpus == "casme2")


def _write_frame(frame: np.ndarray, path: Path, *, colour: bool) -> None:
    """Write one frame: CASME II in colour (a skin tint whose luma is the gray value), the others with one channel."""
    image = Image.fromarray(frame)
    if path.suffix == ".png":
        image.save(path, compress_level=1)
        return
    if colour:
        tint = Image.new("L", image.size)
        image = Image.merge("YCbCr", (image, tint.point(lambda _: 116), tint.point(lambda _: 142)))
    image.save(path, quality=95)


def _apply_damage(layout: _Layout, root: Path, damage: Collection[Damage]) -> None:
    for name in sorted(damage):
        clip = layout.clips[DAMAGES.index(name)]
        middle = root / clip.folder / clip.file_name.format((clip.plan.onset + clip.plan.offset) // 2)
        if name == "missing_frame":
            middle.unlink()
        elif name == "unreadable_frame":
            middle.write_bytes(middle.read_bytes()[:40])
        elif name == "missing_folder":
            shutil.rmtree(root / clip.folder)
        elif name == "unlabelled_folder":
            clip.row.clear()
        elif name == "bad_au_cell":
            clip.row[layout.column("AUs" if "AUs" in layout.header else "Action Units")] = "banana"
        else:
            onset, offset = (i for i, h in enumerate(layout.header) if str(h).startswith(("Onset", "Offset")))
            clip.row[onset], clip.row[offset] = clip.row[offset], clip.row[onset]


def _workbook_bytes(sheet: str, rows: list[list[Cell]]) -> bytes:
    """Build an xlsx whose bytes depend on its cells only: openpyxl puts the time of saving into it, taken out here."""
    workbook = openpyxl.Workbook()
    worksheet = workbook.active
    worksheet.title = sheet
    for row_number, row in enumerate(rows, start=1):
        for column_number, cell in enumerate(row, start=1):
            if cell is not None:
                worksheet.cell(row=row_number, column=column_number, value=cell)
    saved, fixed = io.BytesIO(), io.BytesIO()
    workbook.save(saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(fixed, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename == "docProps/core.xml":
                content = re.sub(rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", b"1980-01-01T00:00:00Z", content)
            target.writestr(zipfile.ZipInfo(entry.filename, _EPOCH), content, zipfile.ZIP_DEFLATED)
    return fixed.getvalue()
