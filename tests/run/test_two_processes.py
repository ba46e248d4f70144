"""Two CPU processes train the same function as one, and a lost process is refused loudly."""

import json

import pytest
import torch
from training_runs import checkpoint_tensors, fork, interrupted, launch, logits, newest_checkpoint, overrides, scalars

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def two(small_dataset, tiny_llm, tmp_path_factory):
    """A run of two processes with two micro-batches each per step, without dropout."""
    run = tmp_path_factory.mktemp("two") / "run"
    settings = overrides(
        small_dataset, tiny_llm, run, training__global_batch=8, training__micro_batch=2, training__processes=2,
        training__epochs=9, training__max_steps=4, training__save_every_steps=2, model__dropout=0.0,
        training__keep_checkpoints=9,
    )  # fmt: skip
    result = launch(*settings, processes=2)
    assert result.returncode == 0, result.stderr
    return run, settings, result


def test_two_processes_equal_one(two, small_dataset, tiny_llm, tmp_path):
    run, settings, _ = two
    alone = tmp_path / "run"
    changes = [f"training.output={alone}", "training.processes=1", "training.micro_batch=8"]
    result = fork(*settings, *changes)
    assert result.returncode == 0, result.stderr
    # Weights are not compared one by one: Adam turns rounding of a gradient near 0 into a whole step.
    for tag in ("loss/loss", "loss/asl", "loss/graph", "loss/neutral", "train/grad_norm"):
        assert scalars(run, tag) == pytest.approx(scalars(alone, tag), rel=1e-4), tag
    answers = logits(alone)
    assert logits(run).keys() == answers.keys()
    for sample_id, row in logits(run).items():
        assert row == pytest.approx(answers[sample_id], rel=1e-3, abs=1e-3)


def test_only_one_process_speaks_and_the_table_has_every_clip(two):
    run, _, result = two
    assert result.stdout.count("Held-out subjects, threshold fixed") == 1
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["num_clips"] == 8


def test_resume_of_two_processes_is_bit_identical(two, tmp_path):
    run, settings, _ = two
    resumed = interrupted(run, tmp_path / "run")
    result = fork(*settings, f"training.output={resumed}", "--resume", "auto", processes=2)
    assert result.returncode == 0, result.stderr
    expected, found = (checkpoint_tensors(newest_checkpoint(folder)) for folder in (run, resumed))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert logits(run) == logits(resumed)


@pytest.mark.parametrize("launcher", [("--cpu", "--num_processes=2"), ("--num_processes=2",)])
def test_a_launcher_that_loses_a_process_is_refused(small_dataset, tiny_llm, tmp_path, launcher):
    if "--cpu" not in launcher and torch.cuda.is_available():
        pytest.skip("with a GPU accelerate starts both processes")
    result = launch(*overrides(small_dataset, tiny_llm, tmp_path / "run"), launcher=launcher)
    assert result.returncode != 0
    assert "asked for several processes but started one" in result.stderr
    assert not (tmp_path / "run").exists()


def test_an_error_on_one_process_ends_both_with_one_line(small_dataset, tiny_llm, tmp_path):
    settings = overrides(small_dataset, tiny_llm, tmp_path / "run", training__micro_batch=2, data__train='["/no/such"]')
    result = fork(*settings, processes=2)
    assert result.returncode != 0
    assert result.stderr.count("train.py: error:") == 1


def test_a_checkpoint_that_cannot_be_written_ends_both_with_one_line(small_dataset, tiny_llm, tmp_path):
    run = tmp_path / "run"
    (run / "fold-00").mkdir(parents=True)
    (run / "fold-00" / "checkpoints").write_text("in the way")
    settings = overrides(small_dataset, tiny_llm, run, training__micro_batch=2, training__max_steps=1)
    result = fork(*settings, "--resume", "auto", processes=2)
    assert result.returncode != 0
    assert result.stderr.count("train.py: error: checkpoint") == 1
    assert "could not be written" in result.stderr
