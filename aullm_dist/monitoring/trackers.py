"""Sends the scalars and pictures of a fold to trackers other than TensorBoard, through Accelerate's classes.

What TensorBoard alone can show (curves, histograms, the projector, texts) goes into its event files only.
"""

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from aullm_dist.errors import UserError
from aullm_dist.library_errors import in_one_line, is_of_library
from aullm_dist.log import get_logger

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = get_logger(__name__)

PROJECT = "aullm-dist"
TENSORBOARD = "tensorboard"
_NAMES: Mapping[str, tuple[str, str | None]] = {
    "wandb": ("name", "group"), "mlflow": ("run_name", None), "swanlab": ("experiment_name", None),
}  # fmt: skip
"""Options that name the fold and its run within the project; the others take the name of the project alone."""


class Tracker:
    """A fold's run at another tracker; what goes wrong in its library is a warning, and the training continues.

    Args:
        name: as in `monitor.trackers`.
        run: the run folder.
        fold: name of the fold.
        settings: of the run, flat.

    Raises:
        UserError: see `tracker_class`.
    """

    def __init__(self, name: str, run: Path, fold: str, settings: Mapping[str, Any]) -> None:
        self.name = name
        self._tracker: Any = None
        self._told_of_pictures = False
        kind = tracker_class(name)
        called, group = _NAMES.get(name, (None, None))
        project = PROJECT if called else f"{PROJECT}-{run.name}-{fold}"
        options = {called: f"{run.name}/{fold}"} if called else {}
        options |= {group: run.name} if group else {}
        options |= {"logging_dir": str(run)} if kind.requires_logging_directory else {}
        # Accelerate asks for the main process of the job, which that of a team of folds need not be.
        here: Any = type(kind.__name__, (kind,), {"main_process_only": False})
        with _Surviving(self):
            tracker = here(project, **options)
            tracker.start()
            tracker.store_init_configuration(dict(settings))
            self._tracker = tracker

    @property
    def works(self) -> bool:
        """Whether what is logged still has a chance to arrive."""
        return self._tracker is not None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars by tag."""
        if self.works:
            with _Surviving(self):
                self._tracker.log(dict(values), step=step)

    def picture(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Log a picture, `[H, W, 3]` uint8, where the tracker takes any."""
        if not self.works:
            return
        with _Surviving(self):
            if hasattr(self._tracker, "log_images"):
                # Aim takes the picture itself, the others a list of them.
                self._tracker.log_images({name: pixels if self.name == "aim" else [pixels]}, step=step)
            elif hasattr(self._tracker, "log_figure"):
                self._tracker.log_figure(_figure(pixels), f"{name}/step-{step:08d}.png")
            elif not self._told_of_pictures:
                self._told_of_pictures = True
                logger.info("Tracker %s takes no pictures; TensorBoard has them", self.name)

    def finish(self) -> None:
        """End the tracker's run."""
        if self.works:
            with _Surviving(self):
                self._tracker.finish()
        self._tracker = None

    def give_up(self, error: BaseException) -> None:
        """Log no more, and say why."""
        self._tracker = None
        logger.warning("Tracker %s: %s; the run continues without it", self.name, in_one_line(error))


class _Surviving:
    """Give a tracker up where its library raises inside the block: nothing that it does may end a run of days."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def __enter__(self) -> None:
        """Enter the block."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        """Swallow what the libraries raise, the tracker's own exceptions among it."""
        if error is None:
            return False
        own = type(error).__module__.partition(".")[0] == self._tracker.name.partition(":")[0].partition(".")[0]
        if not (is_of_library(error) or (own and isinstance(error, Exception))):
            return False
        self._tracker.give_up(error)
        return True


def open_trackers(names: Sequence[str], run: Path, fold: str, settings: Mapping[str, Any]) -> list[Tracker]:
    """Begin a run at each tracker but TensorBoard, which `EventFile` writes."""
    return [Tracker(name, run, fold, settings) for name in names if name != TENSORBOARD]


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that cannot be used, before anything is loaded; every process calls it.

    Raises:
        UserError: see `tracker_class`.
    """
    for name in names:
        if name != TENSORBOARD:
            tracker_class(name)


def tracker_class(name: str) -> type[GeneralTracker]:
    """Return the class of one of Accelerate's trackers, or of `package.module:Class`.

    Raises:
        UserError: its library is not installed, or there is no such class.
    """
    module, colon, own = name.partition(":")
    if not colon:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"monitor.trackers: {name} is not installed; install it, or leave it out")
        built_in: type[GeneralTracker] = LOGGER_TYPE_TO_CLASS[name]
        return built_in
    try:
        found = getattr(importlib.import_module(module), own)
    except (ImportError, AttributeError) as error:
        raise UserError(f"monitor.trackers: {name} cannot be imported ({error})") from error
    if not (isinstance(found, type) and issubclass(found, GeneralTracker)):
        raise UserError(f"monitor.trackers: {name} is no accelerate.tracking.GeneralTracker")
    return found


def _figure(pixels: np.ndarray) -> "Figure":
    """Return a figure that shows a picture pixel by pixel."""
    from matplotlib.figure import Figure

    height, width = pixels.shape[:2]
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)
    figure.figimage(pixels)
    return figure
