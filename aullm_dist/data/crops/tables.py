"""Implements the crops `boxes` and `landmarks`: a CSV gives each clip's face, in pixels of the onset frame."""

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from aullm_dist.data.crops.base import Crop, NoRegion, Region
from aullm_dist.data.crops.eyes import region_around_eyes
from aullm_dist.data.sheets import cell_text, column_key
from aullm_dist.data.sheets.csvfile import decoded, variants
from aullm_dist.errors import UserError
from aullm_dist.files import read_regular, user_path

EVERY_CLIP = "*"
"""A row of this name counts for the clips that have no row of their own."""
_BOX = ("left", "top", "right", "bottom")
_EYES = ("eye1_x", "eye1_y", "eye2_x", "eye2_y")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One row: its line, its values, and what is wrong with it."""

    line: int
    values: Mapping[str, float]
    problem: str


class _TableCrop(Crop):
    columns: Sequence[str]

    def __init__(self, file: str) -> None:
        self.file = user_path(file)
        try:
            content = read_regular(self.file)
        except OSError as error:
            raise UserError(f"--crop {self.identity}:{file}: cannot be read ({error.strerror})") from error
        self._sha256 = hashlib.sha256(content).hexdigest()
        self._rows = _read(self.file, content, self.columns)

    @property
    def fingerprint(self) -> str:
        return f"{self.identity} {self._sha256}"

    def unused(self, clips: Collection[str]) -> list[str]:
        """Return the clips of the file's rows that are none of `clips`."""
        return [name for name in self._rows if name != EVERY_CLIP and name not in clips]

    def _row(self, clip: str) -> tuple[str, Mapping[str, float]]:
        for name in (clip, EVERY_CLIP):
            if name in self._rows:
                entry = self._rows[name]
                if entry.problem:
                    raise NoRegion(entry.problem)
                return f"{self.file} line {entry.line}", entry.values
        raise NoRegion(f"no row for this clip in {self.file}; allowed: one row per clip, or one of clip {EVERY_CLIP}")


class BoxCrop(_TableCrop):
    """Keeps the box of the row, squeezed to a square where it is none."""

    identity = "boxes"
    columns = _BOX

    def fit(self, onset: Image.Image, clip: str) -> Region:
        """Return the row's box; it must lie inside the frame."""
        where, row = self._row(clip)
        width, height = onset.size
        left, top, right, bottom = (row[name] for name in _BOX)
        if not (0 <= left < right <= width and 0 <= top < bottom <= height):
            raise NoRegion(
                f"{where}: box {left:g},{top:g},{right:g},{bottom:g} in a frame of {width}x{height} pixels; allowed: "
                f"0 <= left < right <= {width} and 0 <= top < bottom <= {height}"
            )
        return Region(left / width, top / height, right / width, bottom / height)


class LandmarkCrop(_TableCrop):
    """Turns the frame until the eyes are level, and keeps a square around them that holds forehead and chin."""

    identity = "landmarks"
    columns = _EYES

    def fit(self, onset: Image.Image, clip: str) -> Region:
        """Return the square; both eyes must lie inside the frame, apart from each other."""
        where, row = self._row(clip)
        width, height = onset.size
        (x1, y1), (x2, y2) = sorted([(row["eye1_x"], row["eye1_y"]), (row["eye2_x"], row["eye2_y"])])
        distance = math.hypot(x2 - x1, y2 - y1)
        if not all(0 <= x <= width and 0 <= y <= height for x, y in ((x1, y1), (x2, y2))) or distance < 1:
            raise NoRegion(
                f"{where}: eyes at ({x1:g}, {y1:g}) and ({x2:g}, {y2:g}); allowed: two places in a frame of "
                f"{width}x{height} pixels, one pixel or more apart"
            )
        return region_around_eyes((x1, y1), (x2, y2), onset.size)


def _read(file: Path, content: bytes, columns: Sequence[str]) -> dict[str, _Entry]:
    """Return the entry of each clip, by any common delimiter; other columns do not disturb.

    What is wrong with one clip's row is kept for that clip: a tool that found no face writes nan.
    """
    for variant in variants(file, decoded(file, content)):
        if not variant.sheet.rows:
            continue
        (_, head), *rows = variant.sheet.rows
        keys = [column_key(cell) for cell in head]
        if not {"clip", *columns} <= set(keys):
            continue
        if variant.problem:
            raise UserError(f"{file} {variant.problem}")
        twice = next((key for key in ("clip", *columns) if keys.count(key) > 1), None)
        if twice is not None:
            raise UserError(f"{file}: two columns are called {twice}; keep one of them")
        return _entries(file, keys, rows, columns)
    _, first = next(iter(next(iter(variants(file, decoded(file, content)))).sheet.rows), (0, []))
    keys = [column_key(cell) for cell in first]
    missing = next((name for name in ("clip", *columns) if name not in keys), "clip")
    raise UserError(
        f"{file}: column {missing} is missing; allowed: a CSV with the columns {','.join(('clip', *columns))}"
    )


def _entries(
    file: Path, keys: Sequence[str], rows: Sequence[tuple[int, list[object]]], columns: Sequence[str]
) -> dict[str, _Entry]:
    entries: dict[str, _Entry] = {}
    for line, cells in rows:
        where = f"{file} line {line}"
        named = {key: cell_text(cell) for key, cell in zip(keys, cells, strict=False) if key}
        clip = named.get("clip", "")
        if not clip:
            raise UserError(f"{where}: clip {clip!r}; allowed: a name, and one row for each")
        problem = f"{len(cells)} cells, the header has {len(keys)}" if len(cells) > len(keys) else ""
        values = {name: _number(named.get(name, "")) for name in columns}
        wrong = next((name for name in columns if not math.isfinite(values[name])), None)
        if wrong is not None:
            problem = problem or f"column {wrong}: {named.get(wrong, '')!r}; allowed: a number of pixels"
        if clip in entries:
            problem = f"clip {clip!r} has a row already, line {entries[clip].line}; allowed: one row for each"
        entries[clip] = _Entry(line, values, f"{where}, {problem}" if problem else "")
    return entries


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
