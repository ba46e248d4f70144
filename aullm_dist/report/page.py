"""Renders the page of a report from its Jinja2 template; everything that comes from a run is escaped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from aullm_dist.files import write_text
from aullm_dist.report.sections import Section

TEMPLATE = "page.html.jinja"
PAGE = "index.html"


@dataclass(frozen=True, slots=True)
class Part:
    """A run, or the comparison of all, with its sections; `anchor` is its address on the page."""

    title: str
    anchor: str
    sections: Sequence[Section]


def write_page(
    folder: Path, parts: Sequence[Part], runs: Sequence[str], versions: Mapping[str, str], caveats: Sequence[str] = ()
) -> Path:
    """Write `index.html` next to the figures and return its path.

    Args:
        folder: of the report.
        parts: what it shows.
        runs: names of the runs, for the heading.
        versions: of the libraries that made the report.
        caveats: what a reader must know before any number, as sentences without a full stop.
    """
    # StrictUndefined: a misspelt name in the template is an error and not an empty place.
    environment = Environment(
        loader=PackageLoader("aullm_dist.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    path = folder / PAGE
    write_text(
        path, environment.get_template(TEMPLATE).render(parts=parts, runs=runs, versions=versions, caveats=caveats)
    )
    return path
