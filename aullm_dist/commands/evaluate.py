"""Runs `aullm-dist evaluate RUN...`: prints the tables of runs, and of one run also writes them into it."""

import argparse
import sys
from pathlib import Path

from aullm_dist.commands.options import SHORT_FORMATS, render_short, show_example, whole_number
from aullm_dist.errors import UserError
from aullm_dist.evaluation.tables import FORMATS, render


def _epoch(text: str) -> int | None:
    if text == "last":
        return None
    if text.isascii() and text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: allowed are last and an epoch number")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist evaluate`."""
    show_example(parser, "aullm-dist evaluate runs/casme2_loso --format markdown")
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder; several, such as seeds: mean and SD over them"
    )
    parser.add_argument("--epoch", type=_epoch, default=None, metavar="last|N", help="epoch to score (default: last)")
    parser.add_argument(
        "--bootstrap", type=whole_number, default=1000, metavar="N", help="number of subject resamples (default: 1000)"
    )
    parser.add_argument("--seed", type=whole_number, default=0, metavar="N", help="seed of the resampling (default: 0)")
    parser.add_argument(
        "--leaky", action="store_true", help="also print what choices made on the test labels would have added"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="format of what is printed (default: text)")


def run(args: argparse.Namespace) -> int:
    """Evaluate `args.runs`, print it as `args.format`, and return the exit code.

    Raises:
        UserError: On bad input; the command line turns it into one line and exit code 2.
    """
    from aullm_dist.evaluation.compare import seed_blocks, seed_summary
    from aullm_dist.evaluation.evaluate import evaluate_run

    if len(args.runs) > 1:
        if args.leaky or args.epoch is not None:
            raise UserError("--leaky and --epoch take one run; give the runs one by one")
        if args.format not in SHORT_FORMATS:
            raise UserError(f"--format {args.format} takes one run; allowed with several: {', '.join(SHORT_FORMATS)}")
        result = seed_summary(args.runs)
        sys.stdout.write(render_short(result, seed_blocks(result), args.format))
        return 0
    metrics = evaluate_run(args.runs[0], epoch=args.epoch, bootstrap=args.bootstrap, seed=args.seed, leaky=args.leaky)
    sys.stdout.write(render(metrics, args.format))
    return 0
