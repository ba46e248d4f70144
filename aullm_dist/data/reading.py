"""Reads clips that were not prepared (folders of frames, videos, arrays), cut by the code that prepares corpora.

Frames of a folder are called by the number in their names, as in the corpora; frames of a video and of an array count
from 0. What is found on the way and does not stop the reading (frames missing between others, pictures that are no
frames, times that are not even) is logged in a line.
"""

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from aullm_dist.data.clips import Clip
from aullm_dist.data.crops import Crop, NoRegion
from aullm_dist.data.decoding.videos import read_video, uneven_times
from aullm_dist.data.frames import Cutter
from aullm_dist.data.listing import FRAME_SUFFIXES, FrameFolder, gaps, list_folder, ranges
from aullm_dist.data.preparation.shards import MIN_FRAMES
from aullm_dist.errors import UserError, file_errors
from aullm_dist.files import user_path
from aullm_dist.log import get_logger

__all__ = ["clip_of_arrays", "read_clip"]

logger = get_logger(__name__)

_FEW = 4
"""Frames up to which a folder says nothing about how its numbers continue."""


class _Cut(NamedTuple):
    """A frame that was cut: its number, its pixels, and its time in milliseconds, of a video alone."""

    number: int
    pixels: np.ndarray
    milliseconds: float | None = None


def read_clip(
    path: str | Path,
    *,
    size: int,
    crop: Crop,
    onset: int | None = None,
    offset: int | None = None,
    only: Collection[int] | None = None,
) -> Clip:
    """Read a folder of frames or a video file.

    Args:
        path: the folder or file; as it is written here it is the clip's sample id, and its name in tables of boxes.
        size: height and width of the frames, in pixels.
        crop: fitted on the onset frame.
        onset: number of the first frame, None for the first that there is.
        offset: number of the last frame, inclusive; None for the last that there is.
        only: keeps the frames of these numbers alone; None keeps all from onset to offset.

    Raises:
        UserError: there is no such input, it cannot be read, it has less than two frames or none at onset or offset,
            frames differ in size, or the crop finds nothing.
    """
    if onset is not None and offset is not None and onset >= offset:
        raise UserError(f"{path}: onset {onset}, offset {offset}; allowed: an onset before the offset")
    name, path = str(path), user_path(path)
    cutter = Cutter(size, crop, name)
    with file_errors(name):
        if not path.exists():
            raise UserError(f"{name}: does not exist; give a folder of frames, a video file or a prepared dataset")
        read = _of_folder(path, cutter, onset, offset) if path.is_dir() else _of_video(path, cutter, onset, offset)
        return _clip(name, read, onset, offset, only)


def clip_of_arrays(
    frames: np.ndarray | Sequence[np.ndarray],
    *,
    size: int,
    crop: Crop,
    onset: int | None = None,
    offset: int | None = None,
    name: str = "frames",
) -> Clip:
    """Cut frames that are in memory.

    Args:
        frames: gray `[T, H, W]` or RGB `[T, H, W, 3]`, uint8 or floats in 0..1, which are rounded to 8 bits.
        size, crop, onset, offset: as in `read_clip`; frames count from 0.
        name: the clip's sample id, and its name in tables of boxes.

    Raises:
        UserError: another shape, type or range, or as in `read_clip`.
    """
    stack = frames if isinstance(frames, np.ndarray) else _stacked(frames)
    if stack.ndim not in (3, 4) or (stack.ndim == 4 and stack.shape[3] != 3) or 0 in stack.shape[1:]:
        raise UserError(f"{name}: shape {list(stack.shape)}; allowed: gray [T, H, W] or RGB [T, H, W, 3]")
    if onset is not None and offset is not None and onset >= offset:
        raise UserError(f"{name}: onset {onset}, offset {offset}; allowed: an onset before the offset")
    cutter = Cutter(size, crop, name)

    def read() -> Iterator[_Cut]:
        last = len(stack) - 1
        _check_span(name, onset, offset, 0, last)
        for number in range(onset or 0, (last if offset is None else offset) + 1):
            yield _Cut(number, cutter.cut_image(Image.fromarray(_as_bytes(stack[number], name)), f"{name}[{number}]"))

    return _clip(name, read(), onset, offset, None)


def _clip(
    name: str,
    read: Iterator[_Cut],
    onset: int | None,
    offset: int | None,
    only: Collection[int] | None,
) -> Clip:
    numbers, frames, times = [], [], []
    count = 0
    try:
        for number, frame, milliseconds in read:
            count += 1
            if milliseconds is not None:
                times.append(milliseconds)
            if only is None or number in only:
                numbers.append(number)
                frames.append(frame)
    except NoRegion as error:
        raise NoRegion(f"{name}: {error}") from error
    if count < MIN_FRAMES:
        span = "" if onset is None and offset is None else " from onset to offset"
        raise UserError(f"{name}: {count} frame{'s' * (count != 1)}{span}; allowed: {MIN_FRAMES} or more")
    uneven = uneven_times(name, np.array(times)) if only is None else None
    return Clip(name, np.stack(frames), np.array(numbers, dtype=np.int64), times=uneven)


def _of_folder(folder: Path, cutter: Cutter, onset: int | None, offset: int | None) -> Iterator[_Cut]:
    listed = list_folder(folder)
    if not listed.frames:
        raise _no_frames(listed)
    numbers = list(listed.frames)
    _check_span(str(folder), onset, offset, numbers[0], numbers[-1])
    within = [
        number for number in numbers if (onset is None or onset <= number) and (offset is None or number <= offset)
    ]
    _tell_of_gaps(folder, within, chosen=onset is not None and offset is not None)
    if left := listed.left_out():
        logger.warning("%s: %s", folder, left)
    for number in within:
        yield _Cut(number, cutter.cut_file(listed.frames[number]))


def _no_frames(listed: FrameFolder) -> UserError:
    folder = listed.folder
    found = listed.instead()
    inside = next((path for path in sorted(folder.iterdir()) if path.is_dir() and list_folder(path).frames), None)
    hint = f"; {found}" if found else ""
    if inside:
        hint = f"; its folder {inside.name} has some: give the folders of clips"
    return UserError(f"{folder}: no frames in it; allowed: numbered {', '.join(FRAME_SUFFIXES)} files{hint}")


def _tell_of_gaps(folder: Path, numbers: Sequence[int], *, chosen: bool) -> None:
    """Log which numbers are missing between others; a folder that may every so many frames says so by all its steps.

    Raises:
        UserError: One step is longer than all others together: a picture that is no frame of the clip, at its end or at
            its begin; not where onset and offset were `chosen`.
    """
    if len(numbers) <= 2:
        return
    steps = [after - before for before, after in zip(numbers, numbers[1:], strict=False)]
    usual = sorted(steps)[(len(steps) - 1) // 2]
    longest = max(steps)
    if not chosen and len(numbers) > _FEW and longest > usual and 2 * longest > numbers[-1] - numbers[0]:
        at = steps.index(longest)
        raise UserError(
            f"{folder}: no frame between {numbers[at]} and {numbers[at + 1]}, which is most of the clip; move away "
            f"what is no frame of it, or give --onset and --offset"
        )
    if longest > usual:
        missing = gaps(numbers, numbers[0], numbers[-1])
        if usual > 1:
            missing = [(a + 1, b - 1) for a, b in zip(numbers, numbers[1:], strict=False) if b - a > usual]
        logger.warning(
            "%s: frames %s are missing between %d and %d; the time that they took is kept", folder, ranges(missing),
            numbers[0], numbers[-1],
        )  # fmt: skip


def _of_video(file: Path, cutter: Cutter, onset: int | None, offset: int | None) -> Iterator[_Cut]:
    number = -1
    for number, milliseconds, image in read_video(file, offset):
        if onset is None or onset <= number:
            yield _Cut(number, cutter.cut_image(image, f"{file} frame {number}"), milliseconds)
    _check_span(str(file), onset, offset, 0, number)


def _check_span(name: str, onset: int | None, offset: int | None, first: int, last: int) -> None:
    for what, value in (("onset", onset), ("offset", offset)):
        if value is not None and not first <= value <= last:
            raise UserError(f"{name}: {what} {value} lies outside of the clip; allowed: its frames {first}..{last}")


def _stacked(frames: Sequence[np.ndarray]) -> np.ndarray:
    shapes = [np.asarray(frame).shape for frame in frames]
    if len(set(shapes)) > 1:
        other = next(number for number, shape in enumerate(shapes) if shape != shapes[0])
        raise UserError(f"frames[{other}]: shape {list(shapes[other])} in a clip of {list(shapes[0])}")
    return np.stack(frames) if shapes else np.zeros((0, 1, 1), np.uint8)


def _as_bytes(frame: np.ndarray, name: str) -> np.ndarray:
    if frame.dtype == np.uint8:
        return np.ascontiguousarray(frame)
    if not np.issubdtype(frame.dtype, np.floating):
        raise UserError(f"{name}: type {frame.dtype}; allowed: uint8, or floats in 0..1")
    if not (np.isfinite(frame).all() and frame.min() >= 0 and frame.max() <= 1):
        raise UserError(f"{name}: floats outside of 0..1; divide by the largest gray level")
    return np.rint(frame * 255).astype(np.uint8)
