"""Draws a prediction as one picture: two frames, where the evidence was, a bar per AU, and the AU graph."""

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from aullm_dist.figures.evidence import draw_evidence
from aullm_dist.figures.graph import Edge, draw_graph
from aullm_dist.figures.style import (
    BLACK,
    BLUE,
    DIVERGING,
    FONT_POINTS,
    bare,
    colour_bar,
    missing_letters_told,
    new_figure,
)

_IDLE = "#B9CFE4"
"""Bars of AUs that are not active: lighter than the active ones in gray, too."""
_TITLE = 60
"""Characters of a clip's name; of a longer one the end is shown, which tells clips of one corpus apart."""
_FOOT = 160
"""Characters of a line at the foot."""
_LEAST_CHANGE = 8.0
"""Gray levels that the colour scale of changes reaches at least: noise must not look like movement."""
_MAP_INCHES, _GRAPH_INCHES = (2.9, 3.45), (4.2, 3.8)
"""Width and height of maps that stand alone."""
_NOTE = "Probabilities are not calibrated. An action unit is a movement, not an emotion."


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionPicture:
    """What the picture of one clip shows; A action units, N texture cells, E edges."""

    clip: str
    frames: np.ndarray
    """`[2, S, S]` uint8: the onset frame, and another one to hold against it."""
    numbers: tuple[int, int, int]
    """Numbers of the onset frame, of the other one, and of the last frame."""
    other: str
    """What the other frame is, such as "Apex"."""
    aus: tuple[int, ...]
    names: tuple[str, ...]
    """FACS names of the AUs."""
    probabilities: np.ndarray
    """`[A]`."""
    active: np.ndarray
    """`[A]` bool."""
    thresholds: np.ndarray
    """`[A]` probabilities."""
    policy: str
    model: str
    clip_size: int
    """Side in pixels of the clip as the model saw it."""
    caveats: Sequence[str] = ()
    """What a reader must know of the model, as sentences without a full stop."""
    grid: tuple[int, int, int] | None = None
    evidence: np.ndarray | None = None
    """`[N]` attention over the cells of `grid`, the mean of the heads; None for a model that has none."""
    edges: Sequence[Edge] = ()
    strengths: np.ndarray | None = None
    """`[E]`; None for a model without a graph."""


def draw_prediction(picture: PredictionPicture) -> Figure:
    """Return the figure: what a model does not have (evidence, graph) is left out, and the rest takes its place."""
    num_aus = len(picture.aus)
    has_graph = picture.strengths is not None
    height = 3.1 + max(3.4 if has_graph else 0.0, 0.8 + 0.27 * num_aus)
    figure = Figure(
        figsize=(9.6, height + 0.7), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08, hspace=0.04)
    )
    FigureCanvasAgg(figure)
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(2.9, height - 2.9))).tolist()
    _draw_faces(top, picture)
    if has_graph:
        bars, graph = bottom.subplots(1, 2, width_ratios=(1.15, 1.0))
        _draw_strengths(bottom, graph, picture)
        graph.set_title("What the AUs tell each other", fontsize=FONT_POINTS + 1)
    else:
        bars = bottom.subplots()
    _draw_bars(bars, picture)
    onset, _, last = picture.numbers
    clip = picture.clip if len(picture.clip) <= _TITLE else f"...{picture.clip[-_TITLE:]}"
    figure.suptitle(f"{clip}, frames {onset} to {last}", fontsize=FONT_POINTS + 4, x=0.02, ha="left")
    foot = [f"Thresholds: {picture.policy}", f"Model: {picture.model}", *_sentences(picture.caveats), _NOTE]
    text = "\n".join(textwrap.fill(line, _FOOT) for line in foot)
    figure.supxlabel(text, fontsize=FONT_POINTS - 1, x=0.02, ha="left")
    return figure


def _sentences(texts: Sequence[str]) -> list[str]:
    return [f"{text[0].upper()}{text[1:]}." for text in texts]


def render_prediction(picture: PredictionPicture, suffix: str) -> bytes:
    """Return the figure as the content of a file whose name ends in `suffix`, such as `.png`."""
    buffer = io.BytesIO()
    with missing_letters_told():
        draw_prediction(picture).savefig(buffer, format=suffix.lstrip(".").lower())
    return buffer.getvalue()


def render_parts(picture: PredictionPicture) -> dict[str, bytes]:
    """Return the maps of the figure one by one, as SVG without titles, for a page that arranges them itself.

    Returns:
        Of "change", "evidence" and "graph" those that the model has.
    """
    parts: dict[str, tuple[Callable[[Figure, Axes, PredictionPicture], None], tuple[float, float]]] = {
        "change": (_draw_change, _MAP_INCHES)
    }
    if picture.evidence is not None:
        parts["evidence"] = (_draw_evidence, _MAP_INCHES)
    if picture.strengths is not None:
        parts["graph"] = (_draw_strengths, _GRAPH_INCHES)
    rendered = {}
    for name, (draw, inches) in parts.items():
        figure, axes = new_figure(*inches)
        draw(figure, axes[0, 0], picture)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg")
        rendered[name] = buffer.getvalue()
    return rendered


def _draw_faces(figure: SubFigure, picture: PredictionPicture) -> None:
    onset, other, _ = picture.numbers
    axes = figure.subplots(1, 4 if picture.evidence is not None else 3)
    titles = (f"Onset: frame {onset}", f"{picture.other}: frame {other}")
    for ax, frame, title in zip(axes, picture.frames, titles, strict=False):
        ax.imshow(frame, cmap="gray", vmin=0, vmax=255)
        ax.set_title(title, fontsize=FONT_POINTS + 1)
        bare(ax)
    _draw_change(figure, axes[2], picture)
    axes[2].set_title("Change between the two", fontsize=FONT_POINTS + 1)
    if picture.evidence is not None:
        _draw_evidence(figure, axes[3], picture)
        axes[3].set_title("Where the evidence was taken", fontsize=FONT_POINTS + 1)


def _draw_change(figure: Figure | SubFigure, ax: Axes, picture: PredictionPicture) -> None:
    change = picture.frames[1].astype(np.int16) - picture.frames[0]
    limit = max(_LEAST_CHANGE, float(np.quantile(np.abs(change), 0.995)))
    image = ax.imshow(change, cmap=DIVERGING, vmin=-limit, vmax=limit)
    bare(ax)
    colour_bar(figure, image, ax, "darker (-) or brighter (+), gray levels", below=True)


def _draw_evidence(figure: Figure | SubFigure, ax: Axes, picture: PredictionPicture) -> None:
    assert picture.evidence is not None
    assert picture.grid is not None
    image = draw_evidence(ax, picture.frames[1], picture.evidence, picture.grid, clip_size=picture.clip_size)
    colour_bar(figure, image, ax, "share of attention", below=True)


def _draw_strengths(figure: Figure | SubFigure, ax: Axes, picture: PredictionPicture) -> None:
    assert picture.strengths is not None
    image = draw_graph(ax, picture.aus, picture.edges, picture.strengths)
    colour_bar(figure, image, ax, "interaction strength")


def _draw_bars(ax: Axes, picture: PredictionPicture) -> None:
    rows = list(range(len(picture.aus)))
    colours = [BLUE if yes else _IDLE for yes in picture.active]
    ax.barh(rows, picture.probabilities, height=0.66, color=colours)
    for row, limit in zip(rows, picture.thresholds, strict=True):
        ax.plot([limit, limit], [row - 0.42, row + 0.42], color=BLACK, linewidth=1.4)
    for row, value, yes in zip(rows, picture.probabilities, picture.active, strict=True):
        # Outside of the axes: inside, numbers would run into the threshold marks.
        ax.text(
            1.02, row, f"{value:.2f}", va="center", fontsize=FONT_POINTS, fontweight="bold" if yes else "normal",
            transform=ax.get_yaxis_transform(),
        )  # fmt: skip
    labels = [f"{name}  AU{au}" for name, au in zip(picture.names, picture.aus, strict=True)]
    ax.set_yticks(rows, labels, fontsize=FONT_POINTS)
    for label, yes in zip(ax.get_yticklabels(), picture.active, strict=True):
        label.set_fontweight("bold" if yes else "normal")
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.set_xlim(0, 1)
    ax.set_xticks(np.linspace(0, 1, 5))
    ax.set_xlabel("probability", fontsize=FONT_POINTS)
    ax.set_ylabel("action unit", fontsize=FONT_POINTS)
    ax.tick_params(axis="x", labelsize=FONT_POINTS)
    ax.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        ax.spines[side].set_visible(False)
    count = int(picture.active.sum())
    ax.set_title(f"{count} of {len(rows)} action units active", fontsize=FONT_POINTS + 1)
    handles = [
        Patch(color=BLUE, label="active"),
        Patch(color=_IDLE, label="not active"),
        Line2D([], [], color=BLACK, linewidth=1.4, label="threshold"),
    ]
    ax.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, fontsize=FONT_POINTS - 1,
        frameon=False,
    )  # fmt: skip
