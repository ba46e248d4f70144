"""`aullm-dist quantize BASE --out DIR`: arguments and what is printed at the end."""

# ruff: noqa: T201 - this is the command's own output.

import argparse
from pathlib import Path


def add_quantize_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `quantize`."""
    parser.add_argument("base", type=Path, metavar="BASE", help="local folder of the LLM in Hugging Face format")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to be written; must not exist")


def run_quantize(args: argparse.Namespace) -> int:
    """Quantise a base and say what was written.

    Raises:
        UserError: See `quantize_base`.
    """
    from aullm_dist.model.quantize_base import quantize_base

    written = quantize_base(args.base, args.out)
    print(
        f"written: {args.out}, {written.bytes_after / 1e9:.2f} GB from {written.bytes_before / 1e9:.2f} GB, "
        f"{written.layers} linear layers in NF4; train with model.llm={args.out} model.quantization=nf4"
    )
    return 0
