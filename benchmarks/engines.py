"""Engine x architecture x precision: loss, peak memory and time per step of real runs in several processes.

    python benchmarks/engines.py [--quick] [--json FILE] [--markdown FILE]

Each row is a run of its own, started as a user would: `accelerate launch` of aullm_dist/train.py on a synthetic corpus
and a tiny backbone (width 128, 4 layers) made in a temporary folder, without dropout, and one evaluation at the end.
Its numbers are read from the run's own TensorBoard scalars. The backbones are small and their weights random: the table
says that the combinations run, what they need beside each other and whether they agree, not how fast a real LLM is.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from common import ROOT, commit, cores, cpu_name, gpu_names, launch_line, markdown_table, median, versions, write_json

from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.data.synthetic import SyntheticSpec, write_corpus
from aullm_dist.files import write_text
from aullm_dist.llm.tiny import ARCHITECTURES, build_tiny_backbone

ENGINES = ("ddp", "zero1", "zero2", "zero3")
PRECISIONS = {
    "fp32": {"training.precision": "fp32"},
    "bf16": {"training.precision": "bf16"},
    "nf4": {"training.precision": "bf16", "model.quantization": "nf4"},
}
GLOBAL_BATCH, MICRO_BATCHES_PER_STEP = 16, 2
# The first steps also pay for what is made once: buckets, caches, partitions.
WARM_UP_STEPS = 2
HIDDEN, LAYERS = 128, 4
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes")
MIB_PER_GIB = 1024
# What says why a run failed, best first: the trainer's own line; the last one of a traceback, in a process group with
# the rank before it; the launcher's account of the process that failed first, a signal's name included.
CLUES = tuple(
    re.compile(pattern, re.MULTILINE)
    for pattern in (
        r"^train\.py: error: .+$",
        r"^(\[rank\d+\]: )?[\w.]*(Error|Exception): .+$",
        r"^Root Cause(?:.*\n)*? *traceback +: (?P<said>Signal .+)$",
        r"^Root Cause(?:.*\n)*? *(?P<said>exitcode .+)$",
    )
)


class RowError(Exception):
    """A run that gave no row; the message is one line."""


@dataclass(frozen=True)
class Bench:
    """What all rows share: where things lie, and how long and in how many processes they run."""

    dataset: Path
    backbones: dict[str, Path]
    zero3: Path
    scratch: Path
    steps: int
    processes: int
    timeout_seconds: int


def main() -> int:
    """Run the rows asked for, print the table, and return 1 if a row failed."""
    options = parse_arguments()
    rows: list[dict] = []
    report = {
        "benchmark": "engines",
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "steps": options.steps,
        "processes": options.processes,
        "global_batch": GLOBAL_BATCH,
        "micro_batch": micro_batch(options.processes),
        "model": {"hidden": HIDDEN, "layers": LAYERS, "weights": "random"},
        "machine": machine(),
        "rows": rows,
    }
    asked = [(e, a, p) for a in options.architectures for p in options.precisions for e in options.engines]
    with tempfile.TemporaryDirectory(prefix="aullm-engines-") as folder:
        bench = set_up(Path(folder), options)
        for number, (engine, architecture, precision) in enumerate(asked, start=1):
            row = run_row(bench, engine, architecture, precision)
            rows.append(row)
            sys.stderr.write(f"{number}/{len(asked)} {describe(row)}\n")
            if options.json:
                write_json(options.json, report)
    page = table(rows) + "\n\n" + footnotes(report) + "\n"
    print(page, end="")
    if options.markdown:
        write_text(options.markdown, page)
    return int(any("error" in row for row in rows))


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, help="default: all, or llama with --quick")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--quick", action="store_true", help="llama only")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps of each run")
    parser.add_argument(
        "--processes", type=int, choices=(1, 2, 4, 8), help="default: 2, or 1 on a machine with a single GPU"
    )
    parser.add_argument("--timeout", type=int, default=900, metavar="SECONDS", help="longest time of one row")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as they finish")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table here")
    options = parser.parse_args()
    if options.steps <= WARM_UP_STEPS:
        parser.error(f"--steps is {options.steps}; allowed: more than the {WARM_UP_STEPS} that are not timed")
    options.processes = options.processes or (1 if gpus == 1 else 2)
    if 0 < gpus < options.processes:
        parser.error(f"--processes is {options.processes}; allowed: at most one per GPU, and this machine has {gpus}")
    options.architectures = options.architectures or (["llama"] if options.quick else list(ARCHITECTURES))
    return options


def micro_batch(processes: int) -> int:
    """Return the clips of one forward pass: every step accumulates, whatever the number of processes."""
    return GLOBAL_BATCH // (processes * MICRO_BATCHES_PER_STEP)


def set_up(folder: Path, options: argparse.Namespace) -> Bench:
    """Make corpus, backbones and the ZeRO-3 configuration in `folder`."""
    spec = SyntheticSpec(
        corpus="casme2", subjects=6, clips_per_subject=4, balance=1.0, num_frames=(8, 12), frame_size=(64, 64)
    )
    write_corpus(spec, folder / "corpus")
    prepare("casme2", folder / "corpus", folder / "dataset", PrepareOptions(size=64, num_workers=1))
    backbones = {
        name: build_tiny_backbone(folder / "backbones" / name, architecture=name, hidden=HIDDEN, layers=LAYERS)
        for name in options.architectures
    }
    zero3 = json.loads((ROOT / "configs" / "deepspeed" / "zero3.json").read_text(encoding="utf-8"))
    # Most parameters of so narrow a model lie below the shipped threshold and would never be partitioned.
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    write_text(folder / "zero3.json", json.dumps(zero3, indent=1) + "\n")
    return Bench(
        dataset=folder / "dataset",
        backbones=backbones,
        zero3=folder / "zero3.json",
        scratch=folder,
        steps=options.steps,
        processes=options.processes,
        timeout_seconds=options.timeout,
    )


def run_row(bench: Bench, engine: str, architecture: str, precision: str) -> dict:
    """Train one combination and return its row, with `error` in place of the numbers if it failed."""
    row = {"engine": engine, "architecture": architecture, "precision": precision}
    output = bench.scratch / "run"
    started = time.perf_counter()
    try:
        launch(bench, overrides(bench, engine, architecture, precision, output))
        row |= measured(output / "tensorboard" / "fold-00", bench.steps)
    except RowError as error:
        row["error"] = str(error)
    shutil.rmtree(output, ignore_errors=True)
    return row | {"wall_seconds": time.perf_counter() - started}


def overrides(bench: Bench, engine: str, architecture: str, precision: str, output: Path) -> list[str]:
    """Return the settings of one run as `section.key=value`."""
    settings = {
        "data.train": json.dumps([str(bench.dataset)]),
        "data.protocol": "grouped",
        "data.folds": 3,
        "data.fold": 0,
        "data.inner_fraction": 0.3,
        "data.workers": 0,
        "model.llm": bench.backbones[architecture],
        "model.dropout": 0.0,
        "training.strategy": bench.zero3 if engine == "zero3" else engine,
        "training.output": output,
        "training.processes": bench.processes,
        "training.global_batch": GLOBAL_BATCH,
        "training.micro_batch": micro_batch(bench.processes),
        "training.max_steps": bench.steps,
        # More than the steps need, so that only the end of the run evaluates.
        "training.epochs": GLOBAL_BATCH * bench.steps,
        "training.evaluate_every_epochs": GLOBAL_BATCH * bench.steps,
        "training.cpu_threads": 1,
        "training.baseline": "false",
        "monitor.log_every_steps": 1,
    }
    return [f"{key}={value}" for key, value in (settings | PRECISIONS[precision]).items()]


def launch(bench: Bench, settings: list[str]) -> None:
    """Train in the processes asked for.

    Raises:
        RowError: the run failed or did not end in time.
    """
    command = launch_line(bench.processes)
    command += [str(ROOT / "aullm_dist" / "train.py"), *settings]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
    ) as process:
        try:
            _, errors = process.communicate(timeout=bench.timeout_seconds)
        except subprocess.TimeoutExpired:
            raise RowError(f"no end after {bench.timeout_seconds} s") from None
        finally:
            end(process)
    if process.returncode:
        raise RowError(reason(errors, process.returncode))


def end(process: subprocess.Popen) -> None:
    """End a launcher that still runs, and what it started: it does not always take its processes with it."""
    if process.poll() is not None:
        return
    family = psutil.Process(process.pid).children(recursive=True)
    for member in (psutil.Process(process.pid), *family):
        # One may have gone with another.
        with contextlib.suppress(psutil.NoSuchProcess):
            member.terminate()
    for left in psutil.wait_procs(family, timeout=20)[1]:
        left.kill()


def reason(errors: str, returncode: int) -> str:
    """Return the one line of `errors` that says why a run failed."""
    found = next(filter(None, (clue.search(errors) for clue in CLUES)), None)
    said = found and (found.groupdict().get("said") or found[0])
    return f"exit code {returncode}: {said or ' '.join(errors.split())[-200:] or 'nothing on stderr'}"


def measured(folder: Path, steps: int) -> dict[str, float]:
    """Read the numbers of a row from the event files in `folder`.

    Raises:
        RowError: the run did not log every step.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    known = events.Tags()["scalars"]

    def values(tag: str) -> list[float]:
        return [event.value for event in events.Scalars(tag)] if tag in known else []

    losses, rates = values("Loss/loss"), values("train/clips_per_second")
    if len(losses) != steps or len(rates) != steps:
        raise RowError(f"{len(losses)} losses and {len(rates)} rates were logged; expected {steps} each")
    if not math.isfinite(losses[-1]):
        raise RowError(f"the loss is {losses[-1]}")
    row = {
        "loss": losses[-1],
        "seconds_per_step": median(GLOBAL_BATCH / rate for rate in rates[WARM_UP_STEPS:]),
    }
    for name in ("host", "gpu"):
        peaks = values(f"memory/{name}_peak_gib")
        if peaks:
            row[f"{name}_peak_mib"] = max(peaks) * MIB_PER_GIB
    return row


def describe(row: dict) -> str:
    """Return a row as one line."""
    name = f"{row['engine']} {row['architecture']} {row['precision']}"
    what = row.get("error") or f"loss {row['loss']:.5f}, {row['seconds_per_step'] * 1000:.0f} ms per step"
    return f"{name}: {what} ({row['wall_seconds']:.0f} s)"


def table(rows: list[dict]) -> str:
    """Return the rows as a Markdown table; a failed one says why in place of its loss."""
    columns: dict[str, Callable[[dict], str]] = {
        "loss": lambda row: f"{row['loss']:.5f}",
        "host peak, MiB": lambda row: f"{row['host_peak_mib']:.0f}",
    }
    if any("gpu_peak_mib" in row for row in rows):
        columns["GPU peak, MiB"] = lambda row: f"{row['gpu_peak_mib']:.1f}"
    columns["ms per step"] = lambda row: f"{row['seconds_per_step'] * 1000:.0f}"
    head = ["architecture", "precision", "engine", *columns]
    lines = []
    for row in rows:
        cells = [row["architecture"], row["precision"], row["engine"]]
        if "error" in row:
            cells += ["failed: " + row["error"].replace("|", "/"), *[""] * (len(columns) - 1)]
        else:
            cells += [cell(row) for cell in columns.values()]
        lines.append(cells)
    return "\n".join(markdown_table(head, lines, left=3))


def footnotes(report: dict) -> str:
    """Return what the numbers mean and where they were measured."""
    made = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    return "\n\n".join(
        (
            f"Loss: of step {report['steps']}. Peaks: of the main process, libraries included. Time: median of the "
            f"steps after the first {WARM_UP_STEPS}. Processes: {report['processes']}; global batch "
            f"{report['global_batch']}, micro-batch {report['micro_batch']}. Tiny backbones of width {HIDDEN} with "
            f"{LAYERS} layers, random weights.",
            "`nf4` is an NF4 base computed in bf16. `zero3` is the shipped zero3.json with "
            "`stage3_param_persistence_threshold: 0`: its own 100000 would leave most of so narrow a model whole.",
            f"Command: `{report['command']}`",
            f"Machine: {made['device']}, {made['cores']} cores, {made['memory_gib']:.1f} GiB memory, Python "
            f"{made['python']}, {versions}, commit {made['commit']}, {report['date']}.",
        )
    )


def machine() -> dict[str, object]:
    """Return where and with what the numbers are measured."""
    return {
        "device": ", ".join([*filter(None, [cpu_name()]), *gpu_names()]) or "unknown CPU",
        "cores": cores(),
        "memory_gib": psutil.virtual_memory().total / 2**30,
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": commit(),
    }


if __name__ == "__main__":
    sys.exit(main())
