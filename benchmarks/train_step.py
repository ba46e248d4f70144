"""The whole training step: clips/s, tokens/s, distance from the floor, memory and time per part, for LLMs up to 70B.

    python benchmarks/train_step.py PRESET [--json FILE] [--check]

The model, the objective, the optimizer, the loader and the step are the trainer's own; the LLM has its true shape and
random weights, drawn into place weight by weight, and the clips are random and in memory. Before anything is timed, the
packed step's loss is compared with that of one forward per branch: paths that disagree are not reported.
"""

import argparse
import functools
import logging
import platform
import shlex
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from common import GIB, commit, cores, cpu_name, gpu_names, markdown_table, median, percentile, versions, write_json
from train_step_measure import Measured, PartTimes, device_rates, host_waits, peak_bytes, profile_to, timed_steps
from train_step_model import (
    AUS,
    INTERVENTIONS,
    PATHS,
    PRESETS,
    Case,
    Floor,
    Preset,
    along,
    build,
    clips_in_memory,
    config_of,
    floor_of,
    linear_weights,
    set_lengths,
)
from transformers.utils import logging as transformers_logging

from aullm_dist import log
from aullm_dist.data.order import BatchPlan, SampleStream
from aullm_dist.distributed import context
from aullm_dist.errors import UserError
from aullm_dist.model.assembly import BuiltModel
from aullm_dist.monitoring.writer import Throughput
from aullm_dist.training.batches import training_loader
from aullm_dist.training.build import training_recipe
from aullm_dist.training.guard import GradientGuard
from aullm_dist.training.learner import Learner
from aullm_dist.training.objective import Objective
from aullm_dist.training.optimizer import build_optimizer
from aullm_dist.training.step import LossLog, TrainStep

TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
"""Relative difference of the losses of two paths."""
INSTRUMENTED_STEPS = 3
PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "bitsandbytes")


class PathsDisagree(Exception):
    """Two paths of one case give different losses; the message is one line."""


@dataclass
class Bench:
    """What all cases of a preset share."""

    preset: Preset
    options: argparse.Namespace
    accelerator: object
    built: BuiltModel
    optimizer: torch.optim.Optimizer
    shipped_prompt: object
    rates: tuple[float, float]
    profiled: bool = False

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def recomputed(self) -> bool:
        return (self.options.checkpointing or self.preset.checkpointing) != "none"


def main() -> int:
    """Build the preset, check and measure its cases, print the tables; 1 if `--check` finds a target missed."""
    options = parse_arguments()
    transformers_logging.disable_progress_bar()
    # What each case says about its interventions and prompt is in the table.
    log.set_up(logging.WARNING)
    preset = PRESETS[options.preset]
    cases = cases_of(preset, options)
    with tempfile.TemporaryDirectory(prefix="aullm-train-step-") as folder:
        bench = set_up(preset, cases[0], Path(folder), options)
    rows = []
    try:
        for case in cases:
            rows += run_case(bench, case)
    except PathsDisagree as error:
        sys.exit(f"{error}; nothing is reported")
    targets = targets_of(options.preset, rows, bench)
    report = {
        "benchmark": "train_step", "preset": options.preset, "llm": preset.llm, "machine": machine(),
        "command": shlex.join(["python", *sys.argv]), "date": datetime.now(UTC).date().isoformat(),
        "flops_per_second": bench.rates[0], "bytes_per_second": bench.rates[1],
        "weights_of_linear_layers": linear_weights(preset.config()), "rows": rows, "targets": targets,
    }  # fmt: skip
    print("\n".join(page(report)))
    if options.json:
        write_json(options.json, report)
    return int(options.check and not all(target["met"] for target in targets))


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("preset", choices=list(PRESETS))
    parser.add_argument("--clips", type=int, help="clips of a step; this and the next three replace the preset's cases")
    parser.add_argument("--branches", type=int, choices=list(INTERVENTIONS), help="branches of a clip (2)")
    parser.add_argument("--prefix-tokens", type=int, help="0: those of the shipped prompt (96)")
    parser.add_argument("--suffix-tokens", type=int, help="0: those of the shipped prompt (16)")
    parser.add_argument("--paths", nargs="+", choices=PATHS, help="what is measured")
    parser.add_argument("--attention", default="auto", help="as model.attention: auto, prefix, sdpa, eager or flex")
    parser.add_argument("--checkpointing", choices=("none", "non_reentrant", "reentrant"))
    parser.add_argument("--compile", choices=("none", "blocks"), default="none")
    parser.add_argument("--suffix-multiple", type=int, default=1)
    parser.add_argument("--nondeterministic", action="store_true", help="training.deterministic: false")
    parser.add_argument("--workers", type=int, default=2, help="processes of the loader")
    parser.add_argument("--threads", type=int, help="as training.cpu_threads, for CPUs")
    parser.add_argument("--steps", type=int, default=8, help="steps that are timed")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before that")
    parser.add_argument("--rate-side", type=int, help="rows of the matrices that tell the device's rate (GPU: 8192)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="trace of two packed steps of the first case")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target for GPUs is missed")
    options = parser.parse_args()
    if options.preset != "tiny" and not torch.cuda.is_available():
        parser.error(f"{options.preset} needs a GPU, and none was found; allowed without one: tiny")
    if min(options.steps, options.warm_up) < 1:
        parser.error("--steps and --warm-up must be 1 or more")
    return options


def cases_of(preset: Preset, options: argparse.Namespace) -> list[Case]:
    """Return the preset's cases, or the one that the command line describes."""
    given = (options.clips, options.branches, options.prefix_tokens, options.suffix_tokens)
    cases = list(preset.cases)
    if any(value is not None for value in given):
        lengths = [
            default if value is None else (value or None) for value, default in zip(given[2:], (96, 16), strict=True)
        ]
        cases = [Case(options.clips or 16, options.branches or 2, *lengths)]
    if options.paths:
        cases = [Case(**(vars(case) | {"paths": tuple(options.paths)})) for case in cases]
    return cases


def set_up(preset: Preset, case: Case, folder: Path, options: argparse.Namespace) -> Bench:
    """Start the Accelerator and build model and optimizer as a run does."""
    config = config_of(preset, case, options)
    accelerator = context.start(config.training)
    started = time.monotonic()
    built = build(preset, folder / "llm", accelerator, config)
    built.model.train()
    print(f"built in {time.monotonic() - started:.0f} s", file=sys.stderr)
    dtype = torch.float32 if preset.precision == "fp32" else torch.bfloat16
    rates = device_rates(accelerator.device, dtype, options.rate_side)
    optimizer = build_optimizer(built.model, config.training)
    return Bench(preset, options, accelerator, built, optimizer, built.model.reasoner.prompt, rates)


def step_of(bench: Bench, case: Case) -> tuple[TrainStep, object]:
    """Return the trainer's step and the batches of a case."""
    config = config_of(bench.preset, case, bench.options)
    view = clips_in_memory(case.clips, config.data.size)
    step = TrainStep(
        bench.accelerator, Learner(bench.built, bench.built.model, bench.optimizer), Objective.from_config(config),
        config.training, GradientGuard(bench.optimizer, config.training.max_bad_steps, fold=0), accumulation=1,
    )  # fmt: skip
    steps = bench.options.warm_up + bench.options.steps + INSTRUMENTED_STEPS + 4
    loader = training_loader(
        view, view.labels(AUS), training_recipe(config, bench.built), SampleStream(len(view), 0),
        BatchPlan(case.clips, case.clips, 1, 0), (0, steps), config.data.workers, pin=bench.device.type == "cuda",
    )  # fmt: skip
    return step, loader


def run_case(bench: Bench, case: Case) -> list[dict]:
    """Compare the paths of a case, time them, and return a row for each.

    Raises:
        PathsDisagree: their losses differ.
    """
    reasoner = bench.built.model.reasoner
    set_lengths(reasoner, case, bench.shipped_prompt)
    compare(bench, case)
    rows = []
    for path in case.paths:
        with along(reasoner, path, case.clips):
            try:
                row = measure(bench, case, path)
            except torch.cuda.OutOfMemoryError:
                row = {"error": "out of memory"}
        if bench.device.type == "cuda":
            bench.built.model.zero_grad()
            torch.cuda.empty_cache()
        rows.append({"path": path, "clips": case.clips, "branches": case.branches, **lengths(bench), **row})
        said = row.get("error") or f"{row['milliseconds']:.1f} ms"
        print(f"{describe(rows[-1])}: {said}", file=sys.stderr)
    base = next((row for row in rows if row["path"] == "per_branch" and "error" not in row), None)
    for row in rows:
        if base and "error" not in row:
            row["times_per_branch"] = row["clips_per_second"] / base["clips_per_second"]
    return rows


def lengths(bench: Bench) -> dict[str, int]:
    """Return P and S as they are now."""
    prompt = bench.built.model.reasoner.prompt
    return {"prefix_tokens": prompt.prefix_tokens, "suffix_tokens": prompt.suffix_tokens}


def compare(bench: Bench, case: Case) -> None:
    """Compare the loss of the packed step with that of one forward per branch on the same batch, at 16 clips at most.

    Before that the trainer's own check compares packed with padded hidden states.

    Raises:
        PathsDisagree: they differ by more than rounding.
    """
    try:
        bench.built.model.self_check()
    except UserError as error:
        raise PathsDisagree(str(error)) from error
    small = Case(**(vars(case) | {"clips": min(case.clips, 16)}))
    step, loader = step_of(bench, small)
    batch = next(iter(loader)).to(bench.device)
    losses = {}
    with torch.no_grad():
        for path in ("packed", "per_branch"):
            with along(bench.built.model.reasoner, path, small.clips):
                losses[path] = step.forward(batch)[0].item()
    difference = abs(losses["packed"] / losses["per_branch"] - 1)
    if not difference <= TOLERANCES[bench.preset.precision]:
        raise PathsDisagree(f"{case}: losses {losses}, relative difference {difference:.2g}")


def measure(bench: Bench, case: Case, path: str) -> dict:
    """Time the steps of one path, then count its host waits and split its time in steps of their own."""
    options = bench.options
    step, loader = step_of(bench, case)
    batches, losses, rate = iter(loader), LossLog(bench.accelerator), Throughput()
    run = functools.partial(step.run, batches, total_steps=10**6, log=losses, rate=rate)
    for number in range(options.warm_up):
        run(step=number)
    step.guard.wait_for_steps()
    with peak_bytes(bench.device) as peak:
        seconds = timed_steps(bench.device, lambda: run(step=options.warm_up), options.steps)
    step.guard.wait_for_steps()
    tokens = bench.built.tokens(case.clips * case.branches)
    row = row_of(bench, case, Measured(seconds, tokens, peak.value))
    if path == "packed":
        row["host_waits"] = host_waits(bench.device, lambda: run(step=options.warm_up))
        parts = PartTimes(bench.device, step, bench.built.model)
        with parts:
            for _ in range(INSTRUMENTED_STEPS):
                run(step=options.warm_up)
        row["shares"] = parts.shares()
        if options.profile and not bench.profiled:
            bench.profiled = True
            profile_to(options.profile, lambda: [run(step=options.warm_up) for _ in range(2)])
    row["loss"] = losses.read()["loss"]
    return row


def row_of(bench: Bench, case: Case, measured: Measured) -> dict:
    """Return the numbers of a path."""
    floor = floor_of(
        linear_weights(bench.preset.config()),
        measured.tokens,
        recomputed=bench.recomputed,
        packed=bench.preset.quantization == "nf4",
    )
    middle = median(measured.seconds)
    return {
        "tokens": measured.tokens,
        "milliseconds": 1e3 * middle,
        "milliseconds_p20": 1e3 * percentile(measured.seconds, 0.2),
        "milliseconds_p80": 1e3 * percentile(measured.seconds, 0.8),
        "clips_per_second": case.clips / middle,
        "tokens_per_second": measured.tokens / middle,
        **floor_columns(floor, bench.rates, middle),
        "peak_bytes": measured.peak_bytes,
    }


def floor_columns(floor: Floor, rates: tuple[float, float], seconds: float) -> dict[str, float]:
    """Return the floor of a step, its two parts, and how far the step is from it."""
    shortest = floor.seconds(*rates)
    return {
        "flops": floor.flops,
        "unpacked_bytes": floor.unpacked_bytes,
        "floor_arithmetic_ms": 1e3 * floor.flops / rates[0],
        "floor_unpacking_ms": 1e3 * floor.unpacked_bytes / rates[1],
        "times_floor": seconds / shortest,
        "mfu": floor.flops / seconds / rates[0],
    }


def targets_of(preset: str, rows: list[dict], bench: Bench) -> list[dict]:
    """Return the targets that hold for a preset on a GPU, each with what was found."""
    if bench.device.type != "cuda":
        return []
    good = [row for row in rows if row["path"] == "packed" and "error" not in row]
    found: list[tuple[str, float | None, float, bool]] = []
    if preset.startswith("8b"):
        shape = {"clips": 16, "branches": 2, "prefix_tokens": 96, "suffix_tokens": 16}
        fixed = next((row for row in good if shape.items() <= row.items()), {})
        found.append(("packed against one forward per branch, clips/s", fixed.get("times_per_branch"), 4.0, True))
    if preset == "8b-nf4" and not bench.recomputed:
        large = [row["times_floor"] for row in good if row["tokens"] >= 2048]
        found.append(("step of 2,048 tokens or more, times its floor", min(large, default=None), 1.6, False))
    if preset == "70b-nf4":
        peak = max((row["peak_bytes"] / 1e9 for row in good), default=None)
        found.append(("peak memory, GB", peak, 75.0, False))
    return [
        {
            "name": name, "found": value, "bar": bar, "at_least": at_least,
            "met": value is not None and (value >= bar) == at_least,
        }
        for name, value, bar, at_least in found
    ]  # fmt: skip


def describe(row: dict) -> str:
    """Return a row's shape and path."""
    return f"{row['clips']} x K={row['branches']}, P={row['prefix_tokens']}, S={row['suffix_tokens']}, {row['path']}"


def page(report: dict) -> list[str]:
    """Return the tables and what they were measured with."""
    made, rows = report["machine"], report["rows"]
    lines = [
        f"{report['llm']} ({report['preset']}), {report['weights_of_linear_layers'] / 1e9:.3f} G weights in linear "
        f"layers; matrix products {report['flops_per_second'] / 1e12:.3g} TFLOP/s, copies "
        f"{report['bytes_per_second'] / 1e9:.4g} GB/s, both measured here",
        f"{made['device']}, {made['cores']} cores, Python {made['python']}, "
        f"{', '.join(f'{name} {number}' for name, number in made['versions'].items())}, commit {made['commit']}, "
        f"{report['date']}",
        f"`{report['command']}`", "",
    ]  # fmt: skip
    head = ["step", "tokens", "ms (p20-p80)", "clips/s", "tokens/s", "floor ms: arithmetic + unpacking", "x floor"]
    lines += markdown_table([*head, "MFU", "peak GiB", "x per branch"], [cells(row) for row in rows])
    timed = [row for row in rows if "shares" in row]
    names = list(timed[0]["shares"]) if timed else []
    shares = [
        [describe(row), *(f"{100 * row['shares'][name]:.0f} %" for name in names), row["host_waits"]] for row in timed
    ]
    lines += ["", *markdown_table(["time per part", *names, "host waits"], shares)]
    for target in report["targets"]:
        value = "not measured" if target["found"] is None else f"{target['found']:.2f}"
        verdict = "PASS" if target["met"] else "MISS"
        lines += ["", f"{verdict}: {target['name']}: {value} (bar {target['bar']:g})"]
    return lines


def cells(row: dict) -> list[str]:
    """Return the cells of a row of the main table."""
    if "error" in row:
        return [describe(row), row["error"], *[""] * 8]
    times = f"{row['milliseconds']:.1f} ({row['milliseconds_p20']:.1f}-{row['milliseconds_p80']:.1f})"
    floor = f"{row['floor_arithmetic_ms']:.1f} + {row['floor_unpacking_ms']:.1f}"
    against = f"{row['times_per_branch']:.2f}x" if "times_per_branch" in row else ""
    return [
        describe(row), str(row["tokens"]), times, f"{row['clips_per_second']:.1f}", f"{row['tokens_per_second']:.0f}",
        floor, f"{row['times_floor']:.2f}", f"{100 * row['mfu']:.0f} %", f"{row['peak_bytes'] / GIB:.2f}", against,
    ]  # fmt: skip


def machine() -> dict[str, object]:
    """Return where and with what the numbers are measured."""
    return {
        "device": ", ".join([*filter(None, [cpu_name()]), *gpu_names()]) or "unknown CPU",
        "cores": cores(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": commit(),
    }


if __name__ == "__main__":
    sys.exit(main())
