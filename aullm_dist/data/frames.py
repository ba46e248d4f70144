"""Turns pictures into gray clips: decodes, cuts and resizes with Pillow, alike for every frame of a clip.

Every way into the model passes through `Cutter`: frame files of a corpus, of a folder, frames of a video, and arrays.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from aullm_dist.data.crops import Crop, NoRegion, Region
from aullm_dist.data.decoding.pictures import UnreadableFrame, gray_of, read_picture, refuse_depth
from aullm_dist.errors import UserError

__all__ = ["Cutter", "UnreadableFrame", "load_clip"]

# What a crop of another package may raise over a damaged picture, which it decodes first.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


class Cutter:
    """Turns the frames of one clip into gray squares; the region is decided on the first of them.

    Args:
        size: height and width of the output, in pixels.
        crop: fitted once, on the first frame.
        clip: sample id or name of the input, for the crop and for messages.
    """

    def __init__(self, size: int, crop: Crop, clip: str) -> None:
        self.size, self.crop, self.clip = size, crop, clip
        self._region: Region | None = None
        self._frame_size: tuple[int, int] | None = None

    def cut_file(self, file: Path) -> np.ndarray:
        """Return a frame file as gray `[size, size]` uint8 (ITU-R 601 luma), resized with antialiasing.

        Raises:
            UnreadableFrame: the file is damaged, no 8-bit image, or of another size than the clip's first frame.
            NoRegion: it is the first frame, and the crop finds nothing in it.
        """
        where = str(file)
        picture = read_picture(file)
        if self._region is None:
            self._fit(picture.upright(), where)
        region = self._fitted
        self._check_size(picture.size, where)
        width, height = region.right - region.left, region.bottom - region.top
        # At least twice the target remains.
        at_least = (math.ceil(2 * self.size / width), math.ceil(2 * self.size / height))
        return _cut(picture.gray(at_least), region, self.size)

    def cut_image(self, image: Image.Image, where: str) -> np.ndarray:
        """Return a decoded frame as `cut_file` does; `where` names it in messages.

        Raises:
            UnreadableFrame, NoRegion: as `cut_file` does.
        """
        refuse_depth(image, where)
        if self._region is None:
            self._fit(image, where)
        self._check_size(image.size, where)
        return _cut(gray_of(image, where), self._fitted, self.size)

    @property
    def _fitted(self) -> Region:
        assert self._region is not None, "fitted on the first frame"
        return self._region

    def _fit(self, image: Image.Image, where: str) -> None:
        size = image.size
        try:
            region = self.crop.fit(image, self.clip)
        except UserError:
            raise
        except _DECODING_ERRORS as error:
            reason = " ".join(str(error).replace(where, "the file").split())
            raise UnreadableFrame(f"{where}: cannot be read as an image ({reason})") from error
        edges = (region.left, region.top, region.right, region.bottom, region.angle)
        if not (all(map(math.isfinite, edges)) and region.left < region.right and region.top < region.bottom):
            raise NoRegion(f"crop {self.crop.identity} gave no region of a frame: {region}")
        self._region, self._frame_size = region, size

    def _check_size(self, size: tuple[int, int], where: str) -> None:
        if self._frame_size is not None and size != self._frame_size:
            raise UnreadableFrame(f"{where}: {_by(size)} pixels in a clip of {_by(self._frame_size)}")


def load_clip(files: Sequence[Path], *, size: int, crop: Crop, clip: str) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Load the readable frames of a clip.

    Args:
        files: The clip's frames in order.
        size: Height and width of the output, in pixels.
        crop: Fitted once, on the first readable frame.
        clip: Sample id.

    Returns:
        Frames `[T, size, size]` uint8, and the position in `files` and the reason of each frame that could not be read.

    Raises:
        NoRegion: The crop finds nothing to keep.
    """
    cutter = Cutter(size, crop, clip)
    frames, failures = [], []
    for position, file in enumerate(files):
        try:
            frames.append(cutter.cut_file(file))
        except UnreadableFrame as error:
            failures.append((position, str(error)))
    stack = np.stack(frames) if frames else np.zeros((0, size, size), np.uint8)
    return stack, failures


def _cut(image: Image.Image, region: Region, size: int) -> np.ndarray:
    width, height = image.size
    box = [region.left * width, region.top * height, region.right * width, region.bottom * height]
    if region.angle or min(box) < 0 or box[2] > width or box[3] > height:
        image, box = _turned(image, box, region.angle)
        width, height = image.size
    # Rounding must not carry an edge that lies on the frame's out of it.
    pixels = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], width), min(box[3], height))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=pixels), dtype=np.uint8)


def _turned(image: Image.Image, box: Sequence[float], angle: float) -> tuple[Image.Image, list[float]]:
    """Return the image turned about the box's centre, with its border repeated as far as needed, and the box in it."""
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    across, down = (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
    if angle:
        across = down = math.hypot(across, down)
    reach = (centre[0] - across, centre[1] - down, centre[0] + across, centre[1] + down)
    width, height = image.size
    before = [max(0, math.ceil(-value)) for value in reach[:2]]
    after = [max(0, math.ceil(value - limit)) for value, limit in zip(reach[2:], (width, height), strict=True)]
    padding = ((before[1], after[1]), (before[0], after[0]))
    image = Image.fromarray(np.pad(np.asarray(image), padding, mode="edge"))
    shift = (before[0], before[1], before[0], before[1])
    if angle:
        image = image.rotate(angle, Image.Resampling.BICUBIC, center=(centre[0] + before[0], centre[1] + before[1]))
    return image, [value + by for value, by in zip(box, shift, strict=True)]


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
