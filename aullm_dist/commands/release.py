"""Runs `aullm-dist release verify DIR` and `release split DIR`, which splits a release for a server of LLMs."""

import argparse
import sys
from pathlib import Path

from aullm_dist.commands.options import show_example


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the subcommands of `aullm-dist release` to its parser."""
    commands = parser.add_subparsers(dest="release_command", required=True, metavar="COMMAND")
    verify = commands.add_parser("verify", help="compare every file with its hash, and the answers with the recorded")
    show_example(verify, "aullm-dist release verify release")
    verify.add_argument("folder", type=Path, metavar="DIR", help="a folder written by aullm-dist merge")
    verify.add_argument(
        "--llm", metavar="LLM", help="folder or Hugging Face name of the base LLM, if it is not where it was"
    )
    verify.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    verify.add_argument(
        "--trust-remote-code", action="store_true", help="run model code that ships with the base LLM (default: never)"
    )
    split = commands.add_parser("split", help="split a merged release: an LLM for a server, and its client's part")
    show_example(split, "aullm-dist release split release --out split")
    split.add_argument("folder", type=Path, metavar="DIR", help="a merged release")
    split.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to be written; new or empty")


def run(args: argparse.Namespace) -> int:
    """Verify or split a release, and say what was done.

    Raises:
        UserError: it is not what was exported; the command line turns it into one line and exit code 2.
    """
    return _split(args) if args.release_command == "split" else _verify(args)


def _split(args: argparse.Namespace) -> int:
    from aullm_dist.release.splitting import CLIENT_FOLDER, SERVER_FOLDER, split_release

    split_release(args.folder, args.out)
    server, client = args.out / SERVER_FOLDER, args.out / CLIENT_FOLDER
    sys.stdout.write(f"written: {server} for a server that takes prompt embeddings, {client} for its clients\n")
    return 0


def _verify(args: argparse.Namespace) -> int:
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
