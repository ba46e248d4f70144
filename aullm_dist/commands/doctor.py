"""Runs `aullm-dist doctor`: prints one line per check, worst last, and exits with 1 if anything failed."""

import argparse
import time
from pathlib import Path

from aullm_dist.commands.options import show_example
from aullm_dist.doctor.job import Options, check_job, check_machine, print_findings, print_verdict
from aullm_dist.doctor.local import Finding
from aullm_dist.versions import library_versions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist doctor`."""
    show_example(parser, "srun aullm-dist doctor --distributed")
    parser.add_argument(
        "--distributed", action="store_true", help="also check the nodes together, under srun with one task per node"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("."), metavar="DIR", help="where runs are written (default: this folder)"
    )
    parser.add_argument(
        "--timeout", type=float, default=20.0, metavar="SECONDS", help="longest wait of one check (default: 20)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="leave out what imports torch: bitsandbytes, DeepSpeed, the collective"
    )
    parser.add_argument(
        "--prebuild",
        default="",
        metavar="OP[,OP]",
        help="compile DeepSpeed operations, cpu_adam for one, on every node",
    )
    parser.add_argument(
        "--llm",
        default="",
        metavar="LLM",
        help="check that this folder or name is there, and how much of it will be in 4 bits",
    )


def run(args: argparse.Namespace) -> int:
    """Check, print, and return the exit code: 0, or 1 if a check failed.

    Args:
        args: `distributed`, `folder`, `timeout` in seconds, `quick`, `prebuild`, `llm`.

    Raises:
        UserError: the tasks do not find each other, with the node that cannot and the reason.
    """
    begun = time.monotonic()
    options = Options(folder=args.folder, timeout=args.timeout, quick=args.quick, prebuild=args.prebuild, llm=args.llm)
    if args.distributed:
        return check_job(options, begun)
    findings = check_machine(options)
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    print_findings("", [Finding("versions", "ok", versions), *findings])
    return print_verdict(findings, begun)
