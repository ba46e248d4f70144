"""Runs `aullm-dist compare RUN OTHER`: prints the difference of two runs, clip by clip paired."""

import argparse
import sys
from pathlib import Path

from aullm_dist.commands.options import SHORT_FORMATS, render_short, show_example, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist compare`."""
    show_example(parser, "aullm-dist compare runs/one runs/other")
    parser.add_argument("first", type=Path, metavar="RUN", help="run folder to compare with")
    parser.add_argument("second", type=Path, metavar="OTHER", help="run folder; the table is OTHER minus RUN")
    parser.add_argument(
        "--bootstrap", type=whole_number, default=1000, metavar="N", help="number of subject resamples (default: 1000)"
    )
    parser.add_argument("--seed", type=whole_number, default=0, metavar="N", help="seed of the resampling (default: 0)")
    parser.add_argument(
        "--format", choices=SHORT_FORMATS, default="text", help="format of what is printed (default: text)"
    )


def run(args: argparse.Namespace) -> int:
    """Compare two runs, print it as `args.format`, and return the exit code.

    Raises:
        UserError: On bad input; the command line turns it into one line and exit code 2.
    """
    from aullm_dist.evaluation.compare import compare_blocks, compare_runs

    result = compare_runs(args.first, args.second, bootstrap=args.bootstrap, seed=args.seed)
    sys.stdout.write(render_short(result, compare_blocks(result), args.format))
    return 0
