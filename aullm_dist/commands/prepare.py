"""Runs `aullm-dist prepare`: reads the arguments, shows progress and prints the report."""

# ruff: noqa: T201 - this is the command's own output.

import argparse
from pathlib import Path
from typing import Literal

from aullm_dist.commands.options import show_example
from aullm_dist.data.corpora import CORPORA
from aullm_dist.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `prepare`; their values are checked by `prepare` itself, which names what is allowed."""
    show_example(parser, "aullm-dist prepare casme2 --root /path/to/CASME2 --out data/casme2")
    parser.add_argument("corpus", metavar="CORPUS", help=f"{', '.join(CORPORA)}; or a corpus of another package")
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the corpus release")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the dataset to be written")
    parser.add_argument(
        "--size", type=int, default=64, metavar="PIXELS", help="height and width of the frames (default: 64)"
    )
    parser.add_argument(
        "--crop",
        default="none",
        metavar="CROP",
        help="none: the whole frame; center: the largest square; mtcnn: the face that MTCNN finds, its eyes "
        "level; cascade: the face that OpenCV finds; boxes:FILE.csv, landmarks:FILE.csv; or a crop of another package "
        "(default: none)",
    )
    parser.add_argument(
        "--bad-clips",
        default="stop",
        metavar="MODE",
        help="stop: end at the first defect; repair: keep clips with the frames that exist; skip: leave such clips out "
        "(default: stop)",
    )
    parser.add_argument(
        "--explain",
        action="store_true",
        help="compare clips per AU with the published counts, clip by clip; no --out needed",
    )
    parser.add_argument(
        "--errata", type=Path, metavar="FILE", help="corrections by clip, in place of the published row numbers"
    )
    parser.add_argument(
        "--freeze-errata",
        type=Path,
        metavar="FILE",
        help="write the corrections that fit this sheet, by clip; no --out needed",
    )
    parser.add_argument(
        "--format",
        default="arrow",
        metavar="KIND",
        help="arrow: mapped into memory; parquet: can also be streamed (default: arrow)",
    )
    parser.add_argument(
        "--workers", type=int, default=None, metavar="N", help="processes (default: one per CPU where it pays)"
    )


def run(args: argparse.Namespace) -> int:
    """Prepare a corpus and print the report.

    Raises:
        UserError: See `prepare`.
    """
    if args.out is None and not (args.explain or args.freeze_errata):
        raise UserError("--out is missing; give a folder for the dataset, or --explain or --freeze-errata alone")
    if args.freeze_errata:
        _freeze(args)
    if args.out is not None:
        _prepare(args)
    if args.explain:
        _explain(args)
    return 0


def _freeze(args: argparse.Namespace) -> None:
    from aullm_dist.data.corpora import read_corpus
    from aullm_dist.data.corpora.errata import freeze

    count = freeze(read_corpus(args.corpus, args.root, bad_rows="skip", errata=args.errata), args.freeze_errata)
    print(f"{count} corrections of this sheet written to {args.freeze_errata}; use them with --errata")


def _explain(args: argparse.Namespace) -> None:
    """Print the comparison from sheet and folders alone, as the preparation would have it; no image is opened."""
    from aullm_dist.data.corpora import get_corpus, read_corpus
    from aullm_dist.data.corpora.explain import explain, render_differences
    from aullm_dist.data.preparation.matching import plan_clips

    mode: Literal["repair", "skip"] = "skip" if args.bad_clips == "skip" else "repair"
    index = read_corpus(args.corpus, args.root, bad_rows="skip", errata=args.errata)
    plans, notes = plan_clips(index, mode)
    spec = get_corpus(args.corpus)
    differences = explain(spec, index, [plan.sample_id for plan in plans], [*index.notes, *notes])
    print(render_differences(spec, differences, len(plans)))


def _prepare(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
    from aullm_dist.data.preparation.report import render_report

    with tqdm(unit="clip", desc=f"prepare {args.corpus}", disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            if bar.total is None:
                # Clips of an earlier, interrupted run must not count into the speed and the ETA.
                bar.total = total
                bar.initial = bar.n = bar.last_print_n = done
            bar.update(done - bar.n)
            bar.refresh()

        report = prepare(
            args.corpus,
            args.root,
            args.out,
            PrepareOptions(
                size=args.size,
                crop=args.crop,
                bad_clips=args.bad_clips,
                num_workers=args.workers,
                fmt=args.format,
                errata=args.errata,
            ),
            progress=show,
        )
    print(render_report(report))
    state = "already prepared" if report["already_prepared"] else "written"
    how = "datasets.load_from_disk" if args.format == "arrow" else "Parquet"
    print(f"\n{state}: {args.out} ({how}); report: {args.out / 'report.json'}")
