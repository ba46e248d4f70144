"""Starts the main job (`aullm-dist train`) by `accelerate launch` in as many processes as fit, or prints a dry run."""

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from aullm_dist import log
from aullm_dist.commands.options import show_example
from aullm_dist.config import check_groups, differing, find_config, load, load_strategy
from aullm_dist.data.corpora import get_drawable
from aullm_dist.errors import UserError
from aullm_dist.shell import command

if TYPE_CHECKING:
    from aullm_dist.config import Config

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
_DEMO = "demo"
_INTERRUPTED = 130
_PLAIN = ("--quiet", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")
"""The answers to all that `accelerate launch` would otherwise assume aloud."""


_ALONE = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
"""What `accelerate launch` tells a single process with these options."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist train`."""
    show_example(parser, "aullm-dist train casme2_loso model.llm=/path/to/llm data.train=[data/casme2] --processes 4")
    parser.add_argument(
        "config", nargs="?", metavar="CONFIG", help="run file, or the name of a shipped one (default: demo)"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that override the run file"
    )
    parser.add_argument(
        "--processes",
        type=int,
        metavar="N",
        help="processes, one per GPU (default: training.processes, else as many GPUs as divide the batch, else 1)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", choices=["auto"], help="continue the run from its newest checkpoints")
    mode.add_argument("--replace", action="store_true", help="train again in a run folder that already holds a run")
    parser.add_argument("--offline", action="store_true", help="never ask the Hugging Face Hub")
    parser.add_argument(
        "--dry-run", action="store_true", help="print settings, data, plan and launch line; train and write nothing"
    )


def run(args: argparse.Namespace) -> int:
    """Train, and return the exit code of the main job; with `--dry-run` only print what would be done.

    Raises:
        UserError: the run file or an override cannot be used, or the number of processes does not divide the batch.
    """
    given = [*([args.config] if args.config else []), *args.overrides]
    # Behind an option argparse leaves the run file among the overrides.
    file = given.pop(0) if given and ("=" not in given[0] or Path(given[0]).exists()) else None
    config = load(find_config(file or _DEMO), given)
    get_drawable(config.data.synthetic_corpus, "data.synthetic_corpus")
    load_strategy(config.training.strategy)
    processes = processes_of(args.processes, config)
    script = [*(["--config", file] if file else []), *passed_on(args), *given]
    if args.dry_run:
        return _describe(config, file or _DEMO, processes, script)
    return start(processes, script)


def passed_on(args: argparse.Namespace) -> list[str]:
    """Return the options that are the main job's own."""
    modes = ["--resume", "auto"] if args.resume else ["--replace"] if args.replace else []
    return [*modes, *(["--offline"] if args.offline else [])]


def processes_of(given: int | None, config: "Config") -> int:
    """Return how many processes are started: as many as were asked for, or as many GPUs as divide the batch.

    Raises:
        UserError: they cannot share the batch, or two numbers were given.
    """
    training = config.training
    if given is not None and training.processes is not None and given != training.processes:
        raise UserError(f"--processes {given}, but training.processes is {training.processes}; give one of them")
    chosen = given if given is not None else training.processes
    if chosen is None:
        import torch

        # The most GPUs that a batch can be split over; a CPU machine is one process.
        fitting = [n for n in range(1, torch.cuda.device_count() + 1) if _share_a_batch(n, config)]
        return max(fitting, default=1)
    if chosen < 1:
        raise UserError(f"--processes is {chosen}; allowed: 1 or more")
    check_groups(training, chosen)
    return chosen


def _share_a_batch(processes: int, config: "Config") -> bool:
    try:
        check_groups(config.training, processes)
    except UserError:
        return False
    return True


def _launcher_options(processes: int) -> list[str]:
    # Without --multi_gpu one process is started on machines without GPUs, whatever their number.
    return [*_PLAIN, f"--num_processes={processes}", *(["--multi_gpu"] if processes > 1 else [])]


def launch_line(processes: int, script: list[str]) -> list[object]:
    """Return the words that start the main job as `start` does."""
    return ["accelerate", "launch", *_launcher_options(processes), TRAIN, *script]


def start(processes: int, script: list[str]) -> int:
    """Start the main job, and return its exit code; one process takes the place of this one.

    Args:
        processes: their number.
        script: arguments of `train.py`.
    """
    if processes == 1:
        # In our place, so that signals and the exit code are its own; the launcher makes 1 of every exit code.
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, str(TRAIN), *script], {**os.environ, **_ALONE})
    from accelerate.commands.launch import launch_command, launch_command_parser

    # Port 0: any that is free.
    options = [*_launcher_options(processes), "--main_process_port=0"]
    arguments = launch_command_parser().parse_args([*options, str(TRAIN), *script])
    return _several(lambda: launch_command(arguments))


def _several(start: Callable[[], None]) -> int:
    # Loggers take their level when their module is imported, which this one does for both.
    import torch.distributed.run  # noqa: F401
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # The processes say themselves what went wrong; the launcher's table of them says only that something did.
    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.distributed.elastic.agent.server.api"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        start()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        log.get_logger().error("Process %d was ended by %s", rank, name)
        return 128 - failure.exitcode
    except (KeyboardInterrupt, SignalException):
        return _INTERRUPTED
    return 0


def _describe(config: "Config", file: str, processes: int, script: list[str]) -> int:
    import yaml

    write = sys.stdout.write
    write(f"Settings that differ from the defaults ({file})\n")
    write(yaml.safe_dump(differing(config), sort_keys=False) + "\n")
    write(describe_data(config) + "\n\n")
    code = describe_plan(config, file, processes)
    write(f"\nWould run\n  {command(*launch_line(processes, script))}\nNothing was written.\n")
    return code


def describe_data(config: "Config") -> str:
    """Return the clips and folds of a run, for `--dry-run`.

    Raises:
        UserError: a dataset cannot be read, or gives no such folds.
    """
    data = config.data
    if not data.train:
        return (
            f"Data: a synthetic corpus would be drawn, {data.synthetic_corpus}, {data.synthetic_subjects} subjects "
            f"with {data.synthetic_clips} clips each; protocol {data.protocol}"
        )
    from aullm_dist.data.clips import ClipStore
    from aullm_dist.data.fold_plan import fold_plan

    train, test = map(Path, data.train), map(Path, data.test)
    store = ClipStore([*train, *test], data.size, data.crops)
    plan = fold_plan(config, store, len(data.train))
    subjects = len({sample.subject for sample in store.samples})
    rows = [
        f"Data: {len(store.samples)} clips of {subjects} subjects; {len(plan.folds)} fold(s), {plan.protocol}; AUs "
        + ", ".join(map(str, plan.aus))
    ]
    chosen = [fold for fold in plan.folds if data.fold in (None, fold.index)]
    if not chosen:
        raise UserError(f"data.fold is {data.fold}; allowed: 0 to {len(plan.folds) - 1}")
    rows += [f"  {fold.name}: {len(fold.train)} to train on, {len(fold.test)} held out" for fold in chosen[:10]]
    rows += [f"  and {len(chosen) - 10} more"] if len(chosen) > 10 else []
    return "\n".join(rows)


def describe_plan(config: "Config", name: str, processes: int) -> int:
    """Print what `aullm-dist plan` says of a run on this machine's GPUs or CPUs, and return its exit code."""
    if config.model.llm in ("none", "tiny"):
        sys.stdout.write(f"Plan: none is needed for model.llm: {config.model.llm}\n")
        return 0
    import torch

    plan = importlib.import_module("aullm_dist.commands.plan")
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    machine = [] if torch.cuda.is_available() else ["--cpu"]
    return plan.plan_of(config, parser.parse_args([name, f"--gpus={processes}", *machine]))
