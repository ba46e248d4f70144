"""Decides whether a SLURM job that has ended is started again: `aullm-dist requeue`, asked by launchers/slurm.sh."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from aullm_dist.commands.options import show_example
from aullm_dist.commands.sweep import add_sweep_arguments, sweep_of
from aullm_dist.config import find_config, load
from aullm_dist.errors import UserError
from aullm_dist.runs.job import is_preempted, job_folder, read_record, write_record
from aullm_dist.runtime.slurm import Job, job_of

SWEEP = "sweep"
"""In the place of a run file: launchers/slurm.sh trains a sweep."""
NO = 3
"""Exit code of "leave it ended"; 2 is a mistake in the input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist requeue`."""
    show_example(parser, "aullm-dist requeue casme2_loso model.llm=/path/to/llm --status 0 --signal USR1")
    parser.add_argument(
        "config", metavar="CONFIG", help="the run file of the job, the name of a shipped one, or the word sweep"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="its overrides; arguments of aullm-dist sweep"
    )
    parser.add_argument("--status", type=int, required=True, metavar="N", help="exit code of srun")
    parser.add_argument(
        "--signal", default="", metavar="NAME", help="signal that reached the job script: USR1, TERM, or nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Print the decision and its reason in one line.

    Args:
        args: `config`, `overrides`, `status`, `signal`.

    Returns:
        0 to start the job again, `NO` to leave it ended.

    Raises:
        UserError: this is no job, or the run file cannot be read.
    """
    job = job_of(os.environ)
    if job is None:
        raise UserError("SLURM_JOB_ID is not set; requeue is for job scripts, such as launchers/slurm.sh")
    folder, most = _of_sweep(args.overrides) if args.config == SWEEP else _of_run(args.config, args.overrides)
    again, why = _decide(job, folder, args.status, args.signal, most)
    sys.stdout.write(f"Job {job.job_id}: {'starting again' if again else 'not started again'}: {why}\n")
    return 0 if again else NO


def _of_run(file: str, overrides: Sequence[str]) -> tuple[Path, int]:
    """Return the folder of the job's record, and how many failures it may have."""
    config = load(find_config(file), overrides)
    return job_folder(config), config.training.max_failures


def _of_sweep(arguments: Sequence[str]) -> tuple[Path, int]:
    parser = argparse.ArgumentParser("aullm-dist requeue", allow_abbrev=False)
    parser.add_argument("words", nargs="*")
    add_sweep_arguments(parser)
    args = parser.parse_intermixed_args(arguments)
    sweep = sweep_of(args, args.words)
    return sweep.folder, sweep.first.training.max_failures


def _decide(job: Job, folder: Path, status: int, signal: str, max_failures: int) -> tuple[bool, str]:
    if signal == "TERM":
        return False, "it was cancelled, or SLURM starts it again by itself"
    if is_preempted(folder, job):
        if signal == "USR1":
            return True, "it was asked to stop and saved what it had done"
        return False, "its processes were asked to stop, but not the job"
    if status == 0:
        return False, "it is done"
    if status == UserError.EXIT_CODE:
        return False, "a mistake in its input, which another start would find again"
    record = read_record(folder)
    if record is None or (record.job_id, record.restart_count) != (job.job_id, job.restart_count):
        return False, f"it failed with exit code {status} before it began to train"
    if not record.step_completed:
        return False, f"it failed with exit code {status} and has not completed a step since its start"
    if record.failures >= max_failures:
        return (
            False,
            f"it failed with exit code {status}, and {max_failures} failures are allowed (training.max_failures)",
        )
    failures = record.failures + 1
    write_record(folder, replace(record, failures=failures))
    return (
        True,
        f"it failed with exit code {status} after completing steps ({failures} of {max_failures} allowed failures)",
    )
