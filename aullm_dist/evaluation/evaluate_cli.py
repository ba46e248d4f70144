"""`aullm-dist evaluate RUN...` and `aullm-dist compare RUN RUN`: print tables; of one run, also write them into it."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from aullm_dist.errors import UserError
from aullm_dist.evaluation.blocks import Block, render_blocks
from aullm_dist.evaluation.tables import FORMATS, render

SHORT_FORMATS = ("text", "markdown", "json")


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
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folder; several, such as seeds: mean and SD over them"
    )
    parser.add_argument("--epoch", type=_epoch, default=None, metavar="last|N", help="epoch to score (default: last)")
    parser.add_argument("--bootstrap", type=_count, default=1000, metavar="N", help="subject resamples (default: 1000)")
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="seed of the resampling (default: 0)")
    parser.add_argument(
        "--leaky", action="store_true", help="also print what choices made on the test labels would have added"
    )
    parser.add_argument("--format", choices=FORMATS, default="text", help="what is printed (default: text)")


def run_evaluate(args: argparse.Namespace) -> int:
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
        sys.stdout.write(_render(result, seed_blocks(result), args.format))
        return 0
    metrics = evaluate_run(args.runs[0], epoch=args.epoch, bootstrap=args.bootstrap, seed=args.seed, leaky=args.leaky)
    sys.stdout.write(render(metrics, args.format))
    return 0


def _render(result: dict[str, Any], blocks: list[Block], fmt: str) -> str:
    if fmt == "json":
        return json.dumps(result, indent=1, allow_nan=False) + "\n"
    return render_blocks(blocks, fmt)


def add_compare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist compare`."""
    parser.add_argument("first", type=Path, metavar="RUN", help="run folder to compare with")
    parser.add_argument("second", type=Path, metavar="OTHER", help="run folder; the table is OTHER minus RUN")
    parser.add_argument("--bootstrap", type=_count, default=1000, metavar="N", help="subject resamples (default: 1000)")
    parser.add_argument("--seed", type=_count, default=0, metavar="N", help="seed of the resampling (default: 0)")
    parser.add_argument("--format", choices=SHORT_FORMATS, default="text", help="what is printed (default: text)")


def run_compare(args: argparse.Namespace) -> int:
    """Compare two runs, print it as `args.format`, and return the exit code.

    Raises:
        UserError: On bad input; the command line turns it into one line and exit code 2.
    """
    from aullm_dist.evaluation.compare import compare_blocks, compare_runs

    result = compare_runs(args.first, args.second, bootstrap=args.bootstrap, seed=args.seed)
    sys.stdout.write(_render(result, compare_blocks(result), args.format))
    return 0
