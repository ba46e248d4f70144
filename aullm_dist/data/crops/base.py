"""Defines a crop: the region of a clip that is kept, chosen on its onset frame alone."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass

from PIL import Image

from aullm_dist.errors import UserError


class NoRegion(UserError):
    """A crop cannot tell which part of this clip to keep: there is no face, or no row for it."""


@dataclass(frozen=True, slots=True)
class Region:
    """The part of a frame that is kept.

    Attributes:
        left, top, right, bottom: edges in fractions of the frame's width and height; what lies outside of the frame
            repeats its nearest pixels.
        angle: degrees by which the frame is turned counter-clockwise about the region's centre before it is cut.
    """

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0
    angle: float = 0.0


class Crop(ABC):
    """Chooses the region of a clip.

    Attributes:
        identity: the crop's name with whatever settings change what it keeps. Datasets and checkpoints record it, and
            a model answers only clips that were cut by a crop of the same identity.
    """

    identity: str

    @property
    def fingerprint(self) -> str:
        """Everything that a preparation depends on; more than `identity` where a file says where the faces are."""
        return self.identity

    def unused(self, clips: Collection[str]) -> list[str]:
        """Return the clips that this crop knows of and that are none of `clips`: their names may be mistyped."""
        return []

    @abstractmethod
    def fit(self, onset: Image.Image, clip: str) -> Region:
        """Return the region of a clip.

        Args:
            onset: the clip's first frame at full size and in its own mode; not decoded before it is asked for.
            clip: sample id, or in a prediction the name of the input.

        Raises:
            NoRegion: with a line that says why, without the clip's name.
        """


class WholeFrame(Crop):
    """Keeps everything."""

    identity = "none"

    def fit(self, onset: Image.Image, clip: str) -> Region:
        """Return the whole frame."""
        return Region()


class CentreSquare(Crop):
    """Keeps the largest square about the centre."""

    identity = "center"

    def fit(self, onset: Image.Image, clip: str) -> Region:
        """Return the square, in fractions of the frame."""
        width, height = onset.size
        side = min(width, height)
        x, y = side / width / 2, side / height / 2
        return Region(0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y)
