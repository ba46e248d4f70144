"""The tables of docs/plan.md: the run files for large LLMs on their machines, and how runs scale to 1024 GPUs.

    python benchmarks/plan_tables.py

Nothing is measured and no GPU is needed: each row is a plan, with the assumptions that `aullm-dist plan` prints.
"""

import dataclasses
import sys

from common import GIB, markdown_table

from aullm_dist.config import Config, find_config, load
from aullm_dist.planning.cluster import Cluster
from aullm_dist.planning.planner import Plan, plan

PER_NODE = 8
RUNS = ("mistral_7b", "llama31_8b", "qwen3_8b", "qwen3_32b", "llama31_70b", "qwen25_72b")
SCALED = (("llama31_8b", "ddp"), ("llama31_70b", "zero3"), ("llama31_70b", "zero3_hpz"))
GPUS = (8, 64, 128, 256, 512, 1024)


def main() -> int:
    """Print both tables as Markdown."""
    print("\n".join([*runs_table(), ""]))
    for name, strategy in SCALED:
        print("\n".join([*scaling_table(name, strategy), ""]))
    return 0


def runs_table() -> list[str]:
    """Return each run file's plan on the GPUs that it is meant for, 80 GiB each."""
    head = (
        "run file", "GPUs", "strategy", "peak of a GPU, GiB", "in phase", "machine memory, GiB",
        "received in a step, GiB", "floor, TFLOP", "clips/s at most", "clips/s assumed", "fits 80 GiB",
    )  # fmt: skip
    rows = []
    for name in RUNS:
        config = load(find_config(name), [])
        gpus = config.training.processes or 1
        made = plan(config, Cluster(gpus=gpus, nodes=-(-gpus // PER_NODE), gpu_memory=80 * GIB))
        row = [
            f"`{name}`", f"{gpus}", config.training.strategy, f"{made.gpu_bytes / GIB:.1f}", made.gpu_peak.name,
            f"{made.host_bytes / GIB:.1f}", f"{made.network.received / GIB:.2f}",
            f"{made.speed.floor_flops / 1e12:.0f}", f"{made.speed.clips_per_second_at_most:.0f}",
            f"{made.speed.clips_per_second:.0f}", "yes" if made.fits else "no",
        ]  # fmt: skip
        rows.append(row)
    return markdown_table(head, rows)


def scaling_table(name: str, strategy: str) -> list[str]:
    """Return plans of more and more GPUs, as many clips for each of them, and what takes most of a step."""
    head = (
        "GPUs", "clips of a step", "peak of a GPU, GiB", "computing, s", "sending within, s", "between machines, s",
        "clips/s", "of 8 GPUs' rate", "longest",
    )  # fmt: skip
    rows = []
    base = None
    for gpus in GPUS:
        config = _scaled(load(find_config(name), []), strategy, gpus)
        made = plan(config, Cluster(gpus=gpus, nodes=gpus // PER_NODE))
        times = step_seconds(made)
        rate = made.speed.clips_per_second
        base = base or rate / gpus
        cells = [
            f"{gpus}", f"{config.training.global_batch}", f"{made.gpu_bytes / GIB:.1f}",
            *(f"{seconds:.3f}" for seconds in times.values()), f"{rate:.0f}", f"{rate / gpus / base:.0%}",
            max(times, key=times.get),
        ]  # fmt: skip
        rows.append(cells)
    return [f"`{name}`, `{strategy}`", "", *markdown_table(head, rows)]


def step_seconds(made: Plan) -> dict[str, float]:
    """Return what a step's time is made of, at the assumed efficiency and with nothing overlapped."""
    network, cluster = made.network, made.cluster
    return {
        "computing": made.speed.compute_seconds / cluster.efficiency,
        "sending within machines": (network.received - network.between_nodes) / cluster.link,
        "sending between machines": network.between_nodes / cluster.interconnect,
    }


def _scaled(config: Config, strategy: str, gpus: int) -> Config:
    batch = config.training.micro_batch * gpus
    training = dataclasses.replace(config.training, strategy=strategy, processes=gpus, global_batch=batch)
    return dataclasses.replace(config, training=training)


if __name__ == "__main__":
    sys.exit(main())
