"""Which part of the frames is kept: crops by name, fitted once per clip on its onset frame.

A crop found anew in each frame would jitter by more than a micro-expression moves, so a crop sees the onset frame alone
and what it finds there is applied to every frame of the clip. Preparation and prediction take crops from here and from
nowhere else. A crop is written as `NAME` or `NAME:ARGUMENT`; other packages add theirs as entry points of the group
`aullm_dist.crops`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from PIL import Image

from aullm_dist.errors import UserError

__all__ = ["ENTRY_POINTS", "Crop", "NoRegion", "Region", "crop_for", "crop_names", "get_crop", "recorded_crop"]

ENTRY_POINTS = "aullm_dist.crops"
UNRECORDED = "unrecorded"
"""Stands for the crop of a dataset whose preparation left no report."""


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

    @abstractmethod
    def fit(self, onset: Image.Image, clip: str) -> Region:
        """Return the region of a clip.

        Args:
            onset: the clip's first frame at full size and in its own mode; not decoded before it is asked for.
            clip: sample id, or in a prediction the name of the input.

        Raises:
            NoRegion: with a line that says why, without the clip's name.
        """


class _Whole(Crop):
    identity = "none"

    def fit(self, onset: Image.Image, clip: str) -> Region:
        return Region()


class _CentreSquare(Crop):
    identity = "center"

    def fit(self, onset: Image.Image, clip: str) -> Region:
        width, height = onset.size
        side = min(width, height)
        x, y = side / width / 2, side / height / 2
        return Region(0.5 - x, 0.5 - y, 0.5 + x, 0.5 + y)


def _no_argument(name: str, argument: str | None) -> None:
    if argument is not None:
        raise UserError(f"--crop {name}:{argument}: {name} takes no argument; write {name}")


def _whole(argument: str | None) -> Crop:
    _no_argument("none", argument)
    return _Whole()


def _centre(argument: str | None) -> Crop:
    _no_argument("center", argument)
    return _CentreSquare()


def _cascade(argument: str | None) -> Crop:
    from aullm_dist.data.crop_cascade import CascadeCrop

    _no_argument("cascade", argument)
    return CascadeCrop()


def _boxes(argument: str | None) -> Crop:
    from aullm_dist.data.crop_tables import BoxCrop

    return BoxCrop(_file("boxes", argument))


def _landmarks(argument: str | None) -> Crop:
    from aullm_dist.data.crop_tables import LandmarkCrop

    return LandmarkCrop(_file("landmarks", argument))


def _file(name: str, argument: str | None) -> str:
    if not argument:
        raise UserError(f"--crop {name}: the file is missing; write {name}:FILE.csv")
    return argument


_FACTORIES: dict[str, Callable[[str | None], Crop]] = {
    "none": _whole,
    "center": _centre,
    "cascade": _cascade,
    "boxes": _boxes,
    "landmarks": _landmarks,
}


_NEED_A_FILE = ("boxes", "landmarks")


def crop_names() -> tuple[str, ...]:
    """Return the names that `--crop` takes, those of other packages last."""
    return (*_FACTORIES, *sorted(_plugins()))


def get_crop(text: str) -> Crop:
    """Return the crop that is written as `NAME` or `NAME:ARGUMENT`.

    Raises:
        UserError: there is no crop of this name, it cannot be loaded, or its argument is wrong.
    """
    name, colon, argument = text.partition(":")
    given = argument if colon else None
    if name in _FACTORIES:
        return _FACTORIES[name](given)
    plugins = _plugins()
    if name not in plugins:
        raise UserError(f"--crop {text}: allowed: {', '.join(crop_names())} (boxes and landmarks as NAME:FILE.csv)")
    plugin = plugins[name]
    try:
        factory = plugin.load()
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"--crop {text}: {plugin.value} cannot be loaded ({error}); mend or remove its package"
        ) from error
    crop = factory(given)
    if not isinstance(crop, Crop) or not isinstance(getattr(crop, "identity", None), str):
        raise UserError(f"--crop {text}: {plugin.value} returned no aullm_dist.data.crops.Crop with an identity")
    return crop


def _plugins() -> dict[str, EntryPoint]:
    """Return the crops of other packages; they cannot take the place of ours."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in _FACTORIES}


def recorded_crop(report: dict[str, object] | None) -> str:
    """Return the identity of the crop that a dataset was prepared with, from its report."""
    return UNRECORDED if report is None else str(report.get("crop", UNRECORDED))


def crop_for(trained: Sequence[str], wanted: str | Crop | None = None) -> Crop:
    """Return the crop to cut clips with for a model.

    Args:
        trained: identities of the crops of the clips that it was trained on; none where they are not known.
        wanted: the crop, or as `get_crop` reads it; None takes the model's, where it needs no file.

    Raises:
        UserError: the crop is not one of the model's, or has to be given and was not.
    """
    names = " or ".join(trained)
    if wanted is not None:
        crop = wanted if isinstance(wanted, Crop) else get_crop(wanted)
        if trained and crop.identity not in trained:
            raise UserError(f"crop {crop.identity}: the model was trained on clips cut with {names}; allowed: {names}")
        return crop
    if len(trained) == 1 and trained[0] in crop_names():
        if trained[0] in _NEED_A_FILE:
            raise UserError(f"the model was trained on clips cut with {names}; give --crop {names}:FILE.csv for these")
        return get_crop(trained[0])
    known = f"was trained on clips cut with {names}" if trained else "does not say how its clips were cut"
    raise UserError(f"the model {known}; say which crop these clips take with --crop, as in --crop center")
