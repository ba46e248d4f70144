"""Every shipped strategy that a CPU machine can run trains what zero3 trains, and resumes bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from training_runs import (
    ROOT,
    Trained,
    checkpoint_tensors,
    fork,
    interrupted,
    logits,
    newest_checkpoint,
    overrides,
)

pytestmark = pytest.mark.launch

STEPS = 4
NEW = ("zero2_offload", "zero3_offload_optimizer", "zero3_offload_param", "zero3_hpz")
# Two machines of two: only there is the second piece of hpZ another than the first.
PROCESSES = {"zero3_hpz": 4}


@pytest.fixture(scope="module")
def train(small_dataset, tiny_llm, tmp_path_factory):
    """Return a function that trains a few steps, once for each strategy, on an NF4 base with float32 products."""
    folders = tmp_path_factory.mktemp("strategies")
    done: dict[str, Trained] = {}

    def run(strategy: str) -> Trained:
        if strategy not in done:
            folder = folders / f"{strategy}-run"
            processes = PROCESSES.get(strategy, 2)
            common = {
                "training__strategy": divided(strategy, folders),
                "training__global_batch": 8,
                "training__micro_batch": 2,
                "training__processes": processes,
                "training__epochs": 99,
                "training__max_steps": STEPS,
                "training__evaluate_every_epochs": 99,
                "training__save_every_steps": 2,
                "training__keep_checkpoints": 9,
                "model__dropout": 0.0,
                "model__quantization": "nf4",
            }
            settings = overrides(small_dataset, tiny_llm, folder, **common)
            result = fork(*settings, processes=processes)
            assert result.returncode == 0, result.stderr
            done[strategy] = Trained(folder, settings, result.stderr)
        return done[strategy]

    return run


def divided(strategy: str, folder: Path) -> Path:
    """Copy a shipped strategy, but so that ZeRO-3 leaves nothing whole: the tiny LLM is below its thresholds."""
    content = json.loads((ROOT / "configs" / "deepspeed" / f"{strategy}.json").read_text(encoding="utf-8"))
    if content["zero_optimization"]["stage"] == 3:
        for key in ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"):
            assert key in content["zero_optimization"]
            content["zero_optimization"][key] = 0
    if strategy == "zero3_hpz":
        assert content["zero_optimization"]["zero_hpz_partition_size"] == "auto"
        content["zero_optimization"]["zero_hpz_partition_size"] = 2
    path = folder / f"{strategy}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


@pytest.mark.parametrize("strategy", NEW)
def test_it_trains_what_zero3_trains(train, strategy):
    expected, found = train("zero3"), train(strategy)
    for ours, reference in zip(found.curve, expected.curve, strict=True):
        assert len(ours) == STEPS
        assert ours == pytest.approx(reference, rel=1e-5)
    answers, others = logits(found.folder), logits(expected.folder)
    assert answers.keys() == others.keys()
    for sample_id, row in answers.items():
        assert row == pytest.approx(others[sample_id], rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("strategy", NEW)
def test_it_resumes_bit_for_bit(train, tmp_path, strategy):
    whole = train(strategy)
    resumed = interrupted(whole.folder, tmp_path / "run")
    assert newest_checkpoint(resumed).name == "step-00000002"
    changes = (f"training.output={resumed}", "--resume", "auto")
    result = fork(*whole.settings, *changes, processes=PROCESSES.get(strategy, 2))
    assert result.returncode == 0, result.stderr
    assert newest_checkpoint(resumed).name == newest_checkpoint(whole.folder).name
    expected, found = (checkpoint_tensors(newest_checkpoint(folder)) for folder in (whole.folder, resumed))
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert logits(whole.folder) == logits(resumed)


@pytest.mark.parametrize(
    ("strategy", "told"),
    [
        ("zero2_offload", ", optimizer state in CPU memory (training.strategy: "),
        ("zero3_offload_param", ", optimizer state and parameters in CPU memory (training.strategy: "),
        ("zero3_hpz", ", parameters a second time within each machine (training.strategy: "),
    ],
)
def test_the_log_says_where_things_are(train, strategy, told):
    log = train(strategy).stderr
    assert told in log
    for noise in ("Warning", "WARNING", "Traceback"):
        assert noise not in log
