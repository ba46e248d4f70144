"""Runs `aullm-dist checkpoint verify DIR`: verifies a checkpoint, or every checkpoint of a run."""

import argparse
import sys
from pathlib import Path

from aullm_dist.checkpoint.manifest import MANIFEST_NAME, extra_files, read_manifest, verify_checkpoint
from aullm_dist.checkpoint.retention import list_checkpoints
from aullm_dist.commands.options import show_example
from aullm_dist.errors import UserError
from aullm_dist.runs.paths import CHECKPOINTS, RunPaths


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `aullm-dist checkpoint` to its parser."""
    commands = parser.add_subparsers(dest="checkpoint_command", required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="compare checkpoint folders with their manifests")
    show_example(verify, "aullm-dist checkpoint verify runs/casme2_loso")
    verify.add_argument(
        "folder", type=Path, metavar="DIR", help="a checkpoint, a folder of checkpoints, a fold or a run"
    )
    verify.add_argument(
        "--mode",
        choices=("hash", "size"),
        default="hash",
        help="hash reads every byte; size compares sizes and tensor headers only (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Print one line per checkpoint and one per problem.

    Args:
        args: `folder` (Path) and `mode` ("hash" or "size").

    Returns:
        Exit code: 0 if every checkpoint is valid, 1 otherwise.

    Raises:
        UserError: If there is no checkpoint at or below the folder.
    """
    damaged = 0
    for folder in _checkpoints_at(args.folder):
        problems = verify_checkpoint(folder, args.mode)
        if problems:
            damaged += 1
            _say(f"DAMAGED {folder}", *(f"  {problem}" for problem in problems))
            continue
        manifest = read_manifest(folder)
        size_mib = sum(entry.size for entry in manifest.files.values()) / 2**20
        tensors = sum(len(table) for table in manifest.tensors.values())
        _say(f"valid   {folder}  step {manifest.step}, {tensors} tensors, {size_mib:.1f} MiB, checked by {args.mode}")
        for name in extra_files(folder):
            _say(f"  note: {name} is not part of the checkpoint")
    return 1 if damaged else 0


def _checkpoints_at(folder: Path) -> list[Path]:
    """Return the checkpoint folders that the user means by `folder`."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; allowed is a checkpoint, a folder of checkpoints, a fold or a run")
    roots = [folder, folder / CHECKPOINTS, *(fold.checkpoints for fold in RunPaths(folder).folds().values())]
    found = [path for root in roots for path in list_checkpoints(root)]
    if (folder / MANIFEST_NAME).exists() or (not found and any(folder.glob("*.safetensors"))):
        return [folder]
    if not found:
        raise UserError(
            f"{folder}: holds no checkpoint; allowed is a checkpoint, a folder of checkpoints, a fold or a run"
        )
    return found


def _say(*lines: str) -> None:
    sys.stdout.write("\n".join(lines) + "\n")
