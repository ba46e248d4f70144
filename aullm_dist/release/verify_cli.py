"""`aullm-dist release verify DIR`: is a release folder whole, and does it answer as it did at export?"""

import argparse
import sys
from pathlib import Path


def add_release_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `aullm-dist release` to its parser."""
    commands = parser.add_subparsers(dest="release_command", required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="compare every file with its hash, and the answers with the recorded")
    verify.add_argument("folder", type=Path, metavar="DIR", help="a folder written by aullm-dist merge")
    verify.add_argument(
        "--llm", metavar="LLM", help="folder or Hugging Face name of the base LLM, if it is not where it was"
    )
    verify.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    verify.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that ships with the base LLM (default: never)"
    )


def run_release_verify(args: argparse.Namespace) -> int:
    """Verify a release and say what was compared.

    Raises:
        UserError: it is not what was exported; the command line turns it into one line and exit code 2.
    """
    from aullm_dist.release.verify import verify

    found = verify(args.folder, device=args.device, llm=args.llm, trust_remote_code=args.trust_remote_code)
    sys.stdout.write(
        f"valid   {found.folder}  {found.format} release, {found.num_files} files, {found.num_bytes / 2**20:.1f} MiB, "
        f"every hash as at export\n"
    )
    if found.recorded is None:
        sys.stdout.write("answers not compared: none were recorded at export\n")
        return 0
    sys.stdout.write(
        f"answers on {found.device}, recorded on {found.recorded['device']}: largest difference of a logit "
        f"{found.difference:.1e}, allowed {found.recorded['tolerance']:g} in {found.recorded['dtype']}\n"
    )
    return 0
