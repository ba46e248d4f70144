"""Sets the look of all figures: colours that colour-blind readers can distinguish, canvases that need no display.

Figures are made with `matplotlib.figure.Figure` and the Agg canvas. `pyplot` is never imported: it keeps every figure
alive in a global table, and looks for a display.
"""

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from aullm_dist.log import get_logger

logger = get_logger(__name__)

# Source: Okabe and Ito, "Color Universal Design" (2008).
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
)  # fmt: skip
PALETTE = (BLUE, ORANGE, GREEN, VERMILLION, PURPLE, SKY, YELLOW, BLACK)
"""Colours of lines and bars, in order; the first ones also differ in lightness."""
SEQUENTIAL, DIVERGING = "cividis", "PuOr"
"""Colour maps from none to much, and from negative through 0 to positive."""
EMPTY = "#E5E5E5"
"""What has no value."""

FONT_POINTS = 8.0
DOTS_PER_INCH = 100


@contextmanager
def missing_letters_told() -> Iterator[None]:
    """Say once, and in a line, that the font has no letters for a name; matplotlib warns of each in three lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    others = [warning for warning in caught if not str(warning.message).startswith("Glyph ")]
    for warning in others:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if len(others) < len(caught):
        _tell_of_missing_letters()


@functools.cache
def _tell_of_missing_letters() -> None:
    logger.warning("The font of the figures has no letters for some names; boxes stand in their place")


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, np.ndarray]:
    """Return a figure of `width` x `height` inches and its axes, an object array `[rows, columns]`."""
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def to_pixels(figure: Figure) -> np.ndarray:
    """Return a figure as `[H, W, 3]` uint8."""
    canvas = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def colour_bar(
    figure: Figure | SubFigure, image: AxesImage, ax: Axes | Sequence[Axes], label: str, *, below: bool = False
) -> None:
    """Say what the colours of an image mean, next to the axes that it belongs to or below them."""
    bar = figure.colorbar(image, ax=ax, location="bottom" if below else "right", shrink=0.8, pad=0.03, aspect=24)
    bar.set_label(label, fontsize=FONT_POINTS)
    bar.ax.tick_params(labelsize=FONT_POINTS - 1)
    bar.locator = MaxNLocator(4)
    bar.update_ticks()
    bar.outline.set_visible(False)


def bare(ax: Axes) -> None:
    """Take ticks and frame off an axes that shows a picture."""
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)


def label_aus(ax: Axes, aus: Sequence[int], *, rows: bool, columns: bool) -> None:
    """Label the rows and columns of a heat map with AU numbers."""
    names = [str(au) for au in aus]
    if rows:
        ax.set_yticks(range(len(aus)), names, fontsize=FONT_POINTS)
    if columns:
        ax.set_xticks(range(len(aus)), names, fontsize=FONT_POINTS)
    ax.tick_params(length=0)
