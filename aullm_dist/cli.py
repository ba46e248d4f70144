"""The `aullm-dist` command: parses, then imports the command that was asked for."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from aullm_dist import __version__, log
from aullm_dist.endings import crash, leave, report
from aullm_dist.errors import UserError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aullm-dist` and return its exit code: 0, or 2 with one line on stderr for a mistake in the input."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        # argparse takes positional arguments behind an option for a mistake.
        args.overrides = [*args.overrides, *rest]
    log.set_up()
    try:
        return args.run_command(args)
    except UserError as error:
        report(error, "aullm-dist")
        return UserError.EXIT_CODE
    except KeyboardInterrupt:
        sys.stderr.write("aullm-dist: interrupted\n")
        return 130
    except BrokenPipeError:
        # Whoever read our output has read enough, as `| head` does; Python must not complain at exit about the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command."""
    # These modules import nothing heavy themselves, so that `--help` answers at once.
    from aullm_dist.config_cli import add_config_arguments, run_config
    from aullm_dist.data.folds_cli import add_folds_arguments, run_folds
    from aullm_dist.data.prepare_cli import add_prepare_arguments, run_prepare
    from aullm_dist.data.synthesize_cli import add_synthesize_arguments, run_synthesize
    from aullm_dist.doctor.doctor_cli import add_doctor_arguments, run_doctor
    from aullm_dist.evaluation.evaluate_cli import (
        add_compare_arguments,
        add_evaluate_arguments,
        run_compare,
        run_evaluate,
    )
    from aullm_dist.model.quantize_cli import add_quantize_arguments, run_quantize
    from aullm_dist.planning.plan_cli import add_plan_arguments, run_plan
    from aullm_dist.release.merge_cli import add_merge_arguments, run_merge
    from aullm_dist.release.predict_cli import add_predict_arguments, run_predict
    from aullm_dist.release.verify_cli import add_release_arguments, run_release_verify
    from aullm_dist.report.report_cli import add_report_arguments, run_report
    from aullm_dist.training.checkpoint_cli import add_checkpoint_arguments, run_checkpoint_verify
    from aullm_dist.training.requeue_cli import add_requeue_arguments, run_requeue

    parser = argparse.ArgumentParser(
        prog="aullm-dist",
        description="Distributed training of AULLM++: action unit detection in micro-expression clips with LLMs.",
        epilog="Training: accelerate launch --quiet aullm_dist/train.py [--config FILE] [section.key=value ...]",
    )
    parser.add_argument("--version", action="version", version=f"aullm-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, help_text: str, add_arguments: Callable[[argparse.ArgumentParser], None], run: Command) -> None:
        command = commands.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
        add_arguments(command)
        command.set_defaults(run_command=run)

    add("prepare", "turn a raw corpus release into a checked dataset", add_prepare_arguments, run_prepare)
    add("folds", "divide prepared datasets into folds, as a JSON to train on", add_folds_arguments, run_folds)
    add("synthesize", "write a synthetic corpus in a real layout", add_synthesize_arguments, run_synthesize)
    add("quantize", "write an LLM in 4 bits, once for all runs", add_quantize_arguments, run_quantize)
    add("plan", "tell what a run takes, before it is started", add_plan_arguments, run_plan)
    add("config", "print every setting, or check a run file", add_config_arguments, run_config)
    add("evaluate", "print and write the tables of a run", add_evaluate_arguments, run_evaluate)
    add("compare", "print the difference of two runs, clip by clip paired", add_compare_arguments, run_compare)
    add("report", "write a page of tables and figures, or an ablation's table", add_report_arguments, run_report)
    add("predict", "tell the AUs of clips with a trained model", add_predict_arguments, run_predict)
    add("merge", "write a trained LLM with its LoRA merged, or a release folder", add_merge_arguments, run_merge)
    add("checkpoint", "inspect checkpoints", add_checkpoint_arguments, run_checkpoint_verify)
    add("release", "inspect release folders", add_release_arguments, run_release_verify)
    add("doctor", "check this machine, or under srun the nodes of a job", add_doctor_arguments, run_doctor)
    add("requeue", "decide whether a SLURM job that ended is to go round again", add_requeue_arguments, run_requeue)
    return parser


if __name__ == "__main__":
    # Several processes: `accelerate launch --module aullm_dist.cli COMMAND`.
    sys.excepthook = crash
    leave(main())
