"""Draws where on the face the evidence was: attention over texture cells, laid over a frame."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.image import AxesImage

from aullm_dist.figures.style import FONT_POINTS, SEQUENTIAL, bare

_FIRST_EDGE, _CELL_SIDE = 5.0, 6.0
"""Pixels of the clip: texture cells begin behind the margin that the convolutions of `model.visual` take."""


def draw_evidence(
    ax: Axes,
    frame: np.ndarray,
    weights: np.ndarray,
    grid: tuple[int, int, int],
    *,
    title: str | None = None,
    clip_size: int | None = None,
    limit: float | None = None,
    strength: float = 0.75,
) -> AxesImage:
    """Lay attention over a gray face frame; cells with little attention leave the face as it is.

    Args:
        ax: axes to draw on; they become bare.
        frame: `[H, W]` gray frame, floats in 0..1 or uint8.
        weights: attention over the cells, `[N]` or `[time, rows, columns]`, not negative; the times are added up, as
            the cells of one time span several frames.
        grid: cells (time, rows, columns), `visual.cell_grid`.
        title: text above the frame.
        clip_size: side in pixels of the clips that the model saw; None where `frame` is one of them.
        limit: attention with the strongest colour; None takes the largest of this frame. Give one for several frames
            that are to be compared.
        strength: opacity of the strongest colour.

    Returns:
        The overlay, for a colour bar; its values are shares of all attention, per cell of the face.

    Raises:
        ValueError: `weights` do not fit `grid`, or are negative or not finite.
    """
    weights = np.asarray(weights, dtype=np.float64)
    if weights.size != np.prod(grid) or (weights.ndim == 3 and weights.shape != tuple(grid)):
        raise ValueError(f"weights of shape {weights.shape} do not fit the grid {tuple(grid)}")
    if not np.isfinite(weights).all() or weights.min() < 0:
        raise ValueError("weights must be finite and not negative")
    face = weights.reshape(grid).sum(axis=0)
    frame = np.asarray(frame)
    top = 255 if frame.dtype == np.uint8 else 1.0
    height, width = frame.shape
    ax.imshow(frame, cmap="gray", vmin=0, vmax=top, extent=(0, width, height, 0), interpolation="nearest")
    scale = height / (clip_size or height)
    first, side = _FIRST_EDGE * scale, _CELL_SIDE * scale
    limit = limit or float(face.max()) or 1.0
    overlay = ax.imshow(
        face, cmap=SEQUENTIAL, vmin=0, vmax=limit, alpha=np.clip(face / limit, 0, 1) * strength,
        extent=(first, first + side * grid[2], first + side * grid[1], first), interpolation="nearest",
    )  # fmt: skip
    ax.set_xlim(0, width)
    ax.set_ylim(height, 0)
    bare(ax)
    if title is not None:
        ax.set_title(title, fontsize=FONT_POINTS)
    return overlay
