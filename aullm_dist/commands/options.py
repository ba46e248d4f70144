"""Defines options and formats that several commands share."""

import argparse
import json
from pathlib import Path
from typing import Any

from aullm_dist.evaluation.blocks import Block, render_blocks

SHORT_FORMATS = ("text", "markdown", "latex", "json")


def show_example(parser: argparse.ArgumentParser, line: str, before: str = "") -> None:
    """End the help of a command with its one example, a line to run; `before` is printed above it as it is."""
    parser.epilog = before + f"Example: {line}"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def add_trained_model(parser: argparse.ArgumentParser, settings: str) -> None:
    """Add where the LLM of a trained model is now and how the model computes; `settings` is the help of `--set`."""
    parser.add_argument(
        "--llm", type=Path, metavar="DIR", help="the base LLM, where it is no longer at its recorded place"
    )
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help=settings)


def overrides_of(args: argparse.Namespace) -> list[str]:
    """Return the overrides that the options of `add_trained_model` stand for."""
    return [*args.set, *([f"model.llm={args.llm}"] if args.llm else [])]


def whole_number(text: str) -> int:
    """Read an option that counts, from 0 up."""
    if text.isascii() and text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 0")


def render_short(result: dict[str, Any], blocks: list[Block], fmt: str) -> str:
    """Return a result as JSON, or its blocks as text, Markdown or LaTeX."""
    if fmt == "json":
        return json.dumps(result, indent=1, allow_nan=False) + "\n"
    return render_blocks(blocks, fmt)
