"""Clips that nobody prepared: folders of frames, video files and arrays, cut by the code that prepares corpora.

Frames of a folder are called by the number in their names, as in the corpora; frames of a video and of an array count
from 0. Videos are decoded by OpenCV's FFmpeg, one frame in memory at a time.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aullm_dist.data.clips import Clip
from aullm_dist.data.corpora.layout import list_frames
from aullm_dist.data.crops import Crop, NoRegion
from aullm_dist.data.frames import Cutter
from aullm_dist.data.shards import MIN_FRAMES
from aullm_dist.data.tables import parquet_files
from aullm_dist.errors import UserError
from aullm_dist.log import get_logger

__all__ = ["clip_of_arrays", "is_dataset", "read_clip"]

logger = get_logger(__name__)


def is_dataset(path: Path) -> bool:
    """Whether a folder is a dataset that `aullm-dist prepare` wrote."""
    return (path / "dataset_info.json").is_file() or bool(parquet_files(path))


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
    name, path = str(path), Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{name}: does not exist; give a folder of frames, a video file or a prepared dataset")
    cutter = Cutter(size, crop, name)
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

    def read() -> Iterator[tuple[int, np.ndarray]]:
        last = len(stack) - 1
        _check_span(name, onset, offset, 0, last)
        for number in range(onset or 0, (last if offset is None else offset) + 1):
            yield number, cutter.cut_image(Image.fromarray(_as_bytes(stack[number], name)), f"{name}[{number}]")

    return _clip(name, read(), onset, offset, None)


def _clip(
    name: str,
    read: Iterator[tuple[int, np.ndarray]],
    onset: int | None,
    offset: int | None,
    only: Collection[int] | None,
) -> Clip:
    numbers, frames, count = [], [], 0
    try:
        for number, frame in read:
            count += 1
            if only is None or number in only:
                numbers.append(number)
                frames.append(frame)
    except NoRegion as error:
        raise NoRegion(f"{name}: {error}") from error
    if count < MIN_FRAMES:
        span = "" if onset is None and offset is None else " from onset to offset"
        raise UserError(f"{name}: {count} frame{'s' * (count != 1)}{span}; allowed: {MIN_FRAMES} or more")
    return Clip(name, np.stack(frames), np.array(numbers, dtype=np.int64))


def _of_folder(folder: Path, cutter: Cutter, onset: int | None, offset: int | None) -> Iterator[tuple[int, np.ndarray]]:
    files = list_frames(folder)
    if not files:
        inside = next((path for path in sorted(folder.iterdir()) if path.is_dir() and list_frames(path)), None)
        hint = f"; its folder {inside.name} has some: give the folders of clips" if inside else ""
        raise UserError(f"{folder}: no frames in it; allowed: numbered .jpg, .jpeg, .png or .bmp files{hint}")
    numbers = list(files)
    _check_span(str(folder), onset, offset, numbers[0], numbers[-1])
    for number, file in files.items():
        if (onset is None or onset <= number) and (offset is None or number <= offset):
            yield number, cutter.cut_file(file)


def _of_video(file: Path, cutter: Cutter, onset: int | None, offset: int | None) -> Iterator[tuple[int, np.ndarray]]:
    (video, told), number = _opened(file), -1
    try:
        while offset is None or number < offset:
            found, pixels = video.read()
            if not found:
                break
            number += 1
            if onset is None or onset <= number:
                image = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))
                yield number, cutter.cut_image(image, f"{file} frame {number}")
    finally:
        video.release()
    if number < 0:
        raise UserError(f"{file}: cannot be read as a video; give one that FFmpeg decodes, or a folder of its frames")
    _check_span(str(file), onset, offset, 0, number)
    if offset is None and number + 1 < told:
        logger.warning("%s: announces %d frames, but %d could be read", file, told, number + 1)


def _opened(file: Path) -> tuple[Any, int]:
    """Return OpenCV's reader of a video and how many frames the file says it has; what cannot be read has none."""
    # FFmpeg would write lines of its own about a damaged file; it looks at this when it is used first.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    import cv2

    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
    try:
        video = cv2.VideoCapture(str(file), cv2.CAP_FFMPEG)
    finally:
        cv2.utils.logging.setLogLevel(level)
    return video, int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0


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
