"""What `aullm-dist plan` predicts beside what the trainer takes: memory of each phase, bytes of each step.

    python benchmarks/plan_accuracy.py [--cases NAME ...] [--json FILE]

Each case is a random LLM of some size, a strategy and a micro-batch. Two processes train it with the real trainer,
which `accelerate launch` starts; in the cases of folds side by side four do. Memory is RssAnon + RssShmem of each
process, sampled every 5 ms, above what it held after it had trained a backbone of almost no size the same way. On a
machine with GPUs, of which a case uses as many as it has processes, or all, it is `torch.cuda.max_memory_allocated`
instead. Exits with 1 if the peak of a run is off by more than 10 %, or the communication of a step by more than 2 % of
what DeepSpeed's logger counts.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from common import MIB, ROOT, commit, cores, cpu_name, gpu_names, launch_line, versions, write_json
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from aullm_dist.config import load
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.planning.cluster import Cluster
from aullm_dist.planning.planner import PHASES, Plan, plan

WORKER = Path(__file__).with_name("plan_accuracy_worker.py")
AnyCase = TypeVar("AnyCase")
GPUS = torch.cuda.device_count()
STEPS = 3
MEMORY_LIMIT, TRAFFIC_LIMIT = 0.10, 0.02
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")
_RUN = {
    "model": {"dropout": 0.0},
    "data": {
        "protocol": "grouped", "folds": 2, "fold": 0, "inner_fraction": 0.3, "workers": 0,
        "synthetic_subjects": 4, "synthetic_clips": 4, "synthetic_frames": 8,
    },
    # All interventions are drawn, so that every micro-batch is of one size.
    "counterfactual": {"enabled": True, "branches": 3},
    "training": {
        "epochs": 100, "max_steps": STEPS, "evaluate_every_epochs": 100, "cpu_threads": 1, "check_memory": False,
    },
    "monitor": {"tensorboard": False, "log_every_steps": 1},
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A run to compare.

    Attributes:
        architecture: fields of the LLM's config.
        strategy: name of a shipped strategy.
        zero: keys of `zero_optimization` that are changed.
        model, training, data: more settings of the run file.
        processes: that train it.
    """

    architecture: Mapping[str, Any]
    strategy: str
    zero: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 2

    @property
    def ranks(self) -> int:
        """Processes on this machine: of GPUs, as many as there are."""
        return min(self.processes, GPUS or self.processes)


def llm(kind: str, hidden: int, mlp: int, layers: int, heads: int, key_value_heads: int, vocabulary: int, **more: Any):
    """Return the fields of a config."""
    return {
        "model_type": kind, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_value_heads, "vocab_size": vocabulary,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


_NARROW = {
    "stage3_max_live_parameters": 12_000_000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 5_000_000,
}


def _side_by_side(at_once: int, quantization: str, precision: str) -> Case:
    """Return a case of four processes in so many teams, the same LLM and batch of a fold in each."""
    folds = {"fold": 0, "folds": 4} if at_once == 1 else {"fold": None, "folds": at_once}
    return Case(
        architecture=llm("llama", 1536, 5120, 12, 12, 4, 32000),
        strategy="zero3",
        zero=_NARROW,
        model={"quantization": quantization, "activation_checkpointing": "non_reentrant"},
        training={
            "precision": precision, "folds_at_once": at_once, "global_batch": 8, "micro_batch": 8 * at_once // 4,
        },
        data=folds,
        processes=4,
    )  # fmt: skip


CASES = {
    "small-ddp": Case(
        architecture=llm("llama", 1536, 4096, 12, 12, 4, 16000),
        strategy="ddp",
        training={"precision": "bf16", "micro_batch": 4, "global_batch": 8},
    ),
    "medium-zero2": Case(
        architecture=llm("llama", 2048, 5632, 14, 16, 8, 32000),
        strategy="zero2",
        model={"activation_checkpointing": "non_reentrant", "lora_rank": 32},
        training={"precision": "bf16", "micro_batch": 2, "global_batch": 4},
    ),
    "large-zero3": Case(
        architecture=llm("llama", 2048, 8192, 16, 32, 8, 64000),
        strategy="zero3",
        zero=_NARROW,
        model={"quantization": "nf4", "activation_checkpointing": "non_reentrant"},
        training={"precision": "bf16", "micro_batch": 4, "global_batch": 8},
    ),
    # Chosen when the planner was finished; nothing of it was changed for them.
    "qwen3-ddp-nf4": Case(
        architecture=llm("qwen3", 1536, 6144, 18, 12, 4, 48000, head_dim=128),
        strategy="ddp",
        model={"quantization": "nf4", "activation_checkpointing": "reentrant", "lora_rank": 8},
        training={"precision": "bf16", "micro_batch": 8, "global_batch": 16},
    ),
    "mistral-zero1-fp32": Case(
        architecture=llm("mistral", 1280, 3584, 14, 10, 5, 24000, sliding_window=64),
        strategy="zero1",
        model={"lora_rank": 48, "lora_alpha": 96.0},
        training={"precision": "fp32", "micro_batch": 2, "global_batch": 8},
    ),
    "gemma2-zero3": Case(
        architecture=llm(
            "gemma2", 1536, 6144, 12, 12, 6, 40000, head_dim=128, query_pre_attn_scalar=128, sliding_window=64
        ),
        strategy="zero3",
        training={"precision": "bf16", "micro_batch": 3, "global_batch": 6},
    ),
    # Chosen when the planner had followed the trainer's gathering and its fused AdamW; nothing was changed after that.
    "qwen2-zero3-nf4": Case(
        architecture=llm("qwen2", 1792, 4864, 20, 14, 2, 36000),
        strategy="zero3",
        zero=_NARROW,
        model={"quantization": "nf4", "lora_rank": 24},
        training={"precision": "bf16", "micro_batch": 2, "global_batch": 8},
    ),
    "padded-zero2-fp32": Case(
        architecture=llm("llama", 1024, 4096, 10, 16, 4, 20000),
        strategy="zero2",
        model={"packing": False, "readout": "per_au"},
        training={"precision": "fp32", "micro_batch": 3, "global_batch": 12},
    ),
    "mistral-offload": Case(
        architecture=llm("mistral", 1536, 5120, 12, 12, 4, 30000, sliding_window=96),
        strategy="zero3_offload_optimizer",
        model={"activation_checkpointing": "non_reentrant"},
        training={"precision": "bf16", "micro_batch": 4, "global_batch": 8},
    ),
    **{f"folds-{at_once}": _side_by_side(at_once, "nf4", "bf16") for at_once in (1, 2, 4)},
}


def main() -> int:
    """Run the cases, print the table, and return 1 if a bar was missed."""
    options = parse_arguments(__doc__, CASES)
    rows = compared(options, CASES, compare)
    misses = [line for name, row in rows.items() for line in missed(name, row)]
    report = {
        "benchmark": "plan_accuracy", "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(), "rows": rows, "missed": misses,
        "cpu": cpu_name(), "gpus": gpu_names(), "cores": cores(), "versions": versions(PACKAGES), "commit": commit(),
    }  # fmt: skip
    print("\n".join([headline(report), "", *table(rows), "", *traffic_table(rows)]))
    if options.json:
        write_json(options.json, report)
    for line in misses:
        print(f"MISSED {line}", file=sys.stderr)
    return int(bool(misses))


def compared(
    options: argparse.Namespace, cases: Mapping[str, AnyCase], compare: Callable[[AnyCase, Path, int], dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return what `compare` finds of each case that was asked for, in a folder that is removed behind it."""
    rows = {}
    for name in options.cases:
        with tempfile.TemporaryDirectory(prefix="aullm-plan-", dir=options.scratch) as folder:
            rows[name] = compare(cases[name], Path(folder), options.timeout)
        print(f"{name} is measured", file=sys.stderr)
    return rows


def parse_arguments(doc: str, cases: Iterable[str]) -> argparse.Namespace:
    """Parse and check the command line of a benchmark of these cases."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--cases", nargs="+", choices=list(cases), default=list(cases))
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the temporary folders go")
    parser.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="longest time of one run")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def compare(case: Case, folder: Path, timeout: int) -> dict[str, Any]:
    """Return predicted and observed numbers of a case."""
    run_file = write_case(case, folder)
    predicted = plan(load(run_file), Cluster(gpus=case.ranks, cpu=not GPUS))
    write_base(case.architecture, folder / "base")
    observed = launch(run_file, folder, case.ranks, timeout)
    return {
        "strategy": case.strategy,
        "processes": case.ranks,
        "folds_at_once": case.training.get("folds_at_once", 1),
        "llm_weights": predicted.sizes["llm_weights"],
        "phases": phases(predicted, observed, on_gpu=bool(GPUS)),
        "traffic": traffic(predicted, observed),
        "baseline": max(row["baseline"] for row in observed),
    }


def write_case(case: Case, folder: Path) -> Path:
    """Write run file and strategy; the plan is made from them before the LLM is there."""
    strategy = case.strategy
    if strategy != "ddp":
        content = json.loads((ROOT / "configs" / "deepspeed" / f"{strategy}.json").read_text())
        content["zero_optimization"] |= case.zero
        content["comms_logger"] = {"enabled": True, "prof_all": True, "verbose": False, "debug": False, "prof_ops": []}
        path = folder / f"{strategy}.json"
        path.write_text(json.dumps(content))
        strategy = str(path)
    base = folder / "base"
    base.mkdir()
    tokenizer = build_tiny_backbone(folder / "tokenizer")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(base)
    run = {group: dict(values) for group, values in _RUN.items()}
    run["data"] |= case.data
    run["model"] |= {"llm": str(base), "architecture": dict(case.architecture), **case.model}
    run["training"] |= {"strategy": strategy, "output": str(folder / "run"), **case.training}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def write_base(architecture: Mapping[str, Any], folder: Path) -> None:
    """Write an LLM with random weights in bfloat16."""
    config = AutoConfig.for_model(**architecture)
    config.dtype = torch.bfloat16
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)


def launch(run_file: Path, folder: Path, ranks: int, timeout: int) -> list[dict[str, Any]]:
    """Train and return what each process observed."""
    command = [*launch_line(ranks), str(WORKER), str(folder), str(run_file)]
    # glibc's threshold grows with what is freed, and freed layers then stay with the process.
    variables = {
        **os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
    }  # fmt: skip
    with open(folder / "log", "w+") as log:
        try:
            subprocess.run(command, env=variables, timeout=timeout, check=True, stdout=log, stderr=log)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            log.seek(0)
            said = [line for line in log.read().splitlines() if line.startswith("[rank") or "Error: " in line]
            sys.exit(f"{run_file}: failed ({type(error).__name__})\n" + "\n".join(said[-12:]))
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def phases(predicted: Plan, observed: list[dict[str, Any]], on_gpu: bool) -> dict[str, dict[str, int]]:
    """Return predicted and observed bytes of each phase, and of the whole run."""
    found = {phase.name: phase.total(False) if on_gpu else phase.both for phase in predicted.phases}
    seen = {name: max(row["peaks"].get(name, 0) for row in observed) for name in PHASES}
    whole = max(peak for row in observed for peak in row["peaks"].values())
    pairs = {name: {"predicted": found[name], "observed": seen[name]} for name in PHASES}
    return {**pairs, "run": {"predicted": max(found.values()), "observed": whole}}


def traffic(predicted: Plan, observed: list[dict[str, Any]]) -> dict[str, int] | None:
    """Return predicted and logged bytes of the last step, whose order of modules DeepSpeed has learnt; None for DDP."""
    logged = observed[0]["traffic"][-1]
    if not logged:
        return None
    return {"predicted": sum(predicted.network.messages.values()), "observed": sum(logged.values())}


def off(pair: Mapping[str, int]) -> float:
    """Return by which share of what was observed the prediction is off."""
    return pair["predicted"] / pair["observed"] - 1


def missed(name: str, row: dict[str, Any]) -> list[str]:
    """Return a line for each bar that a case missed."""
    lines = []
    for what, pair, limit in (("peak", row["phases"]["run"], MEMORY_LIMIT), ("step", row["traffic"], TRAFFIC_LIMIT)):
        if pair is not None and abs(off(pair)) > limit:
            lines.append(f"{name}: {what} is off by {100 * off(pair):+.1f} %, allowed {100 * limit:.0f} %")
    return lines


def headline(report: dict[str, Any]) -> str:
    """Return where and with what was measured."""
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    return (
        f"{', '.join([report['cpu'], *report['gpus']])}, {report['cores']} cores, "
        f"Python {sys.version.split()[0]}, {packages}, commit {report['commit']}"
    )


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return memory as a Markdown table in MiB, predicted / observed."""
    head = ("case", "strategy", "processes", "10^6 weights", *PHASES, "run", "off")
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for name, row in rows.items():
        cells = [name, row["strategy"], f"{row['processes']}", f"{row['llm_weights'] / 1e6:.0f}"]
        for phase in (*PHASES, "run"):
            pair = row["phases"][phase]
            cells.append(f"{pair['predicted'] / MIB:.0f} / {pair['observed'] / MIB:.0f}")
        lines.append("| " + " | ".join([*cells, f"{100 * off(row['phases']['run']):+.1f} %"]) + " |")
    return lines


def traffic_table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Return the bytes of a step as a Markdown table."""
    lines = ["| case | predicted, bytes of a step | DeepSpeed's logger | off |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        pair = row["traffic"]
        if pair is not None:
            lines.append(f"| {name} | {pair['predicted']} | {pair['observed']} | {100 * off(pair):+.3f} % |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
