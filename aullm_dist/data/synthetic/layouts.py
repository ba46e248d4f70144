"""Writes a synthetic corpus to disk as the real one lays itself out (its module in
`aullm_dist.data.corpora`): folders, frames, workbook, damage.

A generator for tests and demos: no claim about real faces is made from it. The layouts follow the public loaders of the
corpora; no file of a real corpus was opened for it. Equal specs give equal bytes, workbook included.
"""

import io
import json
import re
import shutil
import zipfile
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
from PIL import Image

from aullm_dist.data.corpora import Columns
from aullm_dist.data.corpora.drawn import NOTICE, Cell, Layout
from aullm_dist.data.records import SPEC_FILE
from aullm_dist.data.sheets import column_key
from aullm_dist.data.synthetic.faces import Subject
from aullm_dist.data.synthetic.labels import plan_clips
from aullm_dist.data.synthetic.spec import DAMAGES, Damage, SyntheticSpec
from aullm_dist.errors import UserError

_EPOCH = (1980, 1, 1, 0, 0, 0)


def write_corpus(spec: SyntheticSpec, root: str | Path, *, damage: Collection[Damage] = ()) -> Path:
    """Write the corpus below `root`, whole or not at all.

    A root that already holds this very corpus is left as it is. Each damage hits one clip of its own, counted in
    workbook order: `missing_frame` the first (its middle frame is not there), `unreadable_frame` the second (its middle
    frame is cut short), `missing_folder` the third, `unlabelled_folder` the fourth (its row is not there),
    `bad_au_cell` the fifth (`banana`), `onset_after_offset` the sixth, `contradicting_row` the seventh (it has a second
    row with another AU cell), `other_case` the eighth (its folder's name is written in another case).

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
    stamp = json.dumps({"notice": NOTICE, "spec": asdict(spec), "damage": sorted(damage)}, indent=2) + "\n"
    if root.is_file() or (root.is_dir() and any(root.iterdir())):
        if (root / SPEC_FILE).is_file() and (root / SPEC_FILE).read_text(encoding="utf-8") == stamp:
            return root
        raise UserError(f"{root}: is not empty and does not hold this synthetic corpus; give a new or empty folder")
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    layout = spec.facts.layout(clips, spec.context_frames)
    _write_frames(spec, layout, partial)
    _apply_damage(layout, spec.corpus_spec.columns, partial, damage)
    rows = [*layout.rows_above, layout.header]
    rows += [row for clip in layout.clips for row in (clip.row, clip.again) if row]
    (partial / layout.workbook).write_bytes(_workbook_bytes(layout.sheet, rows))
    (partial / SPEC_FILE).write_text(stamp, encoding="utf-8")
    if root.is_dir():
        root.rmdir()
    partial.replace(root)
    return root


def _write_frames(spec: SyntheticSpec, layout: Layout, root: Path) -> None:
    subject: Subject | None = None
    previous = -1
    for clip in layout.clips:
        if subject is None or clip.plan.subject != previous:
            subject, previous = Subject(spec, clip.plan.subject), clip.plan.subject
        folder = root / clip.folder
        folder.mkdir(parents=True, exist_ok=True)
        for number, frame in enumerate(subject.render(clip.plan), start=clip.plan.onset - spec.context_frames):
            if number not in clip.dropped:
                _write_frame(frame, folder / clip.file_name.format(number), colour=spec.facts.colour)
        if clip.depth_folder:
            beside = root / clip.depth_folder
            beside.mkdir(parents=True, exist_ok=True)
            _write_frame(frame, beside / f"{clip.plan.onset}.png", colour=False)


def _write_frame(frame: np.ndarray, path: Path, *, colour: bool) -> None:
    """Write one frame: in colour (a skin tint whose luma is the gray value) or with one channel."""
    image = Image.fromarray(frame)
    if path.suffix == ".png":
        image.save(path, compress_level=1)
        return
    if colour:
        tint = Image.new("L", image.size)
        image = Image.merge("YCbCr", (image, tint.point(lambda _: 116), tint.point(lambda _: 142)))
    image.save(path, quality=95)


def _column(layout: Layout, names: str | tuple[str, ...]) -> int:
    """Return the index of the column that is called by one of `names`."""
    keys = {column_key(name) for name in ((names,) if isinstance(names, str) else names)}
    return next(i for i, name in enumerate(layout.header) if isinstance(name, str) and column_key(name) in keys)


def _apply_damage(layout: Layout, columns: Columns, root: Path, damage: Collection[Damage]) -> None:
    au_column = _column(layout, columns.aus)
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
            clip.row[au_column] = "banana"
        elif name == "contradicting_row":
            # Empty cells below the table's own would be skipped: the row goes to the end of its clip's.
            clip.again.extend(clip.row)
            clip.again[au_column] = "1+2+4+5"
        elif name == "other_case":
            folder = root / clip.folder
            folder.rename(folder.with_name(folder.name.swapcase()))
        else:
            onset, offset = _column(layout, columns.onset), _column(layout, columns.offset)
            clip.row[onset], clip.row[offset] = clip.row[offset], clip.row[onset]


def _workbook_bytes(sheet: str, rows: list[list[Cell]]) -> bytes:
    """Build an xlsx whose bytes depend on its cells only: openpyxl puts the time of saving into it, taken out here."""
    workbook = openpyxl.Workbook()
    worksheet: Any = workbook.active
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
