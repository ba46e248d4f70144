"""`aullm-dist prepare`: arguments, progress bar and the printed report."""

# ruff: noqa: T201 - this is the command's own output.

import argparse
from pathlib import Path

__all__ = ["add_prepare_arguments", "run_prepare"]


def add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `prepare`; their values are checked by `prepare` itself, which names what is allowed."""
    parser.add_argument("corpus", metavar="CORPUS", help="casme2, samm or 4dme")
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the corpus release")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the dataset to be written")
    parser.add_argument("--size", type=int, default=64, metavar="PIXELS", help="height and width of the frames (64)")
    parser.add_argument(
        "--crop", default="none", metavar="MODE", help="none: the whole frame; center: the largest square"
    )
    parser.add_argument(
        "--bad-clips",
        default="stop",
        metavar="MODE",
        help="stop at the first defect; repair: keep clips with the frames that exist; skip: leave such clips out",
    )
    parser.add_argument("--workers", type=int, default=None, metavar="N", help="processes (one per CPU where it pays)")


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare a corpus and print the report.

    Raises:
        UserError: See `prepare`.
    """
    from tqdm import tqdm

    from aullm_dist.data.prepare import prepare
    from aullm_dist.data.prepare_report import render_report

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
            size=args.size,
            crop=args.crop,
            bad_clips=args.bad_clips,
            num_workers=args.workers,
            progress=show,
        )
    print(render_report(report))
    state = "already prepared" if report["already_prepared"] else "written"
    print(f"\n{state}: {args.out} (datasets.load_from_disk); report: {args.out / 'report.json'}")
    return 0
