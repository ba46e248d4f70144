"""Finds crops by name: ours, and those that other packages add as entry points of the group `aullm_dist.crops`."""

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points

from aullm_dist.data.crops.base import CentreSquare, Crop, WholeFrame
from aullm_dist.errors import UserError

ENTRY_POINTS = "aullm_dist.crops"
UNRECORDED = "unrecorded"
"""Stands for the crop of a dataset whose preparation left no report."""


def _no_argument(name: str, argument: str | None) -> None:
    if argument is not None:
        raise UserError(f"--crop {name}:{argument}: {name} takes no argument; write {name}")


def _whole(argument: str | None) -> Crop:
    _no_argument("none", argument)
    return WholeFrame()


def _centre(argument: str | None) -> Crop:
    _no_argument("center", argument)
    return CentreSquare()


def _cascade(argument: str | None) -> Crop:
    from aullm_dist.data.crops.cascade import CascadeCrop

    _no_argument("cascade", argument)
    return CascadeCrop()


def _mtcnn(argument: str | None) -> Crop:
    from aullm_dist.data.crops.mtcnn import MtcnnCrop

    _no_argument("mtcnn", argument)
    return MtcnnCrop()


def _boxes(argument: str | None) -> Crop:
    from aullm_dist.data.crops.tables import BoxCrop

    return BoxCrop(_file("boxes", argument))


def _landmarks(argument: str | None) -> Crop:
    from aullm_dist.data.crops.tables import LandmarkCrop

    return LandmarkCrop(_file("landmarks", argument))


def _file(name: str, argument: str | None) -> str:
    if not argument:
        raise UserError(f"--crop {name}: the file is missing; write {name}:FILE.csv")
    return argument


_FACTORIES: dict[str, Callable[[str | None], Crop]] = {
    "none": _whole,
    "center": _centre,
    "cascade": _cascade,
    "mtcnn": _mtcnn,
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
            f"--crop {text}: {plugin.value} cannot be loaded ({error}); fix or remove its package"
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
