"""Runs `aullm-dist quantize BASE --out DIR`: reads the arguments, and prints what was written."""

# ruff: noqa: T201 - this is the command's own output.

import argparse
from pathlib import Path

from aullm_dist.commands.options import show_example
from aullm_dist.shell import command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `quantize`."""
    show_example(parser, "aullm-dist quantize /path/to/llm --out /path/to/llm-nf4")
    parser.add_argument("base", type=Path, metavar="BASE", help="local folder of the LLM in Hugging Face format")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to be written; must not exist")


def run(args: argparse.Namespace) -> int:
    """Quantise a base and say what was written.

    Raises:
        UserError: See `quantize_base`.
    """
    from aullm_dist.llm.stored.quantize import quantize_base

    written = quantize_base(args.base, args.out)
    print(
        f"written: {args.out}, {written.bytes_after / 1e9:.2f} GB from {written.bytes_before / 1e9:.2f} GB, "
        f"{written.layers} linear layers in NF4; train with "
        f"{command(f'model.llm={args.out}', 'model.quantization=nf4')}"
    )
    return 0
