"""`aullm-dist evaluate RUN`: print a run's table and write it into the run folder."""

import argparse
import sys
from pathlib import Path

from aullm_dist.evaluation.tables import FORMATS, render


def _epoch(text: str) -> int | None:
    if text == "last":
        return None
    if text.isascii() and text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: allowed are last and an epoch number")


def _count(text: str) -> int:
    if text.isascii() and text.isdigit():
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: must be a whole number of at least 0")


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist evaluate`."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, with folds.json and fold-*/predictions")
    parser.add_argument("--epoch", type=_epoch, default=None, metavar="last|N", help="epoch to score (default: last)")
    parser.add_argument("--bootstrap", type=_count, default=1000, metavar="N", help="subject resamples (default: 1000)")
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="seed of the resampling (default: 0)")
    parser.add_argument("--format", choices=FORMATS, default="text", help="what is printed (default: text)")


def run_evaluate(args: argparse.Namespace) -> int:
    """Evaluate `args.run`, print it as `args.format`, and return the exit code.

    Raises:
        UserError: On bad input; the command line turns it into one line and exit code 2.
    """
    from aullm_dist.evaluation.evaluate import evaluate_run

    metrics = evaluate_run(args.run, epoch=args.epoch, bootstrap=args.bootstrap, seed=args.seed)
    sys.stdout.write(render(metrics, args.format))
    return 0
