"""Parses the `aullm-dist` command line, then imports the command that was asked for."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aullm_dist import __version__, log
from aullm_dist.errors import UserError, system_error
from aullm_dist.files import user_path
from aullm_dist.runtime.exits import crash, leave, refuse_unreadable_names, report, show_any_name

COMMANDS = {
    "prepare": "turn a raw corpus release into a checked dataset",
    "folds": "divide prepared datasets into folds, as a JSON to train on",
    "synthesize": "write a synthetic corpus in a real layout",
    "backbone": "check an LLM before a run, or extract a text decoder",
    "quantize": "write an LLM in 4 bits, once for all runs",
    "train": "train a model: `accelerate launch` with the right options",
    "sweep": "train several runs side by side on one LLM: arms and seeds",
    "plan": "estimate the memory, traffic and time of a run before it starts",
    "config": "print every setting, or check a run file",
    "evaluate": "print and write the tables of a run",
    "compare": "print the difference of two runs, clip by clip paired",
    "report": "write a page of tables and figures, or an ablation's table",
    "predict": "predict the AUs of clips with a trained model",
    "app": "serve a page on this machine to try a model on a clip",
    "merge": "write a trained LLM with its LoRA merged, or a release folder",
    "dataset": "verify prepared datasets",
    "checkpoint": "verify checkpoints",
    "release": "verify a release folder, or split it for a server of LLMs",
    "doctor": "check this machine, or under srun the nodes of a job",
    "completion": "print a script with which a shell completes commands and settings",
    "requeue": "decide whether a SLURM job that ended is started again",
}
"""Each command is a module of `aullm_dist.commands` with `add_arguments` and `run`."""
_ANY_NAME = ("prepare", "predict", "dataset")
"""Commands that read files whose names are no UTF-8: clips come as their makers named them."""
_MODULES = {"train": "launch"}
"""Commands whose module has another name: `commands.train` is the main job itself."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `aullm-dist` and return its exit code: 0, or 2 with one line on stderr for a mistake in the input."""
    log.set_up()
    show_any_name()
    try:
        return _run(sys.argv[1:] if argv is None else argv)
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
    except OSError as error:
        report(system_error(error), "aullm-dist")
        return UserError.EXIT_CODE
    except MemoryError as error:
        report(UserError(f"not enough memory ({str(error) or 'no more was said'}); ask for less"), "aullm-dist")
        return UserError.EXIT_CODE


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] not in _ANY_NAME:
        refuse_unreadable_names(argv)
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        # argparse takes positional arguments behind an option for a mistake.
        args.overrides = [*args.overrides, *rest]
    return args.run_command(args)


class _Parser(argparse.ArgumentParser):
    """Read the paths of all commands in one way: `~` is the home folder, which shells leave as it is in `--out=~/x`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, _path)


def _path(text: str) -> Path:
    if not text:
        # `Path` would take it for the current folder.
        raise argparse.ArgumentTypeError("is empty; give a path")
    try:
        return user_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with every command."""
    parser = _Parser(
        prog="aullm-dist",
        description="Distributed training of AULLM++: action unit detection in micro-expression clips with LLMs.",
        epilog="Options of a command: aullm-dist COMMAND --help. A first run needs neither corpus nor LLM: "
        "aullm-dist train. With launcher options of your own: accelerate launch --quiet aullm_dist/train.py "
        "[--config FILE] ...",
    )
    parser.add_argument("--version", action="version", version=f"aullm-dist {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    for name, summary in COMMANDS.items():
        # These modules import nothing heavy themselves, so that `--help` answers at once.
        module = importlib.import_module(f"aullm_dist.commands.{_MODULES.get(name, name)}")
        command = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
        module.add_arguments(command)
        command.set_defaults(run_command=module.run, whole_parser=parser)
    return parser


if __name__ == "__main__":
    # Several processes: `accelerate launch --module aullm_dist.cli COMMAND`.
    sys.excepthook = crash
    leave(main())
