"""Folds that are trained side by side are the folds that are trained alone, bit for bit.

Three folds of 3, 2 and 2 steps on two teams: they evaluate at different times, the team that ends first takes the third
fold, and the other makes empty passes at the end.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from training_runs import (
    checkpoint_tensors,
    fork,
    logits,
    newest_checkpoint,
    overrides,
    partition_everything,
    scalars,
    train_here,
)

from aullm_dist.checkpoint.manifest import verify_checkpoint
from aullm_dist.data.clips import read_samples
from aullm_dist.data.protocols import Fold, FoldPlan, write_folds

pytestmark = pytest.mark.launch

PROBE = Path(__file__).with_name("folds_probe.py")
FOLDS = range(3)
# What may go wrong goes wrong with these: dropout in two places, layers computed anew, two micro-batches per step,
# passes of evaluations, of ablations and of pictures.
SETTINGS = {
    "training__global_batch": 6,
    "training__micro_batch": 3,
    "training__epochs": 1,
    "training__save_every_steps": 1,
    "training__keep_checkpoints": 9,
    "data__fold": None,
    "model__lora_dropout": 0.1,
    "model__activation_checkpointing": "non_reentrant",
    "model__quantization": "nf4",
    "monitor__projector_clips": 2,
}


@pytest.fixture(scope="module")
def folds_file(small_dataset, tmp_path_factory):
    """Three folds with 16, 8 and 12 training clips."""
    samples = read_samples([small_dataset])
    subjects = sorted({sample.subject for sample in samples})

    def clips(*places):
        chosen = {subjects[place] for place in places}
        return tuple(sorted(sample.sample_id for sample in samples if sample.subject in chosen))

    folds = (
        Fold(0, "long", clips(2, 3, 4, 5), clips(1), clips(0)),
        Fold(1, "short", clips(0, 2), clips(3), clips(1)),
        Fold(2, "middle", clips(0, 1, 5), clips(3), clips(2)),
    )
    path = tmp_path_factory.mktemp("folds") / "folds.json"
    write_folds(path, FoldPlan("loso", ("casme2",), (1, 4, 12), 0, folds))
    return path


@pytest.fixture(scope="module")
def settings_of(small_dataset, tiny_llm, folds_file):
    """Return a function that gives the settings of a run of these folds."""
    return lambda run, **changes: overrides(
        small_dataset, tiny_llm, run, **{**SETTINGS, "data__folds_file": folds_file, **changes}
    )


@pytest.fixture(scope="module")
def divided(tmp_path_factory):
    """ZeRO-3 that divides everything."""
    return partition_everything(tmp_path_factory.mktemp("strategy"))


@pytest.fixture(scope="module")
def alone(settings_of, tmp_path_factory):
    """One process that trains the folds one after another on an LLM of its own."""
    run = tmp_path_factory.mktemp("alone") / "run"
    result = fork(*settings_of(run))
    assert result.returncode == 0, result.stderr
    return run


@pytest.fixture(scope="module")
def side(settings_of, divided, tmp_path_factory):
    """Two teams of one process on an NF4 LLM that is divided in two; what each process knows of it, and the log."""
    folder = tmp_path_factory.mktemp("side")
    arguments = settings_of(folder / "run", training__strategy=divided, training__folds_at_once=2)
    result = fork(*arguments, processes=2, program=PROBE, environment={"PROBE_FOLDER": str(folder)})
    assert result.returncode == 0, result.stderr
    facts = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(2)]
    return folder / "run", facts, result


def assert_same(expected: Path, found: Path, folds=FOLDS):
    for fold in folds:
        names = [sorted(p.name for p in run.glob(f"fold-{fold:02d}/checkpoints/*")) for run in (expected, found)]
        assert names[0] == names[1]
        tensors, others = (checkpoint_tensors(newest_checkpoint(run, fold)) for run in (expected, found))
        assert tensors.keys() == others.keys()
        assert [name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])] == []
        assert logits(expected, fold) == logits(found, fold)
        for name in ("thresholds.json", "sensitivity.json"):
            texts = [(run / f"fold-{fold:02d}" / name).read_text() for run in (expected, found)]
            assert texts[0] == texts[1]


def test_folds_on_a_divided_base_are_those_trained_alone(alone, side):
    run, _, _ = side
    assert_same(alone, run)
    for fold in FOLDS:
        assert verify_checkpoint(newest_checkpoint(run, fold)) == []
        for tag in ("loss/loss", "loss/structure", "train/grad_norm"):
            assert scalars(run, tag, fold) == scalars(alone, tag, fold), tag
    assert (run / "metrics.json").read_text() == (alone / "metrics.json").read_text()


def test_the_base_stays_divided_and_everybody_makes_the_same_passes(side):
    _, facts, _ = side
    assert facts[0]["passes"] == facts[1]["passes"]
    # Seven steps of two micro-batches in all, one team's four and the other's three at least beside each other.
    assert facts[0]["passes"] >= 8
    assert facts[0]["empty"] + facts[1]["empty"] > 0
    for fact in facts:
        assert fact["whole"] == 0
        assert fact["divided"] == pytest.approx(fact["in_all"] / 2, rel=0.01)


def test_the_log_names_the_fold_in_every_line_of_training(side):
    run, _, result = side
    assert "Engine: DeepSpeed ZeRO-3 for the frozen LLM, partitioned over 2 processes" in result.stderr
    for fold in FOLDS:
        assert f"Fold {fold}: Epoch 1: held-out f1_macro" in result.stderr
        assert list((run / "tensorboard" / f"fold-{fold:02d}").glob("events.*"))
    assert "\nEpoch" not in result.stderr
    assert result.stdout.count("Held-out subjects, threshold fixed") == 1


@pytest.mark.parametrize("strategy", ["zero3", "ddp"])
def test_a_signal_to_one_process_stops_all_and_each_fold_resumes(alone, settings_of, divided, tmp_path, strategy):
    """Only the second process is asked to stop, in the middle of a step; then another number of folds at once."""
    run = tmp_path / "run"
    engine = divided if strategy == "zero3" else "ddp"
    arguments = settings_of(run, training__strategy=engine, training__folds_at_once=2)
    stopped = fork(*arguments, processes=2, program=PROBE, environment={"PROBE": "1:forward:3"})
    assert stopped.returncode == 0, stopped.stderr
    marker = json.loads((run / "PREEMPTED").read_text())
    assert newest_checkpoint(run, marker["fold"]).name == f"step-{marker['step']:08d}"
    assert "--resume auto continues" in stopped.stderr
    assert not (run / "metrics.json").exists()
    if strategy == "zero3":
        assert f"Stopped as asked at step {marker['step']} of fold {marker['fold']}, step " in stopped.stderr
        arguments = settings_of(run, training__strategy=engine, training__folds_at_once="auto")
    resumed = fork(*arguments, "--resume", "auto", processes=2)
    assert resumed.returncode == 0, resumed.stderr
    assert not (run / "PREEMPTED").exists()
    assert_same(alone, run)


def test_one_process_goes_on_where_two_teams_were(alone, side, settings_of, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(side[0], run)
    shutil.rmtree(newest_checkpoint(run, 1))
    shutil.rmtree(run / "fold-01" / "predictions")
    assert train_here(*settings_of(run), "--resume", "auto") == 0
    assert_same(alone, run)


def test_teams_of_two_are_runs_of_two(settings_of, divided, tmp_path):
    """Gradients are averaged within a team; in float32, and with activations that nobody computes anew."""
    changes = {"training__max_steps": 1, "model__quantization": "none", "model__activation_checkpointing": "none"}
    changes |= {"training__micro_batch": 1, "monitor__projector_clips": 0}
    two = settings_of(tmp_path / "two", **changes)
    four = settings_of(tmp_path / "four", **changes, training__strategy=divided, training__folds_at_once=2)
    for arguments, processes in ((two, 2), (four, 4)):
        result = fork(*arguments, processes=processes)
        assert result.returncode == 0, result.stderr
    assert_same(tmp_path / "two", tmp_path / "four")


@pytest.mark.parametrize("strategy", ["zero3", "ddp"])
def test_an_error_of_one_team_ends_all_with_one_line(settings_of, divided, tmp_path, strategy):
    engine = divided if strategy == "zero3" else "ddp"
    arguments = settings_of(tmp_path / "run", training__strategy=engine, training__folds_at_once=2)
    result = fork(*arguments, processes=2, program=PROBE, environment={"PROBE": "1:fault:2"})
    assert result.returncode == 2
    assert result.stderr.count("error:") == 1
    assert "train.py: error: process 1: a clip cannot be read" in result.stderr
    assert "Traceback" not in result.stderr


def test_more_teams_than_folds_are_refused(settings_of, tmp_path):
    result = fork(*settings_of(tmp_path / "run", training__folds_at_once=2, data__fold=1), processes=2)
    assert result.returncode == 2
    assert "folds_at_once is 2, but 1 fold is to be trained" in result.stderr
    assert result.stderr.count("error:") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_teams_that_do_not_divide_the_processes_are_refused(settings_of, tmp_path, capsys):
    assert train_here(*settings_of(tmp_path / "run", training__folds_at_once=2)) == 2
    assert "folds_at_once is 2 with 1 process; allowed: a number that divides them (1)" in capsys.readouterr()[1]
