"""Wall time of a whole protocol of 8 folds, trained one after another or several side by side on one divided LLM.

    python benchmarks/folds.py [--processes 2 4] [--gib 0.02] [--precision fp32] [--json FILE] [--markdown FILE]

Each row is a run of its own, `accelerate launch` of the main job under ZeRO-3 on an NF4 base: a random Llama of the
demo's tokenizer and a synthetic corpus of 8 subjects, left out one by one. Every row has the largest micro-batch that
its number of folds at once allows. Bytes and memory are counted from the moment when the model is loaded to the end of
the last fold, evaluations, checkpoints and empty passes among them. The losses of all rows of as many processes must
agree, as dropout is off. It runs unchanged on GPUs, one for each process.

N folds at once are held against one after another: the LLM gathered 1/N times per fold-step, memory, wall time. Which
of these bounds a row misses is printed; the exit code is 1 where a run failed or its losses are others, and with
--strict where a bound is missed.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from common import MIB, ROOT, commit, cores, cpu_name, gpu_names, launch_line, markdown_table, versions, write_json

from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.data.synthetic import SyntheticSpec, write_corpus
from aullm_dist.files import write_text
from aullm_dist.llm.tiny import build_tiny_backbone

WORKER = Path(__file__).with_name("folds_worker.py")
FOLDS, CLIPS_PER_SUBJECT, GLOBAL_BATCH = 8, 4, 8
WIDTHS = ((0.5, 1024), (0.0, 512))
"""GiB in bf16 from which the random Llama has a width."""
BF16 = 2
AGREES = 1e-3
"""Relative difference of a loss that another order of sums explains after a few steps of Adam."""
BYTES_WITHIN, PEAK_GROWS = 0.05, 1.1
FASTER = {2: 1.4, 4: 2.0}
"""By how much at least all folds end sooner with so many at once; other numbers must not be slower."""
SET_OF_TRAINED = 4
"""Float32 copies that a process holds of what it trains: weights, gradients, AdamW's two moments."""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes")


class RowError(Exception):
    """A run that gave no row; the message says why."""


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    scratch: Path
    dataset: Path
    llm: Path
    strategy: Path
    options: argparse.Namespace


def main() -> int:
    """Run all rows, print the table, and return 1 if one failed or its losses are others."""
    options = parse_arguments()
    rows: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="aullm-folds-", dir=options.scratch) as folder:
        bench = set_up(Path(folder), options)
        for processes, at_once in asked(options):
            rows.append(run_row(bench, processes, at_once))
            print(describe(rows[-1]), file=sys.stderr)
        weights = sum(path.stat().st_size for path in bench.llm.glob("*.safetensors"))
    report = {
        "benchmark": "folds", "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(), "folds": FOLDS, "steps": options.steps,
        "global_batch": GLOBAL_BATCH, "llm_bytes": weights, "rows": rows, "machine": machine(),
    }  # fmt: skip
    report["missed"] = misses = missed(rows)
    page = "\n".join([*table(rows), "", footnote(report), "", bounds(misses)]) + "\n"
    print(page, end="")
    if options.markdown:
        write_text(options.markdown, page)
    if options.json:
        write_json(options.json, report)
    failed = any("error" in row or row["difference"] > AGREES for row in rows)
    return int(failed or (options.strict and bool(misses)))


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--processes", type=int, nargs="+", choices=(2, 4, 8), help="default: 2 4, or the GPUs")
    parser.add_argument("--gib", type=float, default=0.02, help="size of the random LLM in bf16 (0.02)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each fold (2)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the temporary folder goes")
    parser.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="longest time of one row")
    parser.add_argument("--strict", action="store_true", help="a bound that is missed is a failure")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    options = parser.parse_args()
    gpus = torch.cuda.device_count()
    options.processes = options.processes or ([n for n in (2, 4, 8) if n <= gpus] if gpus else [2, 4])
    if not options.processes or 0 < gpus < max(options.processes):
        parser.error(f"this machine has {gpus} GPUs; allowed: --processes of at most as many, from 2")
    if options.steps < 1 or options.gib <= 0:
        parser.error("--steps and --gib: allowed are numbers above 0")
    return options


def asked(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Yield processes and folds at once of each row."""
    for processes in options.processes:
        for at_once in (n for n in (1, 2, 4, 8) if n <= processes):
            yield processes, at_once


def set_up(folder: Path, options: argparse.Namespace) -> Bench:
    """Make corpus, LLM and strategy."""
    spec = SyntheticSpec(
        corpus="casme2", subjects=FOLDS, clips_per_subject=CLIPS_PER_SUBJECT, balance=1.0, num_frames=(8, 12),
        frame_size=(64, 64),
    )  # fmt: skip
    write_corpus(spec, folder / "corpus")
    prepare("casme2", folder / "corpus", folder / "dataset", PrepareOptions(size=64, num_workers=1))
    width = next(width for least, width in WIDTHS if options.gib >= least)
    # Queries and outputs, half as many keys and values, three matrices of the MLP of twice the width.
    layers = max(2, round(options.gib * 2**30 / (BF16 * 9 * width**2)))
    llm = build_tiny_backbone(folder / "llm", hidden=width, layers=layers, heads=width // 64)
    zero3 = json.loads((ROOT / "configs" / "deepspeed" / "zero3.json").read_text(encoding="utf-8"))
    # 10^9 live values would hold all of so small an LLM: two layers, of which four NF4 weights are one value.
    layer = 9 * width**2 // 4
    zero3["zero_optimization"] |= {
        "stage3_max_live_parameters": 2 * layer,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": layer,
        "stage3_param_persistence_threshold": width,
    }
    write_text(folder / "zero3.json", json.dumps(zero3, indent=1) + "\n")
    return Bench(folder, folder / "dataset", llm, folder / "zero3.json", options)


def run_row(bench: Bench, processes: int, at_once: int) -> dict:
    """Train all folds and return the row, with `error` in place of the numbers if that failed."""
    row: dict = {"processes": processes, "folds_at_once": at_once}
    row["micro_batch"] = GLOBAL_BATCH * at_once // processes
    folder = bench.scratch / f"{processes}-{at_once}"
    folder.mkdir()
    try:
        launch(bench, folder, row)
        ranks = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(processes)]
        row["seconds"] = max(rank["seconds"] for rank in ranks)
        for what in ("gathered", "packed"):
            row[f"{what}_per_fold_step"] = max(rank[what] for rank in ranks) / (FOLDS * bench.options.steps)
        row["peaks"] = [rank["peak"] for rank in ranks]
        row["trained"] = trained_bytes(folder / "run")
        row["losses"] = losses(folder / "run")
        first = folder.with_name(f"{processes}-1") / "run"
        row["difference"] = difference(losses(first), row["losses"])
    except RowError as error:
        row["error"] = str(error)
    return row


def launch(bench: Bench, folder: Path, row: dict) -> None:
    """Start the processes and wait for them.

    Raises:
        RowError: the run failed or took too long.
    """
    options = bench.options
    settings = {
        "data.train": json.dumps([str(bench.dataset)]), "data.protocol": "loso", "data.fold": "null",
        "data.workers": 0, "model.llm": bench.llm, "model.quantization": "nf4", "model.lora_rank": 4,
        "model.dropout": 0.0, "model.activation_checkpointing": "non_reentrant", "counterfactual.enabled": "false",
        "training.precision": options.precision, "training.strategy": bench.strategy,
        "training.folds_at_once": row["folds_at_once"], "training.processes": row["processes"],
        "training.global_batch": GLOBAL_BATCH, "training.micro_batch": row["micro_batch"], "training.epochs": 99,
        "training.max_steps": options.steps, "training.evaluate_every_epochs": 99, "training.baseline": "false",
        "training.check_memory": "false", "training.output": folder / "run", "monitor.log_every_steps": 1,
        "monitor.clips": 0, "monitor.projector_clips": 0, "monitor.communication_every_steps": 0,
    }  # fmt: skip
    command = [*launch_line(row["processes"]), str(WORKER), str(folder), *(f"{k}={v}" for k, v in settings.items())]
    variables = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=options.timeout, env=variables
        )
    except subprocess.TimeoutExpired:
        raise RowError(f"took more than {options.timeout} s") from None
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines()[-1:]
        raise RowError(lines[0] if lines else f"exit code {done.returncode}")


def losses(run: Path) -> dict[str, list[float]]:
    """Return the loss of every step of each fold, from the run's own TensorBoard scalars."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for folder in sorted((run / "tensorboard").glob("fold-*")):
        events = EventAccumulator(str(folder))
        events.Reload()
        with contextlib.suppress(KeyError):
            found[folder.name] = [event.value for event in events.Scalars("Loss/loss")]
    if len(found) != FOLDS:
        raise RowError(f"{len(found)} of {FOLDS} folds have losses")
    return found


def difference(first: dict[str, list[float]], second: dict[str, list[float]]) -> float:
    """Return the largest relative difference of a loss; infinity where there are others."""
    if {fold: len(values) for fold, values in first.items()} != {fold: len(values) for fold, values in second.items()}:
        return math.inf
    return max(abs(a - b) / abs(a) for fold in first for a, b in zip(first[fold], second[fold], strict=True))


def trained_bytes(run: Path) -> int:
    """Return bytes of what one fold trains, from a checkpoint of the run."""
    checkpoint = min((run / "fold-00" / "checkpoints").glob("step-*"))
    return sum(path.stat().st_size for path in checkpoint.glob("*.safetensors") if path.name != "optimizer.safetensors")


def missed(rows: list[dict]) -> list[str]:
    """Return a line for each bound that a row misses, beside the row of one fold after another."""
    alone = {row["processes"]: row for row in rows if row["folds_at_once"] == 1 and "error" not in row}
    lines = []
    for row in rows:
        first, at_once = alone.get(row["processes"]), row["folds_at_once"]
        if first is None or at_once == 1 or "error" in row:
            continue
        name = f"{row['processes']} processes, {at_once} folds at once"
        share = row["packed_per_fold_step"] / first["packed_per_fold_step"] * at_once
        if abs(share - 1) > BYTES_WITHIN:
            lines.append(f"{name}: gathered {share:.2f}/{at_once} per fold-step, allowed {1 + BYTES_WITHIN}/{at_once}")
        limit = PEAK_GROWS * max(first["peaks"]) + SET_OF_TRAINED * row["trained"]
        if max(row["peaks"]) > limit:
            lines.append(f"{name}: {max(row['peaks']) / MIB:.0f} MiB at the peak, allowed {limit / MIB:.0f}")
        faster, wanted = first["seconds"] / row["seconds"], FASTER.get(at_once, 1.0)
        if faster < wanted:
            lines.append(f"{name}: {faster:.2f}x faster, wanted {wanted}x")
    return lines


def bounds(misses: list[str]) -> str:
    """Return in words what was asked of the rows, and what they missed."""
    asked_of = (
        f"Bounds: gathered per fold-step 1/N within {BYTES_WITHIN:.0%}; peak at most {PEAK_GROWS} x that of N=1 and "
        "one set of what is trained (weights, gradients, moments); "
        + ", ".join(f"{times}x faster at N={at_once}" for at_once, times in FASTER.items())
    )
    return f"{asked_of}. " + ("All are met." if not misses else "Missed: " + "; ".join(misses) + ".")


def describe(row: dict) -> str:
    """Return a row in words."""
    name = f"{row['processes']} processes, {row['folds_at_once']} folds at once"
    return f"{name}: {row.get('error') or format(row['seconds'], '.1f') + ' s'}"


def table(rows: list[dict]) -> list[str]:
    """Return the rows as a Markdown table, wall time beside that of one fold after another."""
    alone = {row["processes"]: row.get("seconds") for row in rows if row["folds_at_once"] == 1}
    head = ("processes", "folds at once", "micro-batch", "all folds, s", "faster", "LLM gathered per fold-step, MiB",
            "with what is trained, MiB", "peak memory, MiB", "losses differ by")  # fmt: skip
    lines = []
    for row in rows:
        start = (row["processes"], row["folds_at_once"], row["micro_batch"])
        if "error" in row:
            lines.append((*start, row["error"], *[""] * 5))
            continue
        before = alone[row["processes"]]
        measured = (
            f"{row['seconds']:.1f}",
            f"{before / row['seconds']:.2f}x" if before else "",
            f"{row['packed_per_fold_step'] / MIB:.1f}",
            f"{row['gathered_per_fold_step'] / MIB:.1f}",
            " ".join(f"{peak / MIB:.0f}" for peak in row["peaks"]),
            f"{row['difference']:.0e}",
        )
        lines.append((*start, *measured))
    return markdown_table(head, lines, left=0)


def footnote(report: dict) -> str:
    """Return what the table was measured on."""
    where = report["machine"]
    device = ", ".join(sorted(set(where["gpus"]))) or f"{where['cpu']}, {where['cores']} cores"
    libraries = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    return (
        f"{FOLDS} folds of {report['steps']} steps of {GLOBAL_BATCH} clips, a random Llama of "
        f"{report['llm_bytes'] / MIB:.0f} MiB in its files. Command: `{report['command']}`, commit {where['commit']}, "
        f"{report['date']}; {device}; load average {where['load']:.1f}; {libraries}."
    )


def machine() -> dict:
    """Return what the rows ran on."""
    return {
        "cpu": cpu_name(), "cores": cores(), "gpus": gpu_names(), "platform": platform.platform(),
        "load": os.getloadavg()[0], "versions": versions(PACKAGES), "commit": commit(),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
