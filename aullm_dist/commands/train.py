"""Runs the main job from its command line: configuration in, trained folds and an honest table out."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aullm_dist import log
from aullm_dist.commands.sweep import add_sweep_arguments, sweep_of
from aullm_dist.config import Config, find_config, load, load_strategy
from aullm_dist.data.corpora import get_drawable
from aullm_dist.errors import CheckpointError, UserError, system_error
from aullm_dist.runs.job import job_folder
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runs.sweep import Sweep, check_engine
from aullm_dist.runs.workspace import Mode
from aullm_dist.runtime.exits import refuse_unreadable_names, report, show_any_name
from aullm_dist.runtime.signals import StopSignals

DEMO = "demo"
_REMEDY = "give a readable and writable place; --resume auto continues from the newest checkpoint"
_EPILOG = """\
Without arguments the embedded demo runs: a synthetic corpus, a tiny backbone, nothing downloaded.
Overrides are section.key=value, for instance training.epochs=50 data.fold=3; the keys are listed by
`aullm-dist config`.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the argument parser of train.py."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Train AULLM++ on prepared corpora.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="run file (YAML), or the name of a shipped one (default: demo)"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="train several runs, as `aullm-dist sweep` says: run files stand alone"
    )
    add_sweep_arguments(parser)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--resume", choices=["auto"], help="continue the run in training.output from its newest checkpoint"
    )
    mode.add_argument("--replace", action="store_true", help="train again in a run folder that already holds a run")
    parser.add_argument(
        "--offline",
        action="store_true",
        help="never ask the Hugging Face Hub, as with HF_HUB_OFFLINE=1 (compute nodes)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the run file")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the main job and return its exit code: 0, or another with one line on stderr for what the user can fix."""
    args = build_parser().parse_intermixed_args(argv)
    log.set_up()
    show_any_name()
    if args.offline:
        # Read by the Hugging Face libraries when they are imported, which has not happened yet.
        os.environ["HF_HUB_OFFLINE"] = "1"
    signals = StopSignals()
    signals.install()
    try:
        refuse_unreadable_names(argv)
        sweep = _asked_for(args)
        load_strategy(sweep.first.training.strategy)
        for config in sweep.configs.values():
            get_drawable(config.data.synthetic_corpus, "data.synthetic_corpus")
        if sweep.first.model.kernels == "interpret":
            # Read by Triton when it is imported, which has not happened yet.
            os.environ["TRITON_INTERPRET"] = "1"
        if args.overrides and not args.config and not args.sweep:
            log.get_logger().info("No --config: settings that are not given are those of the demo")
        return _train(sweep, _mode(args), signals)
    except (UserError, CheckpointError, OSError) as problem:
        error = system_error(problem, _REMEDY) if isinstance(problem, OSError) else problem
        signals.close()  # the launcher ends with a signal whoever is left, and must be obeyed
        report(error, "train.py", ended=signals.received == "SIGTERM")
        return error.EXIT_CODE
    except KeyboardInterrupt:
        if log.is_main_process():
            sys.stderr.write("train.py: interrupted; --resume auto continues from the newest checkpoint\n")
        return 130


def _asked_for(args: argparse.Namespace) -> Sweep:
    """Return the runs to train; one alone has no name.

    Raises:
        UserError: they cannot be trained, or options of a sweep are given without it.
    """
    if not args.sweep:
        for option in ("seeds", "out", "runs"):
            if getattr(args, option):
                raise UserError(f"--{option} is given without --sweep; give both, or neither")
        config = load(find_config(args.config or DEMO), args.overrides)
        return Sweep(job_folder(config), {"": config})
    if args.config:
        raise UserError(
            f"--config {args.config} is given with --sweep, whose run files stand alone; leave out --config"
        )
    return sweep_of(args, args.overrides)


def _mode(args: argparse.Namespace) -> Mode:
    if args.resume:
        return "resume"
    if args.replace:
        return "replace"
    # The demo as it is shipped is there to be tried again; any other run is replaced only when asked.
    return "new" if args.config or args.overrides or args.sweep else "again"


def _train(sweep: Sweep, mode: Mode, signals: StopSignals) -> int:
    # Imported here, so that --help and a mistake in the configuration answer at once.
    from aullm_dist.distributed import context
    from aullm_dist.evaluation.summary import print_summaries, print_summary
    from aullm_dist.runs.lifecycle import Life
    from aullm_dist.runtime.preemption import Preempted
    from aullm_dist.training.run import run, run_all

    accelerator = context.start(sweep.first.training)
    life = Life(accelerator, sweep.first, signals, sweep.folder)
    try:
        if not sweep.is_one:
            check_engine(sweep, accelerator.num_processes)
        folders = dict(zip(sweep.configs, run_all(accelerator, sweep.configs, mode, life), strict=True))
        for run_name, config in sweep.configs.items():
            for name in config.training.baselines() if config.model.llm != "none" else ():
                of_run = f"{run_name}: " if run_name else ""
                log.get_logger().info("%sWithout an LLM (%s), for comparison", of_run, name)
                baseline = baseline_config(config, folders[run_name], name)
                run(accelerator, baseline, "resume" if mode == "resume" else "replace", life)
    except Preempted as agreed:
        stop = agreed
        context.together(accelerator, lambda: life.preempted(stop))
        context.stop(accelerator)
        return 0
    life.ends()
    if sweep.is_one:
        (folder,) = folders.values()
        context.on_main(accelerator, lambda: print_summary(folder, sweep.first))
    else:
        context.on_main(accelerator, lambda: print_summaries(folders, sweep.folder))
    # Only here: after an error the others may be in a collective, and ending the group would wait for them.
    context.stop(accelerator)
    return 0


def baseline_config(config: Config, folder: Path, name: str) -> Config:
    """Return the configuration of a network without an LLM on the folds of a run, below its folder.

    Args:
        config: of the run.
        folder: of the run.
        name: as `model.network` has it.
    """
    counterfactual = config.counterfactual
    chances = (counterfactual.appearance_probability, counterfactual.neutral_probability)
    values: dict[str, Any] = {
        "model.llm": "none",
        "model.network": name,
        "model.readout": "last",
        "model.quantization": "none",
        "model.compile": "none",
        "model.architecture": None,
        "model.training_statistics": False,
        "training.output": str(RunPaths(folder).baseline(name)),
        "training.baseline": False,
        # Networks that are rebuilt from papers are trained as they were there, without interventions.
        "counterfactual.enabled": counterfactual.enabled and name in ("led_cnn", "evidence"),
        "counterfactual.branches": min(counterfactual.branches, sum(chance > 0 for chance in chances)),
    }
    if not config.data.train:
        from aullm_dist.runs.workspace import datasets_of

        values["data.train"] = [str(path) for path in datasets_of(config)[0]]
    return config.changed(values)
