"""Serves a page on this machine on which a model is tried on a clip: `aullm-dist app RELEASE`."""

import argparse
import signal
import sys
import tempfile
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from aullm_dist.commands.options import add_trained_model, overrides_of, show_example
from aullm_dist.errors import UserError
from aullm_dist.runtime.launch import check_launch

if TYPE_CHECKING:
    from aullm_dist.prediction.session import Answerer

_EPILOG = """\
The page is served at 127.0.0.1 alone. On a machine that you reach by SSH, with --port 8800 there and on yours:
  ssh -L 8800:127.0.0.1:8800 MACHINE

"""
_EXAMPLE = "aullm-dist app release --open"
_MOST_MB = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist app`."""
    show_example(parser, _EXAMPLE, _EPILOG)
    parser.add_argument("release", type=Path, metavar="RELEASE", help="a release, a checkpoint, or a fold of a run")
    parser.add_argument(
        "--port", type=int, default=0, metavar="N", help="port to serve at; 0 takes any free one (default: 0)"
    )
    parser.add_argument(
        "--max-mb", type=int, default=200, metavar="N", help="largest clip that is taken, in MB (default: 200)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument("--crop", metavar="CROP", help="as of aullm-dist predict (default: the model's own)")
    add_trained_model(parser, "where and how to compute, as of aullm-dist predict; repeatable")


def run(args: argparse.Namespace) -> int:
    """Load the model and serve the page until Ctrl-C.

    Raises:
        UserError: On bad input; the command line turns it into one line and exit code 2.
    """
    if not 0 <= args.port < 65536:
        raise UserError(f"--port {args.port}; allowed: 0 (any free one) to 65535")
    if not 1 <= args.max_mb <= _MOST_MB:
        raise UserError(f"--max-mb {args.max_mb}; allowed: 1 to {_MOST_MB}")
    if check_launch() > 1:
        raise UserError("the page is served by one process; start it without accelerate launch")
    from aullm_dist.data.crops import crop_for
    from aullm_dist.prediction.session import InputOptions, open_answerer

    overrides = overrides_of(args)
    answerer = open_answerer(args.release, overrides, InputOptions(inputs=()))
    # A crop that cannot be used is refused now, and not at the first clip.
    crop = crop_for(answerer.crops, args.crop).identity
    # A job's end removes the clips as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _serve(args, answerer, crop)
    finally:
        answerer.close()
    return 0


def _serve(args: argparse.Namespace, answerer: "Answerer", crop: str) -> None:
    from aullm_dist.app.answers import PageAnswerer
    from aullm_dist.app.server import open_server
    from aullm_dist.app.uploads import Uploads
    from aullm_dist.log import get_logger

    logger = get_logger(__name__)
    answers = PageAnswerer(answerer, args.crop)
    with tempfile.TemporaryDirectory(prefix="aullm-dist-app-", ignore_cleanup_errors=True) as folder:
        uploads = Uploads(Path(folder), args.max_mb << 20)
        with open_server(args.port, answers, uploads, _model_facts(answerer, crop), answerer.caveats) as server:
            logger.info("The page, for this machine alone; Ctrl-C ends it:")
            sys.stdout.write(f"{server.address}\n")
            sys.stdout.flush()
            if args.open and not webbrowser.open(server.address):
                logger.warning("--open: no browser was found here; open the address yourself")
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                answers.wait()
    logger.info("Stopped; the clips are removed")


def _model_facts(answerer: "Answerer", crop: str) -> dict[str, str]:
    """Return what the page says of the model, label by label."""
    data = answerer.config.data
    return {
        "Model": str(answerer.path),
        "Action units": ", ".join(f"AU{au}" for au in answerer.aus),
        "It sees": f"{data.num_frames} frames from onset to offset, {data.size}x{data.size} pixels, face crop: {crop}",
    }
