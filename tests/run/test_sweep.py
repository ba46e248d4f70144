"""Runs of a sweep are the runs that are trained alone, bit for bit, whatever they share with others beside them.

Three runs with models, prompts, seeds and steps of their own on two teams: one process at least trains two of them.
"""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import (
    checkpoint_tensors,
    fork,
    logits,
    newest_checkpoint,
    overrides,
    partition_everything,
    train_here,
)

from aullm_dist.config import load
from aullm_dist.distributed import context
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runs.sweep import ALIKE
from aullm_dist.training import build

pytestmark = pytest.mark.launch

PROBE = Path(__file__).with_name("folds_probe.py")
ARMS = {
    "full": {"counterfactual": {"enabled": True}, "training": {"seed": 3, "max_steps": 3}},
    "no_it": {"model": {"structure": False}, "training": {"seed": 3, "max_steps": 1}},
    "markers": {"model": {"readout": "per_au", "answer": "deduction"}, "training": {"seed": 4, "max_steps": 2}},
}
# What may go wrong goes wrong with these: dropout in two places, layers computed anew, two micro-batches per step.
SETTINGS = {
    "training__micro_batch": 2,
    "training__max_steps": None,
    "training__keep_checkpoints": 9,
    "training__save_every_steps": 1,
    "model__lora_dropout": 0.1,
    "model__activation_checkpointing": "non_reentrant",
    "monitor__projector_clips": 2,
}


@pytest.fixture(scope="module")
def arms(tmp_path_factory):
    """Return a run file for each run."""
    folder = tmp_path_factory.mktemp("arms")
    for name, settings in ARMS.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return [str(folder / f"{name}.yaml") for name in ARMS]


@pytest.fixture(scope="module")
def common(small_dataset, tiny_llm):
    """Return a function that gives the settings that all runs have in common."""
    own = ("training.output", "training.max_steps", "counterfactual.enabled")

    def of(**changes):
        settings = overrides(small_dataset, tiny_llm, "none", **{**SETTINGS, **changes})
        return [setting for setting in settings if not setting.startswith(own)]

    return of


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """ZeRO-3 that divides everything."""
    return partition_everything(tmp_path_factory.mktemp("strategy"))


@pytest.fixture(scope="module")
def alone(arms, common, tmp_path_factory):
    """Return a function that gives the folder of runs that were trained one by one, by quantization."""
    done = {}

    def of(quantization):
        if quantization not in done:
            done[quantization] = tmp_path_factory.mktemp(f"alone_{quantization}")
            for arm in arms:
                run = done[quantization] / Path(arm).stem
                settings = common(model__quantization=quantization)
                assert train_here("--config", arm, *settings, f"training.output={run}") == 0
        return done[quantization]

    return of


def swept(arms, settings, out, *more, **how):
    return fork("--sweep", *arms, *settings, "--out", str(out), *more, **{"processes": 2, **how})


def assert_same(expected: Path, found: Path):
    for name in ARMS:
        one, other = expected / name, found / name
        steps = [sorted(p.name for p in run.glob("fold-00/checkpoints/*")) for run in (one, other)]
        assert steps[0] == steps[1]
        tensors, others = (checkpoint_tensors(newest_checkpoint(run)) for run in (one, other))
        assert tensors.keys() == others.keys()
        assert [key for key, tensor in tensors.items() if not torch.equal(tensor, others[key])] == []
        assert logits(one) == logits(other)
        for file in (RunPaths(Path()).metrics(), RunPaths(Path()).fold(0).sensitivity):
            assert (one / file).read_text() == (other / file).read_text()


def files_of(run: Path) -> set[str]:
    """Return what a run folder holds, but for the record of a job and for names that tell the time."""
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    return {name for name in names if Path(name).name != "job.json" and "events.out" not in name}


def test_runs_on_a_divided_llm_are_those_trained_alone(alone, arms, common, divided, tmp_path):
    settings = common(training__strategy=divided, model__quantization="nf4")
    result = swept(arms, settings, tmp_path / "sweep", "--at-once", "2")
    assert result.returncode == 0, result.stderr
    assert_same(alone("nf4"), tmp_path / "sweep")
    for name in ARMS:
        assert f"{name}: Fold 0: Fold 0 (group-00)" not in result.stderr
        assert f"{name}: Fold 0 (group-00)" in result.stderr
    (head,) = [line for line in result.stdout.splitlines() if line.startswith("run ")]
    assert head.endswith("mean over AUs, in percent (synthetic faces, random LLM)")


def test_runs_that_were_stopped_go_on_to_what_they_are_alone(alone, arms, common, tmp_path):
    """Only the second process is asked to stop; every process holds the LLM whole, in float32."""
    sweep, settings = tmp_path / "sweep", common(model__quantization="none")
    stopped = swept(arms, settings, sweep, program=PROBE, environment={"PROBE": "1:forward:2"})
    assert stopped.returncode == 0, stopped.stderr
    marker = json.loads((sweep / "PREEMPTED").read_text())
    assert newest_checkpoint(sweep / marker["run"]).name == f"step-{marker['step']:08d}"
    assert f"step {marker['step']} of fold 0 of {marker['run']}" in stopped.stderr
    refused = swept(arms, settings, sweep, processes=1)
    assert refused.returncode == 2
    assert f"{sweep / 'full'} holds a run already; add --resume auto" in refused.stderr
    resumed = swept(arms, settings, sweep, "--resume", "auto")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(alone("none"), sweep)
    for name in ARMS:
        assert files_of(sweep / name) == files_of(alone("none") / name)
    assert sorted(path.name for path in sweep.iterdir()) == sorted([*ARMS, "job.json"])


def test_settings_of_what_runs_share_are_the_same_in_all(monkeypatch):
    """What starts the processes and loads the LLM reads nothing that may differ but the seed, which LoRA draws anew."""
    read = set()

    class Reading:
        """A group of settings that notes which are read."""

        def __init__(self, group, values):
            self._group, self._values, self._names = group, values, {field.name for field in fields(values)}

        def __getattr__(self, name):
            if name in self._names:
                read.add(f"{self._group}.{name}")
            return getattr(self._values, name)

    config = load(None, ["training.cpu_threads=1"])
    training = Reading("training", config.training)
    monkeypatch.setattr(build, "load_backbone", lambda *_, **__: type("", (), {"reasons": {}}))
    build._load_backbone(type("", (), {"model": Reading("model", config.model), "training": training}), "", None, None)
    context.start(training)
    # Flags of a launcher are compared with the other one, which each run clips by for itself.
    assert read - set(ALIKE) == {"training.seed", "training.clip_norm"}
    assert read >= {"model.quantization", "training.precision", "training.strategy"}
