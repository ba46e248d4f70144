"""`aullm-dist plan CONFIG`: arguments, tables and JSON."""

import argparse
from pathlib import Path

from aullm_dist.errors import UserError

DOES_NOT_FIT = 1
"""Exit code where the plan does not fit into the memory that was given."""


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `plan`."""
    parser.add_argument("config", metavar="CONFIG", help="run file, or the name of a shipped one")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that override the run file"
    )
    add = parser.add_argument
    add("--gpus", type=int, metavar="N", help="processes, one per GPU (training.processes, else 1)")
    add("--nodes", type=int, default=1, metavar="M", help="machines that they are on (1)")
    add("--gpu-memory", metavar="SIZE", help="of one GPU, such as 80GiB: says whether the run fits")
    add("--host-memory", metavar="SIZE", help="of one machine")
    add("--reserve", default="2GiB", metavar="SIZE", help="GPU memory that is left for what cannot be planned (2GiB)")
    add("--interconnect", type=float, default=50.0, metavar="GB/S", help="into a machine from the others (50)")
    add("--link", type=float, default=300.0, metavar="GB/S", help="into a GPU within a machine (300)")
    add("--gpu-flops", type=float, default=989e12, metavar="FLOP/S", help="peak of a GPU (989e12: H100, bf16, dense)")
    add("--efficiency", type=float, default=0.4, metavar="SHARE", help="share of that peak that a step reaches (0.4)")
    add("--prefix-tokens", type=int, metavar="P", help="prompt tokens that all branches share")
    add("--suffix-tokens", type=int, metavar="S", help="prompt tokens of one branch")
    add("--cpu", action="store_true", help="plan for processes on CPUs, as benchmarks/plan_accuracy.py does")
    add("--json", type=Path, metavar="FILE", help="also write the plan to a file, bytes and all terms")


def run_plan(args: argparse.Namespace) -> int:
    """Print a plan; return 0, or 1 where the run does not fit.

    Raises:
        UserError: the run file, the cluster or the architecture cannot be used, or the strategy not with this model.
    """
    from aullm_dist.config import find_config, load

    config = load(find_config(args.config), args.overrides)
    cluster = _cluster(args, config.training.processes or 1)
    for name in ("prefix_tokens", "suffix_tokens"):
        value = getattr(args, name)
        if value is not None and value < 2:
            raise UserError(f"--{name.replace('_', '-')} is {value}; allowed: 2 or more")
    if args.json is not None and not args.json.parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist; give a file in one that does")
    return _plan_and_print(args, config, cluster)


def _plan_and_print(args: argparse.Namespace, config: object, cluster: object) -> int:
    import functools
    import json

    from rich.console import Console

    from aullm_dist.files import write_text
    from aullm_dist.planning.advice import advise
    from aullm_dist.planning.planner import plan
    from aullm_dist.planning.report import as_dict, print_plan

    make = functools.partial(plan, prefix_tokens=args.prefix_tokens, suffix_tokens=args.suffix_tokens)
    planned = make(config, cluster)
    advice = advise(config, cluster, make) if planned.fits is False else None
    print_plan(Console(highlight=False), args.config, planned, advice)
    if args.json is not None:
        write_text(args.json, json.dumps(as_dict(args.config, planned, advice), indent=1) + "\n")
    return DOES_NOT_FIT if planned.fits is False else 0


def _cluster(args: argparse.Namespace, processes: int) -> object:
    from aullm_dist.planning.cluster import Cluster, parse_size

    def size(name: str) -> int | None:
        given = getattr(args, name)
        return None if given is None else parse_size(given, f"--{name.replace('_', '-')}")

    return Cluster(
        gpus=processes if args.gpus is None else args.gpus,
        nodes=args.nodes,
        gpu_memory=size("gpu_memory"),
        reserve=0 if args.cpu else size("reserve"),
        host_memory=size("host_memory"),
        interconnect=args.interconnect * 1e9,
        link=args.link * 1e9,
        gpu_flops=args.gpu_flops,
        efficiency=args.efficiency,
        cpu=args.cpu,
    )
