"""Command line of the main job: configuration in, trained folds and an honest table out."""

import argparse
import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from aullm_dist import log
from aullm_dist.config import Config, find_config, load, load_strategy
from aullm_dist.endings import report
from aullm_dist.errors import CheckpointError, UserError
from aullm_dist.signals import StopSignals
from aullm_dist.training.workspace import Mode

DEMO = "demo"
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
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--resume", choices=["auto"], help="continue the run in training.output from its newest checkpoint"
    )
    mode.add_argument("--replace", action="store_true", help="train anew in a run folder that already holds a run")
    parser.add_argument(
        "--offline",
        action="store_true",
        help="never ask the Hugging Face Hub, as with HF_HUB_OFFLINE=1 (compute nodes)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that override the run file")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the main job and return its exit code: 0, or another with one line on stderr for what the user can mend."""
    args = build_parser().parse_intermixed_args(argv)
    log.set_up()
    if args.offline:
        # Read by the Hugging Face libraries when they are imported, which has not happened yet.
        os.environ["HF_HUB_OFFLINE"] = "1"
    signals = StopSignals()
    signals.install()
    try:
        config = load(find_config(args.config or DEMO), args.overrides)
        load_strategy(config.training.strategy)
        if config.model.kernels == "interpret":
            # Read by Triton when it is imported, which has not happened yet.
            os.environ["TRITON_INTERPRET"] = "1"
        if args.overrides and not args.config:
            log.get_logger().info("No --config: settings that are not given are those of the demo")
        return _train(config, _mode(args), signals)
    except (UserError, CheckpointError) as error:
        signals.close()  # the launcher ends with a signal whoever is left, and must be obeyed
        report(error, "train.py", ended=signals.received == "SIGTERM")
        return error.EXIT_CODE
    except KeyboardInterrupt:
        if log.is_main_process():
            sys.stderr.write("train.py: interrupted; --resume auto continues from the newest checkpoint\n")
        return 130


def _mode(args: argparse.Namespace) -> Mode:
    if args.resume:
        return "resume"
    if args.replace:
        return "replace"
    # The demo as it is shipped is there to be tried again; any other run is replaced only when asked.
    return "new" if args.config or args.overrides else "again"


def _train(config: Config, mode: Mode, signals: StopSignals) -> int:
    # Imported here, so that --help and a mistake in the configuration answer at once.
    from aullm_dist.evaluation.metrics import summarise
    from aullm_dist.evaluation.summary import print_summary
    from aullm_dist.training import context
    from aullm_dist.training.life import Life
    from aullm_dist.training.preemption import Preempted
    from aullm_dist.training.run import run

    accelerator = context.start(config.training)
    life = Life(accelerator, config, signals)
    try:
        folder = run(accelerator, config, mode, summarise, life)
        baseline = _baseline_config(config, folder)
        if baseline is not None:
            log.get_logger().info("No-LLM baseline (led_cnn), for comparison")
            run(accelerator, baseline, "resume" if mode == "resume" else "replace", summarise, life)
    except Preempted as agreed:
        stop = agreed
        context.together(accelerator, lambda: life.preempted(stop))
        context.stop(accelerator)
        return 0
    life.ends()
    context.on_main(accelerator, lambda: print_summary(folder, config))
    # Only here: after an error the others may be in a collective, and ending the group would wait for them.
    context.stop(accelerator)
    return 0


def _baseline_config(config: Config, folder: Path) -> Config | None:
    if not config.training.baseline or config.model.llm == "none":
        return None
    baseline = copy.deepcopy(config)
    baseline.model.llm = "none"
    baseline.model.readout = "last"
    baseline.training.output = str(folder / "baseline")
    baseline.model.quantization = baseline.model.compile = "none"
    baseline.model.architecture = None
    baseline.training.baseline = False
    chances = (config.counterfactual.appearance_probability, config.counterfactual.neutral_probability)
    baseline.counterfactual.branches = min(config.counterfactual.branches, sum(chance > 0 for chance in chances))
    if not baseline.data.train:
        from aullm_dist.training.workspace import datasets_of

        baseline.data.train = [str(path) for path in datasets_of(config)[0]]
    return baseline
