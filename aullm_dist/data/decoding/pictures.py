"""Reads frame files as upright gray pictures, after checking what a file is and that it is whole."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import ExifTags, Image

from aullm_dist.data.decoding.jpeg import jpeg_damage, png_damage
from aullm_dist.errors import UserError
from aullm_dist.files import read_regular

__all__ = ["Picture", "UnreadableFrame", "gray_of", "read_picture", "refuse_depth"]

_FORMATS = ("JPEG", "PNG", "BMP")
_GRAY_READY = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError, Warning)
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation."""


class UnreadableFrame(UserError):
    """A frame that is damaged, is no 8-bit image, or has another size than its clip."""


class Picture:
    """A frame file that was read and checked, and is not decoded yet.

    Attributes:
        size: Width and height as a viewer shows it, in pixels.
    """

    def __init__(self, content: bytes, where: str) -> None:
        self._content, self._where = content, where
        with _decoding(where):
            self._image = Image.open(io.BytesIO(content), formats=_FORMATS)
            self._turn = _TURNS.get(self._image.getexif().get(ExifTags.Base.Orientation, 1))
        refuse_depth(self._image, where)
        pictures = getattr(self._image, "n_frames", 1)
        if pictures > 1 and self._image.format != "MPO":
            raise UnreadableFrame(f"{where}: holds {pictures} pictures; allowed: one")
        self._lies = self._turn is not None and self._turn not in (
            Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM,
        )  # fmt: skip
        self.size: tuple[int, int] = self._image.size[::-1] if self._lies else self._image.size

    def upright(self) -> Image.Image:
        """Return the picture in its own mode; decoded only where it has to be turned.

        Raises:
            UnreadableFrame: It has to be turned, and is damaged.
        """
        with _decoding(self._where):
            image = Image.open(io.BytesIO(self._content), formats=_FORMATS)
            return image if self._turn is None else image.transpose(self._turn)

    def gray(self, at_least: tuple[int, int]) -> Image.Image:
        """Return the upright picture in gray (ITU-R 601 luma).

        Args:
            at_least: Width and height down to which a JPEG may be reduced while it is decoded.

        Raises:
            UnreadableFrame: It is damaged, or not opaque.
        """
        image, content = self._image, self._content
        damage = jpeg_damage(content) if image.format in ("JPEG", "MPO") else ""
        damage = png_damage(content) if image.format == "PNG" else damage
        if damage:
            raise UnreadableFrame(f"{self._where}: cannot be read as an image ({damage})")
        if image.format in ("JPEG", "MPO"):
            # Lets the decoder skip chroma and scale down by 2, 4 or 8.
            image.draft("L", at_least[::-1] if self._lies else at_least)
        gray = gray_of(image, self._where)
        return gray if self._turn is None else gray.transpose(self._turn)


def read_picture(file: Path) -> Picture:
    """Read a frame file.

    Raises:
        UnreadableFrame: It cannot be read, is no JPEG, PNG or BMP picture, or has not 8 bits.
    """
    try:
        content = read_regular(file)
    except OSError as error:
        link = f": the link leads to {file.readlink()}, which is not there" if _is_broken(file) else ""
        raise UnreadableFrame(f"{file}: cannot be read as an image ({error.strerror}{link})") from error
    if not content:
        raise UnreadableFrame(f"{file}: cannot be read as an image (0 bytes)")
    return Picture(content, str(file))


def _is_broken(file: Path) -> bool:
    try:
        return file.is_symlink() and not file.exists()
    except OSError:
        return False


def gray_of(image: Image.Image, where: str) -> Image.Image:
    """Return an image in gray.

    Raises:
        UnreadableFrame: It is damaged, or has transparent pixels, which look as what lies behind them.
    """
    with _decoding(where):
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema() != (255, 255):
                raise UnreadableFrame(f"{where}: has transparent pixels; allowed: opaque pictures")
        return image.convert("L")


def refuse_depth(image: Image.Image, where: str) -> None:
    """Raise an `UnreadableFrame` for pixels of more than 8 bits."""
    if image.mode not in _GRAY_READY:
        raise UnreadableFrame(f"{where}: pixel mode {image.mode}; allowed: 8-bit gray or colour")


@contextmanager
def _decoding(where: str) -> Iterator[None]:
    """Turn what Pillow raises, and what it would warn of on stderr, into a line of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            yield
        except UserError:
            raise
        except Image.UnidentifiedImageError as error:
            raise UnreadableFrame(f"{where}: cannot be read as an image (no JPEG, PNG or BMP picture)") from error
        except _DECODING_ERRORS as error:
            reason = " ".join(str(error).replace(where, "the file").split())
            raise UnreadableFrame(f"{where}: cannot be read as an image ({reason})") from error
