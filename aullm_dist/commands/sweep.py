"""Trains several runs side by side on one frozen LLM, such as arms and seeds of an ablation: `aullm-dist sweep`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aullm_dist.commands.launch import describe_data, describe_plan, launch_line, passed_on, processes_of, start
from aullm_dist.commands.options import show_example
from aullm_dist.config import differing
from aullm_dist.data.corpora import get_drawable
from aullm_dist.errors import UserError
from aullm_dist.shell import command

if TYPE_CHECKING:
    from aullm_dist.config import Config
    from aullm_dist.runs.sweep import Sweep

_EXAMPLE = "aullm-dist sweep ablation/full ablation/no_it model.llm=/path/to/llm --seeds 0 1 2 --out runs/ablation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `aullm-dist sweep`."""
    show_example(parser, _EXAMPLE)
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="CONFIG | section.key=value",
        help="run files, or names of shipped ones, and settings that override all of them",
    )  # fmt: skip
    add_sweep_arguments(parser)
    parser.add_argument("--processes", type=int, metavar="N", help="processes, as for aullm-dist train")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", choices=["auto"], help="continue every run; those that are done are left alone")
    mode.add_argument("--replace", action="store_true", help="train again in folders that already hold runs")
    parser.add_argument("--offline", action="store_true", help="never ask the Hugging Face Hub")
    parser.add_argument("--dry-run", action="store_true", help="print runs, data, plan and launch line; write nothing")


def add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which runs a sweep has; the main job and `requeue` have them too."""
    # Texts: settings may follow, and would be taken for seeds.
    parser.add_argument(
        "--seeds", nargs="+", default=[], metavar="SEED", help="train each run with each of these seeds"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="each run is trained in FOLDER/NAME[-SEED]")
    parser.add_argument(
        "--at-once", default="auto", metavar="N",
        help="folds trained side by side, of whatever run; auto: as many as processes and batch allow (default: auto)",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=Path, metavar="FILE",
        help="more runs: CONFIG [section.key=value ...] on each line, each with a training.output",
    )  # fmt: skip


def sweep_of(args: argparse.Namespace, words: Sequence[str]) -> "Sweep":
    """Return the sweep that a command line asks for.

    Args:
        args: with the options of `add_sweep_arguments`.
        words: run files and overrides.

    Raises:
        UserError: they name no sweep that can be trained.
    """
    from aullm_dist.runs.sweep import Request, load_sweep

    seeds = [word for word in args.seeds if word.isascii() and word.isdigit()]
    if args.seeds and not seeds:
        raise UserError(f"--seeds {args.seeds[0]}: is no seed; allowed: whole numbers from 0")
    words = [*words, *(word for word in args.seeds if word not in seeds)]
    if args.out is None:
        raise UserError("--out is missing; give the folder that the run folders are to be in")
    files = [word for word in words if "=" not in word or Path(word).is_file()]
    return load_sweep(
        Request(
            files=files,
            overrides=[word for word in words if word not in files],
            seeds=[int(seed) for seed in seeds],
            out=args.out,
            at_once=args.at_once,
            listed=args.runs,
        )
    )


def run(args: argparse.Namespace) -> int:
    """Train the runs, and return the exit code of the main job; with `--dry-run` only print what would be done.

    Raises:
        UserError: the runs do not go together, or the number of processes does not divide the batch.
    """
    from aullm_dist.runs.sweep import check_engine

    sweep = sweep_of(args, args.overrides)
    for config in sweep.configs.values():
        get_drawable(config.data.synthetic_corpus, "data.synthetic_corpus")
    processes = processes_of(args.processes, sweep.first)
    check_engine(sweep, processes)
    # The options last: behind one that takes several values a setting would be one of them.
    options = ["--seeds", *args.seeds] if args.seeds else []
    options += ["--runs", str(args.runs)] if args.runs else []
    options += ["--out", str(args.out), "--at-once", args.at_once, *passed_on(args)]
    script = ["--sweep", *args.overrides, *options]
    return _describe(sweep, processes, script) if args.dry_run else start(processes, script)


def _describe(sweep: "Sweep", processes: int, script: list[str]) -> int:
    import yaml

    write = sys.stdout.write
    settings = {name: _changed(config) for name, config in sweep.configs.items()}
    common = {
        key: value
        for key, value in _changed(sweep.first).items()
        if all(each.get(key) == value for each in settings.values())
    }
    write(f"{len(settings)} run(s) in {processes} process(es), {sweep.first.training.folds_at_once} folds at once\n")
    write("\nSettings of all that differ from the defaults\n" + yaml.safe_dump(common, sort_keys=False))
    described: dict[str, str] = {}
    for name, config in sweep.configs.items():
        own = {key: value for key, value in settings[name].items() if key not in common}
        write(f"\n{name}\n{yaml.safe_dump(own, sort_keys=False)}")
        data = describe_data(config)
        write((f"Data: as {described[data]}" if data in described else data) + "\n")
        described.setdefault(data, name)
    write("\n")
    code = describe_plan(sweep.first, next(iter(settings)), processes)
    write(f"\nWould run\n  {command(*launch_line(processes, script))}\nNothing was written.\n")
    return code


def _changed(config: "Config") -> dict[str, object]:
    """Return the settings that differ from the defaults, by name."""
    return {f"{group}.{key}": value for group, keys in differing(config).items() for key, value in keys.items()}
