"""One rank of benchmarks/plan_accuracy.py: the real trainer, its memory sampled and its communication counted."""

import gc
import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from aullm_dist.config import Config, load
from aullm_dist.distributed import context
from aullm_dist.runs import workspace
from aullm_dist.runs.lifecycle import Life
from aullm_dist.runtime.signals import StopSignals
from aullm_dist.training import build, fold, learner, run, step

PERIOD_SECONDS = 0.005


class Sampler(threading.Thread):
    """Samples this process's memory; keeps the highest value in bytes of each phase."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase = "before"
        self.peaks: dict[str, int] = {}
        self._lock = threading.Lock()

    def run(self) -> None:
        """Sample until the process ends."""
        while True:
            self.sample()
            time.sleep(PERIOD_SECONDS)

    def sample(self) -> int:
        """Return the process's bytes, and count them for the present phase."""
        with self._lock:
            now = memory()
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), now)
        return now

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self.sample()
        with self._lock:
            self.phase = phase
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
        self.sample()


def memory() -> int:
    """Return bytes of RssAnon + RssShmem of this process; on a GPU what its tensors took at most in this phase."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
    return (kib["RssAnon"] + kib["RssShmem"]) * 1024


def warm_up(accelerator: Accelerator, config: Config) -> None:
    """Train a backbone of almost no size the same way: what libraries load on their way belongs to the baseline."""
    folders = context.on_main(accelerator, lambda: workspace.datasets_of(config))[0]
    tiny = config.changed(
        {
            "model.llm": "tiny",
            "model.architecture": None,
            "model.llm_hidden": 64,
            "model.llm_layers": 2,
            "training.output": f"{config.training.output}-tiny",
            "data.train": [str(path) for path in folders],
        }
    )
    run.run(accelerator, tiny, "replace", Life(accelerator, tiny, StopSignals()))
    gc.collect()


def marked(sampler: Sampler, phase: str, after: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """Return `work` as a phase of its own, followed by phase `after`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        sampler.enter(phase)
        try:
            return work(*args, **kwargs)
        finally:
            sampler.enter(after)

    return wrapped


class Traffic:
    """What DeepSpeed's communication logger has counted: bytes by operation, per optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, int]] = []

    def counted(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """Return `work` with its communication kept."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            before = self._totals()
            result = work(*args, **kwargs)
            after = self._totals()
            self.steps.append({name: total - before.get(name, 0) for name, total in after.items()})
            return result

        return wrapped

    @staticmethod
    def _totals() -> dict[str, int]:
        if "deepspeed.comm.comm" not in sys.modules:
            return {}
        logged = sys.modules["deepspeed.comm.comm"].comms_logger.comms_dict
        return {name: sum(size * row[0] for size, row in sizes.items()) for name, sizes in logged.items()}


def main(results: str, run_file: str, *overrides: str) -> None:
    """Train on this rank and write what was observed."""
    config = load(run_file, overrides)
    accelerator: Accelerator = context.start(config.training)
    if "deepspeed" in sys.modules:
        # Its engine would read this in its JSON, but folds side by side have no engine.
        sys.modules["deepspeed"].comm.configure(enabled=True, prof_all=True, prof_ops=[], verbose=False, debug=False)
    warm_up(accelerator, config)
    accelerator.wait_for_everyone()
    sampler, traffic = Sampler(), Traffic()
    sampler.enter("load")
    baseline = sampler.peaks["load"]
    # What the warm-up took at most is nobody's phase.
    del sampler.peaks["before"]
    sampler.start()
    run.build_model = marked(sampler, "load", "start", build.build_model)
    learners = learner.Learners
    learners._prepared = marked(sampler, "start", "check", learners._prepared)
    step.TrainStep.run = traffic.counted(marked(sampler, "step", "between", step.TrainStep.run))
    trainer = fold.FoldTrainer
    trainer._evaluate = marked(sampler, "evaluation", "between", trainer._evaluate)
    trainer._save = marked(sampler, "save", "between", trainer._save)
    run.run(accelerator, config, "replace", Life(accelerator, config, StopSignals()))
    row = {
        "rank": accelerator.process_index,
        "baseline": baseline,
        "peaks": {name: peak - baseline for name, peak in sampler.peaks.items()},
        "traffic": traffic.steps,
    }
    Path(results, f"rank-{accelerator.process_index}.json").write_text(json.dumps(row))
    context.stop(accelerator)


if __name__ == "__main__":
    main(*sys.argv[1:])
