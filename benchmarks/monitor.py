"""What watching a run costs: per step, per logged and sampled step, per evaluation; and what it writes.

    python benchmarks/monitor.py [--json FILE] [--check]

The step, its clock, the logging and the pictures are the trainer's own, on train_step.py's preset `tiny` with 16 clips.
The cost of a step is that of the calls that watch it, timed alone and many times over; blocks of steps with and without
them, in turns, show whether anything was forgotten. On a machine that others use too, the time that the training thread
computes says more than the clock on the wall; both are told.
"""

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from common import markdown_table, median, percentile, write_json
from train_step import Bench, machine, set_up, step_of
from train_step_measure import wait
from train_step_model import AUS, PRESETS, Case, clips_in_memory, config_of

from aullm_dist import log
from aullm_dist.config import Config, MonitorConfig
from aullm_dist.evaluation.answers import Answers
from aullm_dist.monitoring.clock import StepClock
from aullm_dist.monitoring.pictures import Pictures
from aullm_dist.monitoring.writer import Monitor
from aullm_dist.training.progress import LoopMonitor
from aullm_dist.training.step import TrainStep

CASE = Case(16, 3)
STEP_MS, BAR = 100.0, 0.01
"""The cost may be this share of a step of this length."""
HELD_OUT_CLIPS, EVALUATIONS = 200, 3


class NoClock(StepClock):
    """A clock that does nothing, for steps that nobody watches."""

    def begin(self, step: int) -> None:
        """Begin nothing."""

    def mark(self, part: str | None) -> None:
        """Mark nothing."""

    def end(self) -> None:
        """End nothing."""


@dataclass(frozen=True)
class Loop:
    """One step, watched."""

    config: Config
    step: TrainStep
    batches: object
    watch: LoopMonitor

    def run(self, number: int) -> None:
        """Take a step."""
        self.step.run(self.batches, number, 10**6, self.watch.losses, self.watch.rate)

    def log(self, number: int) -> None:
        """Report what the steps left behind, as the loop does at logged steps."""
        self.step.guard.wait_for_steps()
        self.watch.logged(number + 1, 0.0)


def main() -> int:
    """Measure, print the tables; 1 if `--check` finds more than the bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, help="as training.cpu_threads, for CPUs")
    parser.add_argument("--blocks", type=int, default=8, help="blocks of logged steps with and without watching")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--check", action="store_true", help="exit with 1 above the bar")
    options = parser.parse_args()
    log.set_up(30)
    defaults = {"checkpointing": None, "attention": "auto", "compile": "none", "suffix_multiple": 1, "workers": 0}
    options = argparse.Namespace(**vars(options), **defaults, nondeterministic=False, steps=0, warm_up=0)
    with tempfile.TemporaryDirectory(prefix="aullm-monitor-") as folder:
        options.steps = 4 * options.blocks * MonitorConfig().log_every_steps + 100
        bench = set_up(PRESETS["tiny"], CASE, Path(folder) / "llm", options)
        report = measure(bench, Path(folder))
    report |= {
        "benchmark": "monitor", "machine": machine(), "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
    }  # fmt: skip
    print("\n".join(page(report)))
    if options.json:
        write_json(options.json, report)
    return int(options.check and report["share"] > BAR)


def measure(bench: Bench, folder: Path) -> dict:
    """Return all numbers."""
    monitor = Monitor(folder / "events", active=True, purge_step=None)
    loop = loop_of(bench, monitor)
    settings = loop.config.monitor
    for number in range(3):
        loop.run(number)
    loop.log(2)
    costs = costs_of(bench, loop)
    each = settings.log_every_steps
    every = {"clock": 1, "logged": each, "sampled": settings.communication_every_steps}
    per_step = [sum(costs[name][kind] / steps for name, steps in every.items()) for kind in (0, 1)]
    watched, alone = in_turns(bench, loop, each)
    monitor.close()
    evaluation = evaluation_of(bench, loop.config, folder / "evaluations")
    return {
        "milliseconds": {name: [1e3 * seconds for seconds in pair] for name, pair in costs.items()},
        "every_steps": every,
        "per_step_ms": [1e3 * seconds for seconds in per_step],
        # What the GPU waits for is the wall's; on a CPU that others use too the wall counts their work as well.
        "share": 1e3 * per_step[0 if bench.device.type == "cuda" else 1] / STEP_MS,
        "watched_ms": [1e3 * seconds for seconds in watched],
        "alone_ms": [1e3 * seconds for seconds in alone],
        "trained_tensors": len(loop.step.trainables),
        "evaluation": evaluation,
    }


def loop_of(bench: Bench, monitor: Monitor) -> Loop:
    """Return the trainer's step with everything that watches it."""
    config = config_of(bench.preset, CASE, bench.options)
    step, loader = step_of(bench, CASE)
    step.clock = StepClock(bench.device)
    watch = LoopMonitor(
        bench.accelerator, config, bench.built, step, monitor, name="Bench", fold=0, span=(0, 10**6)
    )  # fmt: skip
    return Loop(config, step, iter(loader), watch)


def costs_of(bench: Bench, loop: Loop) -> dict[str, tuple[float, float]]:
    """Return seconds, on the wall and computed, of what watches a step, a logged step and a sampled one."""
    every = loop.config.monitor.communication_every_steps
    plain, sampling = StepClock(bench.device), StepClock(bench.device, loop.step.trainables, sample_every=1)

    def one_step(clock: StepClock) -> None:
        clock.begin(every - 1)
        for part in (None, "data", "forward"):
            clock.mark(part)
        clock.backward_ended()
        clock.mark("optimizer")
        clock.end()

    def gradients(clock: StepClock) -> None:
        # What a sampled step adds: a look at each trained tensor's gradient.
        clock.begin(0)
        for _ in loop.step.trainables:
            clock._sample._gradient(loop.step.trainables[0])
        clock.mark(None)
        clock.end()

    clock = timed(bench, lambda: one_step(plain), 300)
    sampled = timed(bench, lambda: gradients(sampling), 50)
    numbers = iter(range(3, 100))

    def one_logged() -> None:
        number = next(numbers)
        loop.run(number)
        loop.step.guard.wait_for_steps()

    logged = timed(bench, lambda: loop.log(0), 20, before=one_logged)
    return {"clock": clock, "logged": logged, "sampled": sampled}


def timed(
    bench: Bench, work: Callable[[], object], count: int, before: Callable[[], object] = lambda: None
) -> tuple[float, float]:
    """Return median seconds of `work`: on the wall, and that the calling thread computed."""
    seconds, computed = [], []
    for _ in range(count):
        before()
        wait(bench.device)
        started, at = time.perf_counter(), time.thread_time()
        work()
        computed.append(time.thread_time() - at)
        seconds.append(time.perf_counter() - started)
    return median(seconds), median(computed)


def in_turns(bench: Bench, loop: Loop, each: int) -> tuple[list[float], list[float]]:
    """Return seconds per step of blocks that are watched, and of blocks that are not, one after the other."""
    watched, alone = [], []
    clocks = {True: loop.step.clock, False: NoClock(bench.device)}
    number = 100
    for block in range(2 * bench.options.blocks):
        # Either kind is first as often as the other.
        watches = (block % 2 == 0) == (block // 2 % 2 == 0)
        loop.step.clock = clocks[watches]
        wait(bench.device)
        started = time.perf_counter()
        for _ in range(each):
            loop.run(number)
            number += 1
        if watches:
            loop.log(number)
        else:
            wait(bench.device)
        (watched if watches else alone).append((time.perf_counter() - started) / each)
    loop.step.clock = clocks[True]
    return watched, alone


def evaluation_of(bench: Bench, config: Config, folder: Path) -> dict[str, float]:
    """Return seconds that the pictures of an evaluation take, and bytes that they leave behind."""
    monitor = Monitor(folder, active=True, purge_step=None)
    view = clips_in_memory(HELD_OUT_CLIPS, config.data.size)
    pictures = Pictures(bench.accelerator, config, bench.built, view, AUS)
    ids, subjects, corpora = zip(*((s.sample_id, s.subject, s.corpus) for s in view.samples), strict=True)
    logits = np.random.default_rng(0).normal(size=(len(view), len(AUS)))
    answers = Answers(ids, subjects, corpora, view.labels(AUS), logits)
    seconds, explained = [], []
    for number in range(EVALUATIONS):
        started = time.perf_counter()
        pictures.show(bench.built.model, answers, monitor, number)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        pictures.explainer.explain(bench.built.model)
        explained.append(time.perf_counter() - started)
    monitor.close()
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    events = sum(size for path, size in sizes.items() if path.name.startswith("events.out."))
    return {
        "seconds": min(seconds), "of_that_the_model": min(explained), "first_seconds": seconds[0],
        "event_bytes": events / EVALUATIONS, "projector_bytes": sum(sizes.values()) - events, "clips": HELD_OUT_CLIPS,
    }  # fmt: skip


def page(report: dict) -> list[str]:
    """Return the tables and what they were measured with."""
    made, cost, evaluation = report["machine"], report["milliseconds"], report["evaluation"]
    names = {
        "clock": "the clock of a step", "logged": "a logged step",
        "sampled": f"a sampled step, {report['trained_tensors']} trained tensors (several processes)",
    }  # fmt: skip
    rows = [
        [names[key], *(f"{value:.3f}" for value in cost[key]), every] for key, every in report["every_steps"].items()
    ]
    rows.append(["**per step**", *(f"{value:.3f}" for value in report["per_step_ms"]), ""])
    lines = [
        f"{made['device']}, {made['cores']} cores, Python {made['python']}, "
        f"{', '.join(f'{name} {number}' for name, number in made['versions'].items())}, commit {made['commit']}, "
        f"{report['date']}",
        f"`{report['command']}`", "", *markdown_table(["what", "ms", "ms computed", "every so many steps"], rows), "",
    ]  # fmt: skip
    turns = [
        [name, f"{median(values):.1f}", f"{percentile(values, 0.2):.1f}-{percentile(values, 0.8):.1f}", len(values)]
        for name, values in (("watched", report["watched_ms"]), ("not watched", report["alone_ms"]))
    ]
    lines += [*markdown_table(["blocks in turns", "ms per step", "p20-p80", "blocks"], turns), ""]
    shown = [
        [
            f"{evaluation['clips']} clips", f"{evaluation['seconds']:.2f}", f"{evaluation['of_that_the_model']:.2f}",
            f"{evaluation['first_seconds']:.2f}", f"{evaluation['event_bytes'] / 1e3:.0f}",
            f"{evaluation['projector_bytes'] / 1e3:.0f}",
        ]
    ]  # fmt: skip
    head = ["pictures of an evaluation", "s", "of that the model", "the first", "kB of events", "kB of projector"]
    lines += markdown_table(head, shown)
    verdict = "PASS" if report["share"] <= BAR else "MISS"
    return [*lines, "", f"{verdict}: cost of a step of {STEP_MS:.0f} ms: {100 * report['share']:.2f} % (bar 1 %)"]


if __name__ == "__main__":
    sys.exit(main())
