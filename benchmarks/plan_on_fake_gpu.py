"""What `aullm-dist plan` predicts for GPUs beside what a run holds on the fake GPU of `tests/fakegpu` (docs/gpu.md).

    python benchmarks/plan_on_fake_gpu.py [--cases NAME ...] [--json FILE]

Each case is a random LLM of some size and a way to train it. The unmodified trainer loads it, takes two steps,
evaluates and saves on a device `cuda` that is made of the CPU, whose allocator counts every byte of every tensor. What
a tensor takes on a GPU it takes there; what a kernel takes for itself while it runs, and what CUDA rounds up, it does
not. Exits with 1 if the peak of a run is off by more than 10 %.
"""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import MIB, ROOT, commit, cores, cpu_name, free_port, markdown_table, versions, write_json
from plan_accuracy import (
    MEMORY_LIMIT,
    PACKAGES,
    WORKER,
    Case,
    compared,
    llm,
    off,
    parse_arguments,
    phases,
    write_base,
    write_case,
)

from aullm_dist.config import load
from aullm_dist.planning.cluster import Cluster
from aullm_dist.planning.planner import PHASES, plan

FAKE_GPU = ROOT / "tests" / "fakegpu" / "run_script.py"
_BF16 = {"precision": "bf16", "max_steps": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeCase(Case):
    """A run to compare.

    Attributes:
        ranks: processes.
    """

    ranks: int = 1


CASES = {
    "tiny": FakeCase(
        architecture=llm("llama", 64, 192, 2, 4, 2, 1000),
        strategy="ddp",
        training={"max_steps": 2, "micro_batch": 2, "global_batch": 2},
    ),
    "packed-bf16": FakeCase(
        architecture=llm("llama", 1024, 2816, 12, 16, 8, 16000),
        strategy="ddp",
        training=_BF16 | {"micro_batch": 2, "global_batch": 4},
    ),
    "padded-fp32": FakeCase(
        architecture=llm("mistral", 768, 2048, 8, 12, 4, 12000),
        strategy="ddp",
        model={"packing": False, "lora_rank": 32},
        training={"max_steps": 2, "micro_batch": 1, "global_batch": 1},
    ),
    "nf4": FakeCase(
        architecture=llm("qwen3", 1280, 4096, 12, 10, 5, 24000, head_dim=128),
        strategy="ddp",
        model={"quantization": "nf4", "lora_rank": 8},
        training=_BF16 | {"micro_batch": 2, "global_batch": 2},
    ),
    "zero3": FakeCase(
        architecture=llm("qwen2", 896, 2432, 12, 14, 2, 16000),
        strategy="zero3",
        # At the shipped 12 million values the layers of so small an LLM would never be let go.
        zero={
            "stage3_max_live_parameters": 8_000_000,
            "stage3_max_reuse_distance": 0,
            "stage3_prefetch_bucket_size": 2_000_000,
        },
        model={"activation_checkpointing": "non_reentrant"},
        training=_BF16 | {"micro_batch": 1, "global_batch": 2},
        ranks=2,
    ),
    "1b-checkpointing": FakeCase(
        architecture=llm("llama", 2048, 8192, 16, 32, 8, 32000),
        strategy="ddp",
        model={"activation_checkpointing": "non_reentrant"},
        training=_BF16 | {"micro_batch": 1, "global_batch": 1},
    ),
}  # fmt: skip


def main() -> int:
    """Run the cases one after the other, print the table, and return 1 if a bar was missed."""
    options = parse_arguments(__doc__, CASES)
    rows = compared(options, CASES, compare)
    misses = [name for name, row in rows.items() if abs(off(row["phases"]["run"])) > MEMORY_LIMIT]
    report = {
        "benchmark": "plan_on_fake_gpu", "command": shlex.join(["python", *sys.argv]), "rows": rows, "missed": misses,
        "date": datetime.now(UTC).date().isoformat(), "cpu": cpu_name(), "cores": cores(),
        "versions": versions(PACKAGES), "commit": commit(),
    }  # fmt: skip
    print("\n".join(table(rows)))
    if options.json:
        write_json(options.json, report)
    for name in misses:
        print(f"MISSED {name}: peak is off by {100 * off(rows[name]['phases']['run']):+.1f} %", file=sys.stderr)
    return int(bool(misses))


def compare(case: FakeCase, folder: Path, timeout: int) -> dict[str, Any]:
    """Return predicted and observed numbers of a case."""
    run_file = write_case(case, folder)
    predicted = plan(load(run_file), Cluster(gpus=case.ranks), speed=False)
    write_base(case.architecture, folder / "base")
    observed = train(run_file, folder, case.ranks, timeout)
    return {
        "strategy": case.strategy,
        "ranks": case.ranks,
        "llm_weights": predicted.sizes["llm_weights"],
        "phases": phases(predicted, observed, on_gpu=True),
        "terms": {
            phase.name: {term.name: term.nbytes for term in phase.terms if not term.on_host and term.nbytes}
            for phase in predicted.phases
        },
    }


def train(run_file: Path, folder: Path, ranks: int, timeout: int) -> list[dict[str, Any]]:
    """Train on the fake GPU and return what each process observed."""
    command = [sys.executable, str(FAKE_GPU), str(WORKER), str(folder), str(run_file)]
    shared = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }  # fmt: skip
    log = folder / "log"
    with log.open("w") as output:
        processes = [
            subprocess.Popen(command, env=shared | {"RANK": str(n), "LOCAL_RANK": str(n)}, stdout=output, stderr=output)
            for n in range(ranks)
        ]
        try:
            codes = [process.wait(timeout) for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(codes):
        sys.exit(f"{run_file}: exit codes {codes}\n" + "\n".join(log.read_text().splitlines()[-12:]))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return memory as a Markdown table in MiB, predicted / observed."""
    lines = []
    for name, row in rows.items():
        pairs = [row["phases"][phase] for phase in (*PHASES, "run")]
        cells = [f"{pair['predicted'] / MIB:.1f} / {pair['observed'] / MIB:.1f}" for pair in pairs]
        weights = f"{row['llm_weights'] / 1e6:.1f}"
        off_by = f"{100 * off(row['phases']['run']):+.1f} %"
        lines.append([name, row["strategy"], row["ranks"], weights, *cells, off_by])
    return markdown_table(("case", "strategy", "GPUs", "10^6 weights", *PHASES, "run", "off"), lines, left=2)


if __name__ == "__main__":
    sys.exit(main())
