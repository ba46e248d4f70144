"""One table as text or Markdown, whatever it holds."""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

WIDTH = 100


@dataclass(frozen=True, slots=True)
class Block:
    """One table: sentences above it, the cells, sentences below it."""

    title: tuple[str, ...]
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]


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


def render_blocks(blocks: Iterable[Block], fmt: str) -> str:
    """Return tables as `text` or `markdown`, with a blank line between them."""
    return "\n".join(map(render_text if fmt == "text" else render_markdown, blocks))
