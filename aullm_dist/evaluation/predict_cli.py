"""`aullm-dist predict CHECKPOINT DATASET... --out FILE`: probabilities of a trained model for prepared clips."""

import argparse
import csv
import io
import os
import sys
import time
from pathlib import Path

from aullm_dist.errors import UserError
from aullm_dist.files import write_text

_EPILOG = """\
Several processes share the clips, and under zero3 the LLM:
  accelerate launch --quiet --multi_gpu --num_processes 8 --module aullm_dist.cli predict CHECKPOINT DATASET --out FILE
"""


def add_predict_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist predict`."""
    parser.epilog, parser.formatter_class = _EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a checkpoint, or a fold of a run")
    parser.add_argument("datasets", type=Path, nargs="+", metavar="DATASET", help="written by aullm-dist prepare")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="CSV to write; must not exist")
    parser.add_argument(
        "--set", action="append", default=[], metavar="section.key=value",
        help="where and how to compute, such as training.strategy=zero3 or training.micro_batch=4; repeatable",
    )  # fmt: skip


def run_predict(args: argparse.Namespace) -> int:
    """Answer every clip, write one row for each, and print how the answers compare with the datasets' own labels.

    Raises:
        UserError: On bad input; the command line turns it into one line and exit code 2.
    """
    from aullm_dist.training import context
    from aullm_dist.training.predict import find_trained, predict

    if args.out.exists():
        raise UserError(f"--out {args.out}: exists already; give the name of a new file")
    trained = find_trained(args.checkpoint, args.set, int(os.environ.get("WORLD_SIZE", "1")))
    accelerator = context.start(trained.config.training)
    started = time.monotonic()
    answers = predict(accelerator, trained, args.datasets)
    seconds = time.monotonic() - started
    context.on_main(accelerator, lambda: _write(args.out, answers, trained.aus, seconds))
    context.stop(accelerator)
    return 0


def _write(path: Path, answers: "Answers", aus: tuple[int, ...], seconds: float) -> None:  # noqa: F821
    import numpy as np

    from aullm_dist.evaluation.metrics import summarise

    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["sample_id", "corpus", "subject", *(f"AU{au}" for au in aus)])
    probabilities = 1.0 / (1.0 + np.exp(-answers.logits))
    for sample_id, corpus, subject, values in zip(
        answers.sample_ids, answers.corpora, answers.subjects, probabilities, strict=True
    ):
        rows.writerow([sample_id, corpus, subject, *(f"{value:.6f}" for value in values)])
    write_text(path, text.getvalue())
    mean = summarise((answers.labels, answers.logits), aus)["mean"]
    auc = "no AU has both classes" if mean["auc"] is None else f"auc {100 * mean['auc']:.1f}"
    sys.stdout.write(
        f"{len(answers.sample_ids)} clips in {seconds:.0f} s, loading included: {path}\n"
        f"Against the datasets' own labels, threshold 0.5: f1_macro {100 * mean['f1_macro']:.1f}, "
        f"f1_binary {100 * mean['f1_binary']:.1f}, {auc}\n"
    )
