"""Writes a page (`aullm-dist report RUN... --out DIR`), or prints a table (`aullm-dist report ablation RUN...`)."""

import argparse
import json
import sys
from pathlib import Path

from aullm_dist.commands.options import SHORT_FORMATS, show_example, whole_number
from aullm_dist.errors import UserError
from aullm_dist.runs.job import MARKER, RECORD

ABLATION = "ablation"
_EPILOG = """\
aullm-dist report RUN... --out DIR     a folder to open in a browser: tables, curves, features, evidence, AU graph
aullm-dist report ablation RUN...      arms next to the full model, with paired intervals (a run folder called
                                       ablation is given as ./ablation)

"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist report`."""
    show_example(parser, "aullm-dist report runs/casme2_loso --out page", _EPILOG)
    parser.add_argument("runs", nargs="+", metavar="[ablation] RUN", help="run folders, finished or not")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the page; new or empty")
    parser.add_argument(
        "--bootstrap", type=whole_number, default=1000, metavar="N", help="subject resamples (default: 1000)"
    )
    parser.add_argument(
        "--seed", type=whole_number, default=0, metavar="N", help="seed of all that is drawn (default: 0)"
    )
    page = parser.add_argument_group("the page")
    page.add_argument(
        "--clips", type=whole_number, default=3, metavar="N",
        help="example clips whose frames are shown; 0 for none, as a licence may demand (default: 3)",
    )  # fmt: skip
    page.add_argument(
        "--fold", type=whole_number, metavar="N", help="fold whose model is looked at (default: the first)"
    )
    page.add_argument(
        "--data", nargs="+", type=Path, default=[], metavar="DATASET", help="look at these instead of the run's own"
    )
    page.add_argument("--no-model", action="store_true", help="load no checkpoint: no features, graph and evidence")
    page.add_argument(
        "--set", action="append", default=[], metavar="section.key=value",
        help="where and how to compute, such as model.llm=/moved/llm or training.micro_batch=4; repeatable",
    )  # fmt: skip
    table = parser.add_argument_group("the table of an ablation")
    table.add_argument("--format", choices=SHORT_FORMATS, help="what is printed (default: text)")


def run(args: argparse.Namespace) -> int:
    """Write the page, or print the table; returns the exit code.

    Raises:
        UserError: On bad input; the command line turns it into one line and exit code 2.
    """
    return _ablation(args) if args.runs[0] == ABLATION else _page(args)


def _ablation(args: argparse.Namespace) -> int:
    if len(args.runs) < 2:
        raise UserError("report ablation: name the run folders, such as runs/ablation/*")
    if args.out or args.data or args.set or args.no_model or args.fold is not None:
        raise UserError("report ablation prints a table and takes --bootstrap, --seed and --format alone")
    from aullm_dist.evaluation.blocks import render_blocks
    from aullm_dist.report.ablation import ablation
    from aullm_dist.report.ablation_table import ablation_blocks

    # In the folder of a sweep they lie next to the runs, and `SWEEP/*` names them as well.
    runs = [run for run in args.runs[1:] if Path(run).name not in (MARKER, RECORD)]
    result = ablation(runs, bootstrap=args.bootstrap, seed=args.seed)
    if args.format == "json":
        sys.stdout.write(json.dumps(result, indent=1, allow_nan=False) + "\n")
    else:
        sys.stdout.write(render_blocks(ablation_blocks(result), args.format or "text"))
    return 0


def _page(args: argparse.Namespace) -> int:
    if args.out is None:
        raise UserError("--out is missing; give a new folder for the page")
    if args.format:
        raise UserError("--format is for report ablation; a page is HTML with figures as PNG and SVG")
    from aullm_dist.report.build import Options, build_report
    from aullm_dist.report.model_views import Models

    models = Models(datasets=args.data, fold=args.fold, overrides=args.set)
    options = Options(args.clips, not args.no_model, args.bootstrap, args.seed)
    missing = build_report([Path(run) for run in args.runs], args.out, models, options)
    for text in missing:
        sys.stderr.write(f"missing: {text}\n")
    sys.stdout.write(f"Report: {args.out / 'index.html'}\n")
    return 0
