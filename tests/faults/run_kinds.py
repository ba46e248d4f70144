"""Kinds of runs that the suite disturbs: how they are started, and what is left of one when it has ended."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.numpy import load_file
from training_runs import logits, newest_checkpoint, overrides

from aullm_dist.checkpoint.manifest import read_manifest, verify_checkpoint
from aullm_dist.checkpoint.retention import find_newest_valid

SAVE_EVERY = 2
_ANSWERS = ("thresholds.json", "sensitivity.json")


@dataclass(frozen=True)
class Runs:
    """Runs that differ in their folder alone."""

    inputs: Path
    """Holds the dataset and the LLM."""
    steps: int
    """Of each fold."""
    kind: str = ""
    """How the table calls them; empty for one fold under DDP."""
    folds: tuple[int, ...] = (0,)
    changes: Mapping[str, object] = field(default_factory=dict)

    def settings(self, run: Path) -> list[str]:
        """Return the arguments of a run that begins or goes on in `run`."""
        changes = {
            "training__global_batch": 8, "training__micro_batch": 2, "training__epochs": 99,
            "training__max_steps": self.steps, "training__save_every_steps": SAVE_EVERY,
            "training__evaluate_every_epochs": 2, "training__keep_checkpoints": 2, "monitor__log_every_steps": 5,
            **self.changes,
        }  # fmt: skip
        return [*overrides(self.inputs / "dataset", self.inputs / "llm", run, **changes), "--resume", "auto"]

    def newest(self, run: Path) -> dict[int, int]:
        """Return the step of the newest valid checkpoint of each fold, 0 without one."""
        found = {fold: find_newest_valid(run / f"fold-{fold:02d}" / "checkpoints") for fold in self.folds}
        return {fold: step_of(folder) if folder else 0 for fold, folder in found.items()}

    def final(self, run: Path) -> dict[str, object]:
        """Return what a run has ended in: weights, optimizer state, answers, thresholds, and the table of all folds."""
        left: dict[str, object] = {"metrics": json.loads((run / "metrics.json").read_text())}
        for fold in self.folds:
            newest = newest_checkpoint(run, fold)
            assert step_of(newest) == self.steps, newest
            assert verify_checkpoint(newest) == []
            for name in read_manifest(newest).files:
                if name.endswith(".safetensors"):
                    tensors = load_file(newest / name)
                    left |= {f"{fold}:{name}:{key}": value.tobytes() for key, value in tensors.items()}
            left[f"{fold}:logits"] = logits(run, fold)
            left |= {f"{fold}:{name}": (run / f"fold-{fold:02d}" / name).read_text() for name in _ANSWERS}
        return left


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(checkpoint.name.rsplit("-", 1)[1].split(".")[0])


def side_by_side(inputs: Path, steps: int, strategy: str, engine: Path | str) -> Runs:
    """Return runs of three folds on two teams of one process: the team that ends first trains the third fold."""
    changes = {
        "training__strategy": engine, "training__folds_at_once": 2, "training__micro_batch": 8, "data__fold": None,
        "model__quantization": "nf4",
    }  # fmt: skip
    return Runs(inputs, steps, f"{strategy}, 2 folds at once", (0, 1, 2), changes)
