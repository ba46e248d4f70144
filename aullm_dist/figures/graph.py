"""Draws the AU graph as a heat map: what each edge carries, and of which type it is."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from aullm_dist.figures.style import BLACK, BLUE, DIVERGING, EMPTY, FONT_POINTS, GREEN, VERMILLION, label_aus

Edge = Sequence[int | str | bool]
"""(target AU, source AU, relation type, whether the prior has it), as `AURelations.describe` and checkpoints say."""

RELATION_MARKERS = {
    "co-occur": ("^", BLUE), "antagonist": ("v", VERMILLION), "subset": ("s", GREEN), "region": ("D", BLACK),
    "self": (".", BLACK),
}  # fmt: skip
"""Shape and colour of each relation type: distinguishable without colours as well."""


def draw_graph(
    ax: Axes,
    aus: Sequence[int],
    edges: Sequence[Edge],
    values: np.ndarray,
    *,
    title: str | None = None,
    limit: float | None = None,
    mask: np.ndarray | None = None,
    legend: bool = True,
) -> AxesImage:
    """Draw AU x AU interaction strengths: a row receives from its columns.

    A marker in the corner of a cell says of which type its edge is; cells without an edge are gray. Candidate edges,
    which the prior does not have, are shown only where `mask` has them.

    Args:
        ax: axes to draw on.
        aus: AU numbers of rows and columns.
        edges: the edges, in the order of `values`.
        values: `[E]` finite strengths (or influences, or their differences), of either sign.
        title: text above the map.
        limit: absolute value with the strongest colour; None takes the largest that is shown. Give one for maps that
            are to be compared.
        mask: `[E]` edges that are present; None is the prior's. An edge of the prior that is absent is crossed out, a
            candidate that is present has its marker unfilled.
        legend: whether the types are named below the map.

    Returns:
        The heat map, for a colour bar.

    Raises:
        ValueError: `values` or `mask` have another length than `edges`, or a value is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    prior = np.array([bool(edge[3]) for edge in edges], dtype=bool)
    present = prior if mask is None else np.asarray(mask, dtype=bool)
    if values.shape != (len(edges),) or present.shape != (len(edges),):
        raise ValueError(f"{len(edges)} edges, but values {values.shape} and mask {present.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite")
    place = {au: index for index, au in enumerate(aus)}
    table = np.full((len(aus), len(aus)), np.nan)
    for edge, value, here in zip(edges, values, present, strict=True):
        if here:
            table[place[int(edge[0])], place[int(edge[1])]] = value
    shown = np.abs(values[present])
    limit = limit or float(shown.max(initial=0.0)) or 1.0
    image = ax.imshow(np.ma.masked_invalid(table), cmap=DIVERGING, vmin=-limit, vmax=limit)
    ax.set_facecolor(EMPTY)
    places = np.array([(place[int(edge[1])], place[int(edge[0])]) for edge in edges], dtype=np.float64).reshape(-1, 2)
    _mark(ax, places, [str(edge[2]) for edge in edges], present, prior)
    label_aus(ax, aus, rows=True, columns=True)
    ax.set_ylabel("AU that receives", fontsize=FONT_POINTS)
    ax.set_xlabel("AU that sends", fontsize=FONT_POINTS)
    if title is not None:
        ax.set_title(title, fontsize=FONT_POINTS + 1)
    if legend:
        _legend(ax, {str(edge[2]) for edge in edges})
    return image


def _mark(ax: Axes, places: np.ndarray, relations: Sequence[str], present: np.ndarray, prior: np.ndarray) -> None:
    corners = places - 0.32
    for relation, (marker, colour) in RELATION_MARKERS.items():
        of_type = np.array([name == relation for name in relations], dtype=bool)
        for chosen, face in ((of_type & prior, colour), (of_type & present & ~prior, "white")):
            if chosen.any():
                x, y = corners[chosen].T
                size = 4 if relation == "self" else 12
                ax.scatter(
                    x, y, size, marker=marker, facecolors=face, edgecolors=colour, linewidths=0.6, label=relation
                )
    cut = places[prior & ~present]
    ax.add_collection(LineCollection(list(np.stack([cut - 0.45, cut + 0.45], axis=1)), colors=BLACK, linewidths=0.8))


def _legend(ax: Axes, relations: set[str]) -> None:
    handles = [
        Line2D([], [], marker=marker, color=colour, linestyle="none", markersize=4, label=name)
        for name, (marker, colour) in RELATION_MARKERS.items()
        if name in relations
    ]
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=len(handles), fontsize=FONT_POINTS - 2,
        frameon=False, handletextpad=0.1, columnspacing=0.8,
    )  # fmt: skip
