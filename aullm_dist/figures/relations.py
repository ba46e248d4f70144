"""Draws edge strengths of the AU graph, sorted by the type of their relation."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from aullm_dist.figures.graph import RELATION_MARKERS, Edge
from aullm_dist.figures.style import BLACK, FONT_POINTS


def draw_relations(
    ax: Axes, edges: Sequence[Edge], values: np.ndarray, *, ylabel: str, title: str | None = None
) -> None:
    """Draw one point per edge of the prior above its relation type, and the mean of each type.

    Args:
        ax: axes to draw on.
        edges: the edges, in the order of `values`; candidates, which the prior does not have, are left out.
        values: `[E]`, such as mean strengths.
        ylabel: quantity and unit.
        title: text above.

    Raises:
        ValueError: `values` have another length than `edges`.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (len(edges),):
        raise ValueError(f"{len(edges)} edges, but values {values.shape}")
    names = [name for name in RELATION_MARKERS if any(edge[2] == name and edge[3] for edge in edges)]
    ax.axhline(0.0, color=BLACK, linewidth=0.8)
    for place, name in enumerate(names):
        own = np.array(
            [value for edge, value in zip(edges, values, strict=True) if edge[2] == name and edge[3]], dtype=np.float64
        )
        marker, colour = RELATION_MARKERS[name]
        # Points of one type lie next to each other, in order, so that none hides another.
        across = place + (np.linspace(-0.28, 0.28, len(own)) if len(own) > 1 else np.zeros(1))
        ax.plot(across, np.sort(own), marker=marker, color=colour, linestyle="none", markersize=4, alpha=0.8)
        ax.plot([place - 0.36, place + 0.36], [own.mean()] * 2, color=BLACK, linewidth=1.6)
    counts = [sum(edge[2] == name and bool(edge[3]) for edge in edges) for name in names]
    labels = [f"{name}\n({count})" for name, count in zip(names, counts, strict=True)]
    ax.set_xticks(range(len(names)), labels, fontsize=FONT_POINTS)
    ax.set_xlabel("type of relation (edges)", fontsize=FONT_POINTS)
    ax.set_ylabel(ylabel, fontsize=FONT_POINTS)
    ax.tick_params(labelsize=FONT_POINTS - 1)
    if title is not None:
        ax.set_title(title, fontsize=FONT_POINTS + 1)
