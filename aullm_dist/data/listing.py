"""Lists the frame files of a clip's folder: numbered by the last digits of their names, and all called alike.

A picture that is called otherwise than the rest (a thumbnail, a screenshot, a copy) is no frame, however well its
number would fit: it is left out and named.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aullm_dist.errors import UserError

__all__ = ["FRAME_SUFFIXES", "FrameFolder", "gaps", "list_folder", "list_frames", "ranges", "spans_of"]

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
_OTHER_PICTURES = {
    ".tif", ".tiff", ".gif", ".webp", ".jp2", ".jfif", ".pgm", ".ppm", ".pnm", ".heic", ".heif", ".avif", ".dng",
    ".tga",
}  # fmt: skip
_DIGITS = re.compile(r"[0-9]+")
_MOST_DIGITS = 18
"""Of a frame's number; one digit more and it would not fit into 64 bits."""
_LISTED = 3


@dataclass(frozen=True, slots=True)
class FrameFolder:
    """What lies in a folder of frames.

    Attributes:
        frames: Files by frame number, ascending.
        left: Names of pictures that are no frames: without a number, or called otherwise than the frames.
        others: Pictures of formats that are not read, by the ending of their names.
    """

    folder: Path
    frames: dict[int, Path]
    left: tuple[str, ...]
    others: dict[str, int]

    def left_out(self) -> str:
        """Name the pictures that are not read; empty where there are none."""
        found = []
        if self.left:
            more = ", ..." if len(self.left) > _LISTED else ""
            names = ", ".join(self.left[:_LISTED])
            found.append(f"{len(self.left)} not called as the frames are ({names}{more})")
        found += [f"{count} {ending}" for ending, count in sorted(self.others.items())]
        return f"pictures not read: {'; '.join(found)}" if found else ""

    def instead(self) -> str:
        """Say what the folder holds besides frames, for who looked for frames here and found none."""
        if self.frames:
            return f"the folder holds frames {ranges(spans_of(self.frames))}"
        if self.left or self.others:
            return f"the folder holds {self.left_out()}; allowed: numbered {', '.join(FRAME_SUFFIXES)} files"
        for path in sorted(self.folder.iterdir()):
            if path.is_dir() and (inside := list_folder(path).frames):
                return f"its folder {path.name} holds frames {ranges(spans_of(inside))}"
        return ""


def list_folder(folder: Path) -> FrameFolder:
    """List the frames of a folder.

    The number is the last run of digits in the file's stem, as an integer: paddings differ inside one corpus.

    Raises:
        UserError: Two files have the same number, frames are called in several ways, a number is too long, or the
            folder cannot be listed.
    """
    numbered: list[Path] = []
    left: list[str] = []
    others: Counter[str] = Counter()
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error
    for path in paths:
        ending = path.suffix.lower()
        if path.name.startswith("."):
            continue
        if ending in FRAME_SUFFIXES and _DIGITS.search(path.stem):
            numbered.append(path)
        elif ending in FRAME_SUFFIXES:
            left.append(path.name)
        elif ending in _OTHER_PICTURES:
            others[ending] += 1
    usual = _usual_form(folder, numbered)
    frames: dict[int, Path] = {}
    for path in numbered:
        if _form(path) != usual:
            left.append(path.name)
            continue
        number = _number(path)
        if number in frames:
            raise UserError(
                f"{folder}: {frames[number].name} and {path.name} are both frame {number}; allowed: one file each"
            )
        frames[number] = path
    return FrameFolder(folder, dict(sorted(frames.items())), tuple(sorted(left)), dict(others))


def list_frames(folder: Path) -> dict[int, Path]:
    """Map frame numbers to files, ascending; see `list_folder`."""
    return list_folder(folder).frames


def _usual_form(folder: Path, numbered: Sequence[Path]) -> str:
    """Return the form of more than half of the names."""
    if not numbered:
        return ""
    forms = Counter(map(_form, numbered))
    form, count = forms.most_common(1)[0]
    if 2 * count <= len(numbered):
        first = {_form(path): path.name for path in reversed(numbered)}
        names = ", ".join(first[each] for each, _ in forms.most_common(_LISTED))
        raise UserError(f"{folder}: pictures are called in {len(forms)} ways ({names}); allowed: frames called alike")
    return form


def _form(path: Path) -> str:
    """Return a name without its numbers; two of one form differ in nothing else."""
    ending = path.suffix.casefold()
    return _DIGITS.sub("#", path.stem).casefold() + (".jpg" if ending == ".jpeg" else ending)


def _number(path: Path) -> int:
    digits = _DIGITS.findall(path.stem)[-1]
    if len(digits.lstrip("0")) > _MOST_DIGITS:
        raise UserError(f"{path}: a number of {len(digits)} digits; allowed: frame numbers of up to {_MOST_DIGITS}")
    return int(digits)


def gaps(numbers: Sequence[int], first: int, last: int) -> list[tuple[int, int]]:
    """Return the ranges, ends included, that ascending `numbers` leave out of first..last.

    The work is in the numbers that are there, not in how many are missing: a sheet may say 99999999.
    """
    found = []
    expected = first
    for number in numbers:
        if number > expected:
            found.append((expected, min(number - 1, last)))
        expected = max(expected, number + 1)
        if expected > last:
            break
    if expected <= last:
        found.append((expected, last))
    return found


def spans_of(frames: dict[int, Path]) -> list[tuple[int, int]]:
    """Return the ranges of numbers that are there."""
    found: list[tuple[int, int]] = []
    for number in frames:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def ranges(spans: Sequence[tuple[int, int]]) -> str:
    """Write ranges as `3, 5-9`, at most four of them."""
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in spans]
    return ", ".join(texts if len(texts) <= 4 else [*texts[:4], "..."])
