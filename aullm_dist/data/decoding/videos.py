"""Reads videos frame by frame, with the time of each, by OpenCV's FFmpeg; one frame is in memory at a time."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from aullm_dist.data.decoding.containers import (
    CONTAINERS,
    HEAD,
    container_of,
    count_video_streams,
    kind_of_other,
    missing_bytes,
)
from aullm_dist.data.decoding.jpeg import jpeg_damage
from aullm_dist.errors import UserError
from aullm_dist.log import get_logger

__all__ = ["VideoFrame", "read_video", "uneven_times"]

logger = get_logger(__name__)

_SIDES = (16, 16384)
_JPEG = {"mjpg", "jpeg"}
_COMPRESSED = {
    *_JPEG, "fmp4", "mp4v", "xvid", "divx", "dx50", "h264", "avc1", "x264", "hevc", "hev1", "hvc1", "vp80", "vp90",
    "av01", "ffv1",
}  # fmt: skip
_MOST_OF = 0.9
"""Share of the announced time below which frames are lost, and not only counted in another way."""
_LOST = bytes(64)
"""A run of zeros that none of these codecs writes."""
_ROUNDING_MS = 1.01
"""Matroska, FLV and Ogg store times in whole milliseconds."""


class VideoFrame(NamedTuple):
    """A decoded frame: its place from 0, its time in milliseconds, and its picture in RGB."""

    number: int
    milliseconds: float
    image: Image.Image


def read_video(file: Path, last: int | None = None) -> Iterator[VideoFrame]:
    """Yield the frames of a video, up to the one at place `last`, turned as the file says they are to be shown.

    Raises:
        UserError: It is no video file, has not one video stream, or no frame of it can be decoded.
    """
    try:
        mode = file.stat().st_mode
        if not stat.S_ISREG(mode):
            raise UserError(f"{file}: is no regular file; give a folder of frames or a video file")
        with open(file, "rb") as opened:
            yield from _frames(file, opened, last)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error


def _frames(file: Path, opened: BinaryIO, last: int | None) -> Iterator[VideoFrame]:
    head = opened.read(HEAD)
    container = container_of(head)
    if container is None:
        raise UserError(
            f"{file}: cannot be read as a video: it is {kind_of_other(head)}; allowed: {CONTAINERS}, or a folder of "
            "frames"
        )
    streams = count_video_streams(opened, container)
    if streams > 1:
        raise UserError(f"{file}: has {streams} video streams; allowed: one")
    if missing := missing_bytes(opened, container):
        raise UserError(f"{file}: is {missing} bytes shorter than it says: it was cut short; copy it again")
    if damage := _damaged_packet(opened):
        raise UserError(f"{file}: {damage}; copy it again")
    (video, told), number = _opened(opened), -1
    rate = max(video.get(_rate()), 1e-3)
    time, step = 0.0, 0.0
    try:
        _check_size(file, video)
        while last is None or number < last:
            found, pixels = video.read()
            if not found:
                break
            number += 1
            image = Image.fromarray(np.ascontiguousarray(pixels[..., ::-1]))
            before, time = time, video.get(_position())
            step = max(step, time - before)
            yield VideoFrame(number, time, image)
    finally:
        video.release()
    if number < 0:
        raise UserError(f"{file}: cannot be read as a video; give one that FFmpeg decodes, or a folder of its frames")
    # The number is FFmpeg's estimate from the duration, and of uneven frames a wrong one: the time decides.
    end, duration = time + 1.5 * step, 1000 * told / rate
    if last is None and number + 1 < told and end < duration:
        if end < _MOST_OF * duration:
            raise UserError(
                f"{file}: announces {told} frames, but {number + 1} could be read; copy it again, or give --offset"
            )
        logger.warning("%s: announces %d frames, but %d could be read", file, told, number + 1)


def _damaged_packet(file: BinaryIO) -> str:
    """Return which coded frame shows that bytes of the file are lost; decoders draw something in their place."""
    import cv2

    video, _ = _opened(file)
    try:
        codec = int(video.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True).decode("latin-1").casefold()
        if not video.isOpened() or codec not in _COMPRESSED or not video.set(cv2.CAP_PROP_FORMAT, -1):
            return ""
        number = 0
        while (found := video.read())[0]:
            packet = found[1].tobytes()
            if codec in _JPEG and (why := jpeg_damage(packet)):
                return f"frame {number}: {why}"
            if (zeros := packet.find(_LOST)) >= 0:
                return f"frame {number}: bytes from byte {zeros} of it on are zero: a damaged copy"
            number += 1
    finally:
        video.release()
    return ""


def _position() -> int:
    import cv2

    return cv2.CAP_PROP_POS_MSEC


def _rate() -> int:
    import cv2

    return cv2.CAP_PROP_FPS


def _opened(file: BinaryIO) -> tuple[Any, int]:
    """Return OpenCV's reader of a video and how many frames the file says it has; what cannot be read has none.

    The file is given by its descriptor: FFmpeg takes a name with a colon for a protocol, one with % for a series of
    pictures, and OpenCV takes no name that is not UTF-8.
    """
    # FFmpeg would write lines of its own about a damaged file; it looks at this when it is used first.
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    import cv2

    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        video = cv2.VideoCapture(f"/dev/fd/{file.fileno()}", cv2.CAP_FFMPEG)
    finally:
        cv2.utils.logging.setLogLevel(level)
    return video, int(video.get(cv2.CAP_PROP_FRAME_COUNT)) if video.isOpened() else 0


def _check_size(file: Path, video: Any) -> None:
    import cv2

    if not video.isOpened():
        return
    sides = [int(video.get(each)) for each in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
    if not all(_SIDES[0] <= side <= _SIDES[1] for side in sides):
        raise UserError(
            f"{file}: frames of {sides[0]}x{sides[1]} pixels; allowed: {_SIDES[0]} to {_SIDES[1]} on each side"
        )


def uneven_times(name: str, milliseconds: np.ndarray) -> np.ndarray | None:
    """Return the times of frames `[T]` where they are not evenly spaced, in milliseconds; None where they are.

    Times that do not ascend say nothing, and that is reported; the frames then count as evenly spaced.
    """
    if len(milliseconds) < 3:
        return None
    steps = np.diff(milliseconds)
    if not (np.isfinite(steps).all() and (steps > 0).all()):
        logger.warning("%s: its frames bear no ascending times; they are taken as evenly spaced", name)
        return None
    even = np.linspace(milliseconds[0], milliseconds[-1], len(milliseconds))
    if np.abs(milliseconds - even).max() <= max(_ROUNDING_MS, 0.1 * float(np.median(steps))):
        return None
    logger.info("%s: frames are %.0f to %.0f ms apart; sampled by their times", name, steps.min(), steps.max())
    return milliseconds
