"""Frame files to gray clips: decode, crop and resize with Pillow, the same transform for every frame of a clip.

The crop is decided once, on a clip's first frame: a crop found per frame would jitter by more than a micro-expression
moves.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from aullm_dist.errors import UserError

__all__ = ["CROPS", "Box", "CropFunction", "UnreadableFrame", "load_clip", "load_frame"]

Box = tuple[float, float, float, float]
"""Left, upper, right and lower edge in fractions of the frame's width and height."""

CropFunction = Callable[[Image.Image], Box]
"""Chooses the part of a clip that is kept from its first frame (gray, possibly decoded at reduced size)."""

_GRAY_READY = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


class UnreadableFrame(UserError):
    """A frame file that is damaged, is no 8-bit image, or has another size than its clip."""


def _whole(_: Image.Image) -> Box:
    return (0.0, 0.0, 1.0, 1.0)


def _centre_square(frame: Image.Image) -> Box:
    width, height = frame.size
    side = min(width, height)
    x, y = side / width / 2, side / height / 2
    return (0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y)


CROPS: dict[str, CropFunction] = {"none": _whole, "center": _centre_square}
"""Crop functions by the name used on the command line; a face detector joins by adding itself here."""


def load_clip(files: Sequence[Path], *, size: int, crop: CropFunction) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Load the readable frames of a clip.

    Args:
        files: The clip's frames in order.
        size: Height and width of the output, in pixels.
        crop: Called once, on the first readable frame.

    Returns:
        Frames `[T, size, size]` uint8, and the position in `files` and the reason of each frame that could not be read.
    """
    box: Box | None = None
    frame_size: tuple[int, int] | None = None
    frames, failures = [], []
    for position, file in enumerate(files):
        try:
            image, full_size = _open_gray(file, size)
            if frame_size is not None and full_size != frame_size:
                raise UnreadableFrame(f"{file}: {_by(full_size)} pixels in a clip of {_by(frame_size)}")
        except UnreadableFrame as error:
            failures.append((position, str(error)))
            continue
        if box is None:
            box, frame_size = crop(image), full_size
        frames.append(_cut(image, box, size))
    stack = np.stack(frames) if frames else np.zeros((0, size, size), np.uint8)
    return stack, failures


def load_frame(file: Path, *, size: int, box: Box = (0.0, 0.0, 1.0, 1.0)) -> np.ndarray:
    """Load one frame as gray `[size, size]` uint8 (ITU-R 601 luma), cut to `box` and resized with antialiasing.

    Raises:
        UnreadableFrame: The file is damaged or no 8-bit image.
    """
    image, _ = _open_gray(file, size)
    return _cut(image, box, size)


def _open_gray(file: Path, size: int) -> tuple[Image.Image, tuple[int, int]]:
    """Decode a frame to mode "L"; returns it with the file's own (width, height)."""
    try:
        with Image.open(file) as image:
            full_size = image.size
            if image.format == "JPEG":
                # Lets the JPEG decoder skip chroma and scale down by 2, 4 or 8 while at least twice the target remains.
                image.draft("L", (2 * size, 2 * size))
            if image.mode not in _GRAY_READY:
                raise UnreadableFrame(f"{file}: pixel mode {image.mode}; allowed: 8-bit gray or colour")
            return image.convert("L"), full_size
    except UnreadableFrame:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).replace(str(file), "the file").split())
        raise UnreadableFrame(f"{file}: cannot be read as an image ({reason})") from error


def _cut(image: Image.Image, box: Box, size: int) -> np.ndarray:
    width, height = image.size
    pixels = (box[0] * width, box[1] * height, min(box[2] * width, width), min(box[3] * height, height))
    return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=pixels), dtype=np.uint8)


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
