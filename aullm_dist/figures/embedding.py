"""Draws features laid out in the plane, coloured by the group of each point."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from aullm_dist.figures.style import FONT_POINTS, PALETTE

_MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")


def draw_embedding(
    ax: Axes, places: np.ndarray, groups: Sequence[str], *, method: str = "t-SNE", title: str | None = None
) -> None:
    """Draw one point per clip; groups differ in colour and in shape.

    Args:
        ax: axes to draw on.
        places: `[n, 2]` finite places without a unit.
        groups: n names; at most 8 have a look of their own.
        method: what gave the places, for the axes' labels.
        title: text above.

    Raises:
        ValueError: `places` and `groups` differ in length, or a place is not finite.
    """
    places = np.asarray(places, dtype=np.float64)
    if places.shape != (len(groups), 2) or not np.isfinite(places).all():
        raise ValueError(f"places must be finite and of shape ({len(groups)}, 2); they are {places.shape}")
    member = np.asarray(groups)
    for index, name in enumerate(dict.fromkeys(sorted(groups))):
        own = places[member == name]
        ax.scatter(
            own[:, 0], own[:, 1], s=14, marker=_MARKERS[index % len(_MARKERS)], color=PALETTE[index % len(PALETTE)],
            alpha=0.75, linewidths=0.3, edgecolors="white", label=f"{name} ({len(own)})",
        )  # fmt: skip
    ax.set_xlabel(f"{method} 1 (no unit)", fontsize=FONT_POINTS)
    ax.set_ylabel(f"{method} 2 (no unit)", fontsize=FONT_POINTS)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.legend(
        fontsize=FONT_POINTS - 1, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False,
        handletextpad=0.2, columnspacing=0.9,
    )  # fmt: skip
    if title is not None:
        ax.set_title(title, fontsize=FONT_POINTS + 1)
