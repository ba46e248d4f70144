"""The crops `boxes` and `landmarks`: the user's CSV says where each clip's face is, in pixels of the onset frame."""

import csv
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from aullm_dist.data.crops import Crop, NoRegion, Region
from aullm_dist.errors import UserError

EVERY_CLIP = "*"
"""A row of this name counts for the clips that have no row of their own."""
_BOX = ("left", "top", "right", "bottom")
_EYES = ("eye1_x", "eye1_y", "eye2_x", "eye2_y")
_EYE_DISTANCE, _EYE_HEIGHT = 0.42, 0.38
"""Of the square's side (ours): from eye to eye, and from the square's top to the eyes. Forehead and chin are inside."""


class _TableCrop(Crop):
    columns: Sequence[str]

    def __init__(self, file: str) -> None:
        self.file = Path(file).expanduser()
        try:
            content = self.file.read_bytes()
        except OSError as error:
            raise UserError(f"--crop {self.identity}:{file}: cannot be read ({error.strerror})") from error
        self._sha256 = hashlib.sha256(content).hexdigest()
        self._rows = _read(self.file, content, ("clip", *self.columns))

    @property
    def fingerprint(self) -> str:
        return f"{self.identity} {self._sha256}"

    def _row(self, clip: str) -> tuple[str, Mapping[str, float]]:
        for name in (clip, EVERY_CLIP):
            if name in self._rows:
                line, values = self._rows[name]
                return f"{self.file} line {line}", values
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
        angle = math.atan2(y2 - y1, x2 - x1)
        side = distance / _EYE_DISTANCE
        below = (0.5 - _EYE_HEIGHT) * side
        # Down the face, which the turn makes straight down.
        x = (x1 + x2) / 2 - below * math.sin(angle)
        y = (y1 + y2) / 2 + below * math.cos(angle)
        half = side / 2
        return Region(
            (x - half) / width, (y - half) / height, (x + half) / width, (y + half) / height, math.degrees(angle)
        )


def _read(file: Path, content: bytes, columns: Sequence[str]) -> dict[str, tuple[int, dict[str, float]]]:
    """Return line number and values by clip; other columns do not disturb."""
    try:
        lines = content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error}); save it as a CSV in UTF-8") from error
    reader = csv.DictReader(lines)
    missing = [name for name in columns if name not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{file}: column {missing[0]} is missing; allowed: a CSV with the columns {','.join(columns)}")
    rows: dict[str, tuple[int, dict[str, float]]] = {}
    for row in reader:
        where = f"{file} line {reader.line_num}"
        clip = (row["clip"] or "").strip()
        if not clip or clip in rows:
            raise UserError(f"{where}: clip {clip!r}; allowed: a name, and one row for each")
        rows[clip] = reader.line_num, {name: _number(row[name], f"{where}, column {name}") for name in columns[1:]}
    return rows


def _number(text: str | None, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: {text!r}; allowed: a number of pixels")
    return value
