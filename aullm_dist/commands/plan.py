"""Prints the plan of a run: arguments, tables and JSON of `aullm-dist plan CONFIG`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from aullm_dist.commands.options import show_example
from aullm_dist.errors import UserError

if TYPE_CHECKING:
    from aullm_dist.config import Config
    from aullm_dist.planning.cluster import Cluster


DOES_NOT_FIT = 1
"""Exit code where the plan does not fit into the memory that was given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`."""
    show_example(parser, "aullm-dist plan casme2_loso model.llm=/path/to/llm --gpus 8 --gpu-memory 80GiB")
    parser.add_argument("config", metavar="CONFIG", help="run file, or the name of a shipped one")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that override the run file"
    )
    add = parser.add_argument
    add("--gpus", type=int, metavar="N", help="processes, one per GPU (default: training.processes, else 1)")
    add("--nodes", type=int, default=1, metavar="M", help="machines that they are on (default: 1)")
    add("--gpu-memory", metavar="SIZE", help="of one GPU, such as 80GiB: says whether the run fits")
    add("--host-memory", metavar="SIZE", help="of one machine")
    add(
        "--reserve", default="2GiB", metavar="SIZE",
        help="GPU memory that is left for what cannot be planned (default: 2GiB)",
    )  # fmt: skip
    add("--interconnect", type=float, default=50.0, metavar="GB/S", help="into a machine from the others (default: 50)")
    add("--link", type=float, default=300.0, metavar="GB/S", help="into a GPU within a machine (default: 300)")
    add(
        "--gpu-flops", type=float, metavar="FLOP/S",
        help="peak of a GPU (989e12: H100, bf16, dense), or of a process with --cpu (default: not assumed)",
    )  # fmt: skip
    add(
        "--efficiency", type=float, default=0.4, metavar="SHARE",
        help="share of that peak that a step reaches (default: 0.4)",
    )  # fmt: skip
    add("--prefix-tokens", type=int, metavar="P", help="prompt tokens that all branches share")
    add("--suffix-tokens", type=int, metavar="S", help="prompt tokens of one branch")
    add(
        "--folds", type=int, metavar="F", help="of the protocol: also compare numbers of folds that are trained at once"
    )
    add("--fold-clips", type=int, metavar="C", help="training clips of a fold, for hours in that comparison")
    add("--cpu", action="store_true", help="plan for processes on CPUs, as benchmarks/plan_accuracy.py does")
    add("--json", type=Path, metavar="FILE", help="also write the plan to a file, bytes and all terms")


def run(args: argparse.Namespace) -> int:
    """Print a plan; return 0, or 1 where the run does not fit.

    Raises:
        UserError: the run file, the cluster or the architecture cannot be used, or the strategy not with this model.
    """
    from aullm_dist.config import find_config, load

    return plan_of(load(find_config(args.config), args.overrides), args)


def plan_of(config: "Config", args: argparse.Namespace) -> int:
    """Print the plan of a configuration; as `run`, but for the run file, which is a name here."""
    cluster = _cluster(args, config.training.processes or 1)
    for name, least in (("prefix_tokens", 2), ("suffix_tokens", 2), ("folds", 1), ("fold_clips", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is {value}; allowed: {least} or more")
    if args.fold_clips is not None and args.folds is None:
        raise UserError("--fold-clips is given without --folds; give both, or neither")
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; give a file in one that does")
    return _plan_and_print(args, config, cluster)


def _plan_and_print(args: argparse.Namespace, config: "Config", cluster: "Cluster") -> int:
    import functools
    import json

    from rich.console import Console

    from aullm_dist.files import write_text
    from aullm_dist.planning.advice import advise
    from aullm_dist.planning.planner import plan
    from aullm_dist.planning.report import as_dict, print_plan
    from aullm_dist.planning.side_by_side import as_list, compare, table_of

    make = functools.partial(plan, prefix_tokens=args.prefix_tokens, suffix_tokens=args.suffix_tokens)
    planned = make(config, cluster)
    advice = advise(config, cluster, make) if planned.fits is False else None
    print_plan(Console(highlight=False), args.config, planned, advice)
    described = as_dict(args.config, planned, advice)
    if args.folds is not None:
        choices = compare(config, cluster, make, args.folds, args.fold_clips)
        Console(highlight=False).print(table_of(choices, args.folds, known=args.fold_clips is not None))
        described["folds_at_once"] = as_list(choices)
    if args.json is not None:
        write_text(args.json, json.dumps(described, indent=1) + "\n")
    return DOES_NOT_FIT if planned.fits is False else 0


def _cluster(args: argparse.Namespace, processes: int) -> "Cluster":
    from aullm_dist.planning.cluster import H100_FLOPS, Cluster, parse_size

    def size(name: str) -> int | None:
        given = getattr(args, name)
        return None if given is None else parse_size(given, f"--{name.replace('_', '-')}")

    return Cluster(
        gpus=processes if args.gpus is None else args.gpus,
        nodes=args.nodes,
        gpu_memory=size("gpu_memory"),
        reserve=(0 if args.cpu else size("reserve")) or 0,
        host_memory=size("host_memory"),
        interconnect=args.interconnect * 1e9,
        link=args.link * 1e9,
        gpu_flops=(None if args.cpu else H100_FLOPS) if args.gpu_flops is None else args.gpu_flops,
        efficiency=args.efficiency,
        cpu=args.cpu,
    )
