"""Runs `aullm-dist predict RELEASE INPUT...`: predicts the AUs of clips with a release, a checkpoint or a fold."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from aullm_dist.commands.options import add_trained_model, overrides_of, show_example
from aullm_dist.errors import UserError
from aullm_dist.files import is_taken, write_bytes, write_text
from aullm_dist.runtime.launch import check_launch

if TYPE_CHECKING:
    import numpy as np

    from aullm_dist.prediction.report import Predictions
    from aullm_dist.prediction.session import Answerer

_EPILOG = """\
An input is a folder of frames, a video file, or a dataset that aullm-dist prepare wrote.

Several processes share the clips, and of a checkpoint under zero3 the LLM:
  accelerate launch --quiet --multi_gpu --num_processes 8 --module aullm_dist.cli predict RUN/fold-00 DATASET --out FILE

"""
_EXAMPLE = "aullm-dist predict runs/casme2_loso/fold-00 clip.mp4 --figure clip.png"
_PICTURES = (".png", ".pdf", ".svg")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist predict`."""
    show_example(parser, _EXAMPLE, _EPILOG)
    parser.add_argument("release", type=Path, metavar="RELEASE", help="a release, a checkpoint, or a fold of a run")
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="folder of frames, video file or prepared dataset")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--csv", action="store_true", help="print a row per clip and AU instead of tables")
    formats.add_argument("--json", action="store_true", help="print one object instead of tables")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="write to this file, as CSV unless --json; must not exist"
    )
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write a picture of one clip: .png, .pdf or .svg")
    parser.add_argument("--onset", type=int, metavar="N", help="first frame of a folder or video (default: its own)")
    parser.add_argument("--offset", type=int, metavar="N", help="last frame, inclusive (default: its own)")
    parser.add_argument("--crop", metavar="CROP", help="crop as in aullm-dist prepare (default: the model's own)")
    parser.add_argument("--clip", action="append", default=[], metavar="ID", help="answer this clip only; repeatable")
    add_trained_model(
        parser, "where and how to compute, such as training.strategy=zero3 or training.micro_batch=4; repeatable"
    )


def run(args: argparse.Namespace) -> int:
    """Answer every clip, print or write the answers, and say how long it took.

    Raises:
        UserError: On bad input; the command line turns it into one line and exit code 2.
    """
    _check_outputs(args)
    from aullm_dist import log
    from aullm_dist.distributed import context
    from aullm_dist.prediction.report import Predictions
    from aullm_dist.prediction.session import InputOptions, open_answerer

    overrides = overrides_of(args)
    options = InputOptions(
        inputs=args.inputs, crop=args.crop, onset=args.onset, offset=args.offset, only=tuple(args.clip),
        single=args.figure is not None,
    )  # fmt: skip
    started = time.monotonic()
    answerer = open_answerer(args.release, overrides, options)
    loaded = time.monotonic()
    answerer.read()
    answers = answerer.answer()
    times = (loaded - started, time.monotonic() - loaded)
    predictions = Predictions(
        model=str(answerer.path),
        answers=answers,
        aus=answerer.aus,
        thresholds=answerer.thresholds,
        crop=answerer.clips.crop,
        caveats=answerer.caveats,
    )
    context.on_main(answerer.accelerator, lambda: _write(args, answerer, predictions))
    answerer.close()
    # Whoever reads stdout may stop reading; the other processes have left by then.
    if log.is_main_process():
        _print(args, predictions, answerer.clips.labelled, times)
    return 0


def _check_outputs(args: argparse.Namespace) -> None:
    for option, path in (("--out", args.out), ("--figure", args.figure)):
        if path is not None and is_taken(path):
            raise UserError(f"{option} {path}: exists already; give the name of a new file")
    if args.figure is None:
        return
    if args.figure.suffix.lower() not in _PICTURES:
        raise UserError(f"--figure {args.figure}: allowed: a name that ends in {', '.join(_PICTURES)}")
    if check_launch() > 1:
        raise UserError("--figure is drawn by one process; start it without accelerate launch")


def _write(args: argparse.Namespace, answerer: "Answerer", predictions: "Predictions") -> None:
    from aullm_dist.prediction.report import render_csv, render_json

    picture = None
    if args.figure:
        from aullm_dist.prediction.picture import picture_of

        picture = picture_of(answerer, predictions, args.figure.suffix)
    if args.out:
        write_text(args.out, (render_json if args.json else render_csv)(predictions))
    if picture is not None:
        write_bytes(args.figure, picture)


def _print(
    args: argparse.Namespace, predictions: "Predictions", labelled: "np.ndarray", times: tuple[float, float]
) -> None:
    from aullm_dist.evaluation.caveats import caveat_notes
    from aullm_dist.log import get_logger
    from aullm_dist.prediction.report import render_csv, render_json, render_text, scores

    logger = get_logger(__name__)
    if not args.out:
        render = render_json if args.json else render_csv if args.csv else render_text
        sys.stdout.write(render(predictions))
    loading, seconds = times
    count = len(predictions.answers.sample_ids)
    logger.info(
        "%d clip%s in %.1f s (%.1f clips/s), after %.1f s of loading%s",
        count, "" if count == 1 else "s", seconds, count / seconds, loading, f": {args.out}" if args.out else "",
    )  # fmt: skip
    # The text on stdout says it itself; CSV cannot, and a file is not seen.
    told = caveat_notes(predictions.caveats) if args.out or args.csv else ()
    for line in (*scores(predictions, labelled), *told):
        logger.info("%s", line)
