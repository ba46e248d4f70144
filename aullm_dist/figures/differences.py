"""Draws differences with their intervals, one row each."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from aullm_dist.figures.style import BLACK, BLUE, EMPTY, FONT_POINTS

Row = tuple[str, float | None, Sequence[float] | None]
"""(name, value, low and high); None where there is none."""


def draw_differences(ax: Axes, rows: Sequence[Row], *, xlabel: str, title: str | None = None) -> None:
    """Draw values with intervals as points with bars, the first row on top; 0 is marked.

    A row whose interval leaves 0 out has a filled point, another an empty one.

    Args:
        ax: axes to draw on.
        rows: what is drawn; a row without a value keeps its place.
        xlabel: quantity and unit.
        title: text above.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError("there is no difference to draw")
    ax.axvline(0.0, color=BLACK, linewidth=0.8)
    for place, (_, value, pair) in enumerate(rows):
        if place % 2:
            ax.axhspan(place - 0.5, place + 0.5, color=EMPTY, alpha=0.35, linewidth=0)
        if value is None:
            continue
        if pair is not None:
            ax.plot(pair, [place, place], color=BLUE, linewidth=1.6, solid_capstyle="butt")
        clear = pair is not None and (pair[0] > 0 or pair[1] < 0)
        ax.plot(
            [value], [place], marker="o", markersize=5, color=BLUE, markerfacecolor=BLUE if clear else "white"
        )  # fmt: skip
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows], fontsize=FONT_POINTS)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(xlabel, fontsize=FONT_POINTS)
    ax.tick_params(labelsize=FONT_POINTS - 1, left=False)
    ax.tick_params(axis="y", labelsize=FONT_POINTS)
    if title is not None:
        ax.set_title(title, fontsize=FONT_POINTS + 1)
