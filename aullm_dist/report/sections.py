"""Defines the parts of a report: sections with tables and pictures, and what is missing from them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from aullm_dist.errors import CheckpointError, UserError
from aullm_dist.evaluation.blocks import Block
from aullm_dist.figures.style import FONT_POINTS, missing_letters_told
from aullm_dist.log import get_logger

logger = get_logger(__name__)

_DOTS_PER_INCH = 200


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure on disk: file name without ending, what it shows, and the text for a reader who cannot see it."""

    name: str
    caption: str
    alt: str


@dataclass(frozen=True, slots=True)
class Listing:
    """A text that is shown as it is, under a heading."""

    title: str
    text: str


@dataclass(slots=True)
class Section:
    """One part of the page; empty lists are not shown."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Block] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    listings: list[Listing] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


class Gallery:
    """Writes figures as PNG and SVG below one folder.

    Args:
        folder: of the report; figures go into `figures/` below it.
        prefix: start of every file name, to keep the runs of a report apart.
        mark: stands above every figure: a figure is copied without its page.
    """

    def __init__(self, folder: Path, prefix: str = "", mark: str = "") -> None:
        self._folder, self._prefix, self._mark = folder / "figures", prefix, mark
        self._folder.mkdir(parents=True, exist_ok=True)

    def add(self, figure: Figure, name: str, caption: str, alt: str) -> Picture:
        """Write a figure and return how the page refers to it; equal figures give equal bytes."""
        stem = f"{self._prefix}{name}"
        if self._mark:
            figure.suptitle(self._mark, fontsize=FONT_POINTS - 1, color="0.35", x=0.995, ha="right")
        with missing_letters_told():
            figure.savefig(self._folder / f"{stem}.png", dpi=_DOTS_PER_INCH, metadata={"Software": None})
            # Letters become outlines: the reader's machine need not have the font.
            with matplotlib.rc_context({"svg.hashsalt": stem, "svg.fonttype": "path"}):
                figure.savefig(self._folder / f"{stem}.svg", metadata={"Date": None, "Creator": None})
        return Picture(stem, caption, alt)


def attempted(section: Section, *fill: Callable[[Section], None]) -> Section:
    """Run each function on the section; what a missing or damaged file keeps from being shown is said in its place."""
    logger.info("  %s", section.title)
    for step in fill:
        try:
            step(section)
        except (UserError, CheckpointError) as error:
            section.missing.append(str(error))
        except OSError as error:
            section.missing.append(f"{error.filename or 'file'}: {error.strerror or error}")
    section.missing = list(dict.fromkeys(section.missing))
    return section
