"""Runs `aullm-dist synthesize CORPUS --out DIR`: writes a synthetic corpus to disk, for tests and demos."""

import argparse
import sys
import typing
from pathlib import Path

from aullm_dist.commands.options import show_example
from aullm_dist.config.schema import kind_of
from aullm_dist.data.corpora import CORPORA
from aullm_dist.errors import UserError
from aullm_dist.shell import command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist synthesize`."""
    show_example(parser, "aullm-dist synthesize casme2 --out /tmp/casme2 --subjects 4")
    parser.add_argument(
        "corpus",
        metavar="CORPUS",
        help="whose layout and workbook are written: "
        f"{', '.join(name for name, spec in CORPORA.items() if spec.synthetic)}; or a corpus of another package",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder for the corpus")
    parser.add_argument("--subjects", type=int, default=20, metavar="N", help="subjects (default: 20)")
    parser.add_argument("--clips", type=int, default=12, metavar="N", help="clips per subject (default: 12)")
    parser.add_argument(
        "--amplitude", type=float, default=2.0, metavar="PERCENT", help="peak movement in %% of face width (default: 2)"
    )
    parser.add_argument(
        "--balance",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="0: the field's AU proportions, 1: even (default: 0)",
    )
    parser.add_argument(
        "--shift", choices=_choices("synthetic_shift"), default="corpus", help="domain shift (default: corpus)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed (default: 0)")


def _choices(setting: str) -> tuple[str, ...]:
    """Return what a setting of the run file allows; the generator itself would import numpy for `--help`."""
    return typing.get_args(kind_of("data", setting, "synthesize"))


def run(args: argparse.Namespace) -> int:
    """Write the corpus and say where; returns the exit code.

    Raises:
        UserError: a value is out of range or the folder is not empty.
    """
    from aullm_dist.data.synthetic import SyntheticSpec, write_corpus

    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"--out {args.out}: is not an empty folder; give a new one")
    spec = SyntheticSpec(
        corpus=args.corpus,
        subjects=args.subjects,
        clips_per_subject=args.clips,
        amplitude_percent=args.amplitude,
        balance=args.balance,
        shift=args.shift,
        seed=args.seed,
    )
    try:
        root = write_corpus(spec, args.out)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror}); give a writable folder") from error
    clips = args.subjects * args.clips
    sys.stdout.write(
        f"Synthetic {args.corpus} corpus in {root}: {args.subjects} subjects, {clips} clips. It is for "
        f"tests and demos; no claim about real faces can be made from it.\n"
        f"Next: {command('aullm-dist', 'prepare', args.corpus, '--root', root, '--out', 'DIR')}\n"
    )
    return 0
