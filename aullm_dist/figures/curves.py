"""Draws curves over training, one for each fold."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from aullm_dist.figures.style import BLACK, FONT_POINTS, PALETTE

_STYLES = ("-", "--", ":", "-.")
_OWN_LOOK = 8
"""Curves up to which each has a colour and a name; of more, all are gray and their median is drawn."""

Curve = tuple[np.ndarray, np.ndarray]


def draw_curves(
    ax: Axes, curves: Mapping[str, Curve], *, ylabel: str, xlabel: str = "optimizer step", title: str | None = None
) -> None:
    """Draw named curves into one axes.

    Args:
        ax: axes to draw on.
        curves: name -> (steps `[n]`, values `[n]`); values that are not finite leave a gap.
        ylabel: quantity and unit.
        xlabel: what the steps count.
        title: text above.

    Raises:
        ValueError: there is no curve, or steps and values of one differ in length.
    """
    if not curves:
        raise ValueError("there is no curve to draw")
    for name, (steps, values) in curves.items():
        if len(steps) != len(values):
            raise ValueError(f"curve {name}: {len(steps)} steps for {len(values)} values")
    many = len(curves) > _OWN_LOOK
    for index, (name, (steps, values)) in enumerate(curves.items()):
        look: dict[str, Any] = {
            "color": PALETTE[index % len(PALETTE)],
            "label": name,
            "linestyle": _STYLES[index % len(_STYLES)],
        }
        if many:
            look = {
                "color": "#9A9A9A",
                "alpha": 0.6,
                "label": f"each of {len(curves)} folds" if index == 0 else None,
            }
        # A single value has no line.
        marker = "o" if len(steps) < 3 else None
        ax.plot(steps, values, linewidth=0.8 if many else 1.3, marker=marker, markersize=3, **look)
    if many:
        steps, median = median_curve(curves)
        ax.plot(steps, median, color=BLACK, linewidth=1.8, label="median")
    ax.set_xlabel(xlabel, fontsize=FONT_POINTS)
    ax.set_ylabel(ylabel, fontsize=FONT_POINTS)
    ax.tick_params(labelsize=FONT_POINTS - 1)
    ax.grid(color="#E5E5E5", linewidth=0.6)
    ax.legend(fontsize=FONT_POINTS - 1, frameon=False, ncols=2 if len(curves) > 4 and not many else 1)
    if title is not None:
        ax.set_title(title, fontsize=FONT_POINTS + 1)


def median_curve(curves: Mapping[str, Curve]) -> Curve:
    """Return the median over the curves that reach a step, at every step that any of them has a value for."""
    at: dict[float, list[float]] = {}
    for steps, values in curves.values():
        for step, value in zip(np.asarray(steps).tolist(), np.asarray(values).tolist(), strict=True):
            if np.isfinite(value):
                at.setdefault(step, []).append(value)
    ordered = sorted(at)
    return np.array(ordered), np.array([np.median(at[step]) for step in ordered])
