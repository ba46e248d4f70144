"""Draws right and wrong answers of each AU, as counts and shares."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from aullm_dist.figures.style import FONT_POINTS, SEQUENTIAL

COLUMNS = ("active,\nfound", "active,\nmissed", "not active,\nfound", "not active,\nnot found")


def draw_confusion(ax: Axes, aus: Sequence[int], labels: np.ndarray, predicted: np.ndarray) -> AxesImage:
    """Draw one row per AU: counts of the four outcomes, coloured by their share of the clips with that label.

    Args:
        ax: axes to draw on.
        aus: AU numbers.
        labels: `[n, A]`, 0 or 1.
        predicted: `[n, A]`, bool.

    Returns:
        The heat map `[A, 4]`, for a colour bar; a share of no clips is 0.
    """
    truth, guess = np.asarray(labels) != 0, np.asarray(predicted, dtype=bool)
    counts = np.stack([(t & g).sum(axis=0) for t in (truth, ~truth) for g in (guess, ~guess)], axis=1)
    totals = np.repeat(np.stack([truth.sum(axis=0), (~truth).sum(axis=0)], axis=1), 2, axis=1)
    shares = np.divide(counts, totals, out=np.zeros(counts.shape), where=totals > 0)
    image = ax.imshow(shares, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if shares[row, column] < 0.5 else "black"
        ax.text(column, row, str(count), ha="center", va="center", fontsize=FONT_POINTS, color=colour)
    ax.set_yticks(range(len(aus)), [f"AU{au}" for au in aus], fontsize=FONT_POINTS)
    ax.set_xticks(range(4), COLUMNS, fontsize=FONT_POINTS - 1)
    ax.tick_params(length=0)
    return image
