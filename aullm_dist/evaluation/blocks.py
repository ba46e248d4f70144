"""Renders any table as text, Markdown or LaTeX."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 100
_AU = "AU"
_SPECIAL = {character: f"\\{character}" for character in "%_&#{}$"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip
_NUMBER = r"[+-]?\d+(?:\.\d+)?"


@dataclass(frozen=True, slots=True)
class Block:
    """One table: sentences above it, the cells, sentences below it."""

    title: tuple[str, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    mark: str = ""
    """What must stay with the numbers wherever they go, in a few words; titles have it already, and LaTeX a row."""


def percent(value: float | None) -> str:
    """Return a fraction in percent with one decimal, `-` for None."""
    return "-" if value is None else f"{100 * value:.1f}"


def interval_text(pair: Sequence[float] | None) -> str:
    """Return low and high in percent, `-` for None."""
    return "-" if pair is None else f"{100 * pair[0]:.1f}-{100 * pair[1]:.1f}"


def render_text(block: Block) -> str:
    """Return a table for terminals, at most `WIDTH` columns wide where its cells allow."""
    table = [block.header, *block.rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(block.header))]
    lines = [line for sentence in block.title for line in textwrap.wrap(sentence, WIDTH)]
    for position, row in enumerate(table):
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
        if position == 0:
            lines.append("-" * len("  ".join(cells)))
    lines += [line for sentence in block.notes for line in textwrap.wrap(sentence, WIDTH)]
    return "\n".join(lines) + "\n"


def render_markdown(block: Block) -> str:
    """Return a table in Markdown."""
    lines = [f"### {block.title[0]}", "", *(f"{sentence}\n" for sentence in block.title[1:])]
    lines.append(f"| {' | '.join(block.header)} |")
    lines.append(f"|---|{'---:|' * (len(block.header) - 1)}")
    lines += [f"| {' | '.join(row)} |" for row in block.rows]
    lines += ["", *(f"{sentence}  " for sentence in block.notes)]
    return "\n".join(lines) + "\n"


def render_latex(block: Block) -> str:
    r"""Return a table as a `tabular` without packages; what text says around it is in comments.

    A table with a row for each AU is turned: papers of this field have the AUs as columns.
    """
    header, rows = (block.header, block.rows) if block.header[0] != _AU else _turned(block)
    lines = _comments(block.title)
    lines.append(rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}")
    lines += [r"\hline", _row(header), r"\hline", *map(_row, rows), r"\hline"]
    if block.mark:
        # Comments are not printed.
        lines.append(rf"\multicolumn{{{len(header)}}}{{l}}{{{_escaped(block.mark)}}} \\")
    lines.append(r"\end{tabular}")
    lines += _comments(block.notes)
    return "\n".join(lines) + "\n"


def _turned(block: Block) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of a table whose rows are AUs, with these as columns."""
    columns = list(zip(*block.rows, strict=True))
    names = []
    for index, name in enumerate(block.header):
        # `floor` and `95% CI` belong to the column before them.
        names.append(f"{block.header[index - 1]} {name}" if block.header.count(name) > 1 else name)
    return ("", *map(_column, columns[0])), list(zip(names[1:], *zip(*columns[1:], strict=True), strict=True))


def _column(name: str) -> str:
    """Return how a column is headed: `AU1` of `AU1 Inner Brow Raiser`, `Avg.` of the mean."""
    if re.match(r"AU\d+\b", name):
        return name.split()[0]
    return "Avg." if name.startswith("mean of ") else name.removesuffix(" of the mean")


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(cell: str) -> str:
    """Return a cell with LaTeX's own characters escaped, minus signs as such, and dashes between two numbers."""
    if cell == "-":
        return "--"
    pair = re.fullmatch(rf"({_NUMBER})(?:\.\.|-)({_NUMBER})", cell)
    if pair:
        low, high = map(_escaped, pair.groups())
        return f"{low}--{high}" if "$" not in low + high else f"[{low}, {high}]"
    if re.fullmatch(_NUMBER, cell):
        return f"${cell}$" if cell[0] in "+-" else cell
    return "".join(_SPECIAL.get(character, character) for character in cell)


def _comments(sentences: Sequence[str]) -> list[str]:
    return [f"% {line}" for sentence in sentences for line in textwrap.wrap(sentence, WIDTH)]


def render_blocks(blocks: Iterable[Block], fmt: str) -> str:
    """Return tables as `text`, `markdown` or `latex`, with a blank line between them."""
    return "\n".join(map(_RENDERERS[fmt], blocks))


_RENDERERS = {"text": render_text, "markdown": render_markdown, "latex": render_latex}
