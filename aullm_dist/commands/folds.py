"""Runs `aullm-dist folds PROTOCOL DATASET...`: writes who is trained on and tested in each fold, as a JSON."""

import argparse
import sys
from itertools import permutations
from pathlib import Path

from aullm_dist.commands.options import show_example
from aullm_dist.data.protocols import PROTOCOLS, FoldPlan, SampleInfo, au_vocabulary, make_folds, write_folds
from aullm_dist.errors import UserError
from aullm_dist.shell import command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist folds`."""
    show_example(parser, "aullm-dist folds loso data/casme2 --out folds.json")
    parser.add_argument("protocol", choices=PROTOCOLS, help="how clips are split into folds")
    parser.add_argument("datasets", nargs="+", type=Path, metavar="DATASET", help="folders of prepared datasets")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="JSON to write; for cross a folder, one JSON per ordered pair of corpora",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="chooses inner subjects and groups (default: 0)"
    )
    parser.add_argument("--folds", type=int, default=5, metavar="N", help="folds of protocol grouped (default: 5)")
    parser.add_argument(
        "--inner-fraction",
        type=float,
        default=0.15,
        metavar="SHARE",
        help="share of the training subjects that is held out (default: 0.15)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the folds and how positives spread over them; write them where `--out` says.

    Raises:
        UserError: a dataset cannot be read, the protocol does not fit them, or the file cannot be written.
    """
    from aullm_dist.data.clips import read_samples
    from aullm_dist.data.stratification import render_stratification, stratification

    samples = read_samples(args.datasets)
    for name, plan in _plans(args, samples):
        if args.out is not None:
            path = args.out / f"{name}.json" if name else args.out
            try:
                write_folds(path, plan)
            except OSError as error:
                raise UserError(f"--out {path}: cannot be written ({error.strerror})") from error
            sys.stdout.write(f"Written: {path} (train on it with {command(f'data.folds_file={path}')})\n")
        sys.stdout.write(render_stratification(stratification(plan, samples)) + "\n")
    return 0


def _plans(args: argparse.Namespace, samples: tuple[SampleInfo, ...]) -> list[tuple[str, FoldPlan]]:
    corpora = tuple(sorted({sample.corpus for sample in samples}))
    options = {"seed": args.seed, "inner_fraction": args.inner_fraction, "num_folds": args.folds}
    if args.protocol != "cross":
        aus = au_vocabulary(corpora, args.protocol)
        folds = make_folds(samples, args.protocol, **options)
        return [("", FoldPlan(args.protocol, corpora, aus, args.seed, folds))]
    if len(corpora) < 2:
        raise UserError(f"protocol cross needs datasets of at least 2 corpora, got {', '.join(corpora)}")
    plans = []
    for source, target in permutations(corpora, 2):
        folds = make_folds(samples, "cross", train_corpora=[source], test_corpora=[target], **options)
        pair = tuple(sorted((source, target)))
        plans.append((f"{source}-{target}", FoldPlan("cross", pair, au_vocabulary(pair, "cross"), args.seed, folds)))
    return plans
