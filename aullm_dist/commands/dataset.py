"""Runs `aullm-dist dataset verify DIR...`: compares prepared datasets with their manifests."""

import argparse
import sys
from pathlib import Path

from aullm_dist.commands.options import show_example
from aullm_dist.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `aullm-dist dataset` to its parser."""
    commands = parser.add_subparsers(dest="dataset_command", required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="compare prepared datasets with their manifests")
    show_example(verify, "aullm-dist dataset verify data/casme2")
    verify.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="a dataset that aullm-dist prepare wrote")
    verify.add_argument(
        "--mode",
        choices=("hash", "size"),
        default="hash",
        help="hash reads every byte; size compares the sizes of files only (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print one line per dataset and one per problem.

    Returns:
        Exit code: 0 if every dataset is as it was prepared, 1 if one is damaged or has no hashes to tell by.

    Raises:
        UserError: A folder is no prepared dataset.
    """
    from aullm_dist.data.manifest import MANIFEST_NAME, verify_dataset
    from aullm_dist.data.tables import is_dataset

    bad = 0
    for folder in args.folders:
        if not is_dataset(folder) and not (folder / MANIFEST_NAME).is_file():
            raise UserError(f"{folder}: no prepared dataset; allowed: a folder that aullm-dist prepare wrote")
        found = verify_dataset(folder, args.mode)
        if found is None:
            bad += 1
            _say(f"unknown {folder}  prepared without hashes; prepare it again to have them")
        elif found.problems:
            bad += 1
            _say(f"DAMAGED {folder}", *(f"  {problem}" for problem in found.problems))
        else:
            size = found.num_bytes / 2**20
            _say(f"valid   {folder}  {found.num_files} files, {size:.1f} MiB, checked by {args.mode}")
    return 1 if bad else 0


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
