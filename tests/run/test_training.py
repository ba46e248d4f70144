"""The main job end to end on real files: runs, resumes, refuses, and never learns from the test side."""

import json
import shutil

import datasets
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import checkpoint_tensors, launch, logits, newest_checkpoint, overrides, scalars, train_here

from aullm_dist.cli import main
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.data.synthetic import SyntheticSpec, write_corpus
from aullm_dist.evaluation.evaluate import evaluate_run
from aullm_dist.evaluation.summary import zeroed_scores
from aullm_dist.runs.paths import FoldPaths
from aullm_dist.runs.predictions import find_predictions


@pytest.fixture(scope="module")
def finished(small_dataset, tiny_llm, tmp_path_factory):
    """A finished run of eight steps with a checkpoint in the middle of an epoch."""
    run = tmp_path_factory.mktemp("finished") / "run"
    settings = overrides(
        small_dataset, tiny_llm, run, training__micro_batch=2, training__max_steps=8, training__save_every_steps=3,
        training__epochs=9, training__keep_checkpoints=9,
    )  # fmt: skip
    assert train_here(*settings) == 0
    return run, settings


def test_a_run_leaves_what_it_promises(finished):
    run, _ = finished
    for name in ("config.yaml", "environment.json", "folds.json", "metrics.json", "table.md", "table.csv"):
        assert (run / name).is_file(), name
    metrics = json.loads((run / "metrics.json").read_text())
    for key in ("mean", "floors"):
        assert {"f1_binary", "f1_macro", "auc"} <= set(metrics[key])
    assert set(metrics["per_au"]) == {"AU1", "AU2", "AU4", "AU7", "AU12", "AU14", "AU15", "AU17"}
    steps = [path.name for path in sorted((run / "fold-00" / "checkpoints").iterdir())]
    assert steps == ["step-00000003", "step-00000006", "step-00000008"]


def test_tensorboard_has_every_group(finished):
    run, _ = finished
    events = EventAccumulator(str(run / "tensorboard" / "fold-00"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "Loss/loss", "Loss/asl", "Loss/graph", "Loss/structure", "Loss/appearance", "Loss/neutral",
        "Loss/contradiction", "Loss/evidence", "ladder_f1_macro/evidence", "ladder_f1_macro/structure",
        "ladder_auc/deduction", "lr/lora", "lr/new", "train/grad_norm", "train/clips_per_second",
        "train/tokens_per_second", "memory/host_gib", "memory/host_peak_gib", "heldout/f1_macro",
        "heldout_f1_macro/AU4", "sensitivity/content", "sensitivity/instruction",
    } <= tags  # fmt: skip
    assert [event.step for event in events.Scalars("Loss/loss")] == list(range(1, 9))


@pytest.mark.parametrize("kept", [3, 6])
def test_a_resumed_run_is_bit_identical(finished, tmp_path, kept):
    """Step 3 lies inside an epoch; two micro-batches make a step."""
    run, settings = finished
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    for folder in (resumed / "fold-00" / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > kept:
            shutil.rmtree(folder)
    shutil.rmtree(resumed / "fold-00" / "predictions")
    assert train_here(*settings, f"training.output={resumed}", "--resume", "auto") == 0
    expected, found = (checkpoint_tensors(newest_checkpoint(folder)) for folder in (run, resumed))
    assert expected.keys() == found.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert not different
    assert logits(run) == logits(resumed)


def test_a_finished_run_is_resumed_without_training(finished, capsys):
    run, settings = finished
    before = newest_checkpoint(run).stat().st_mtime_ns
    assert train_here(*settings, "--resume", "auto") == 0
    assert newest_checkpoint(run).stat().st_mtime_ns == before
    assert "Held-out subjects" in capsys.readouterr().out


def test_a_run_folder_in_use_is_not_overwritten(finished, capsys):
    run, settings = finished
    before = sorted(path.name for path in run.rglob("*"))
    assert train_here("--config", "demo", *settings) == 2
    message = capsys.readouterr().err
    assert "holds a run already" in message
    assert "Traceback" not in message
    assert before == sorted(path.name for path in run.rglob("*"))


def test_resume_with_another_configuration_names_the_key(finished, capsys):
    _, settings = finished
    assert train_here(*settings, "training.lr_new=0.5", "--resume", "auto") == 2
    assert "training.lr_new = 0.001, now it is 0.5" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path, capsys):
    run, settings = finished
    damaged = tmp_path / "run"
    shutil.copytree(run, damaged)
    victim = newest_checkpoint(damaged) / "optimizer.safetensors"
    victim.write_bytes(victim.read_bytes()[:-10])
    assert train_here(*settings, f"training.output={damaged}", "--resume", "auto") == 0
    assert "step-00000008" in capsys.readouterr().err
    assert logits(run) == logits(damaged)


def test_a_checkpoint_of_another_model_is_refused(finished, small_dataset, tiny_llm, tmp_path, capsys):
    run, _ = finished
    other = tmp_path / "run"
    settings = overrides(small_dataset, tiny_llm, other, model__readout="per_au", training__max_steps=1)
    assert train_here(*settings) == 0
    shutil.rmtree(other / "fold-00" / "checkpoints")
    shutil.copytree(run / "fold-00" / "checkpoints", other / "fold-00" / "checkpoints")
    before = sorted(path.name for path in other.rglob("*"))
    capsys.readouterr()
    assert train_here(*settings, "--resume", "auto") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("train.py: error: ")
    assert "step-" in message
    assert before == sorted(path.name for path in other.rglob("*"))


@pytest.mark.parametrize(
    "changes",
    [
        {"model__llm": "none", "counterfactual__branches": 2},
        {"model__readout": "per_au", "model__llm_architecture": "qwen3"},
        {"model__structure": False, "counterfactual__branches": 1},
        {"model__evidence": "mid_only", "model__packing": False},
        {"model__training_statistics": True, "model__activation_checkpointing": "reentrant"},
        {"counterfactual__enabled": False, "training__precision": "bf16"},
        {"model__quantization": "nf4", "training__baseline": True},
        {"model__suffixes_per_row": 5, "data__workers": 1, "model__lora_dropout": 0.1},
    ],
    ids=lambda changes: "-".join(key.split("__")[1] for key in changes),
)
def test_every_kind_of_run_trains_and_evaluates(small_dataset, tiny_llm, tmp_path, changes):
    settings = overrides(small_dataset, tiny_llm, tmp_path / "run", training__max_steps=2, **changes)
    assert train_here(*settings) == 0
    assert (tmp_path / "run" / "metrics.json").is_file()


def test_loso_trains_every_fold_from_the_same_start(small_dataset, tiny_llm, tmp_path):
    """A fold trained after others equals the fold trained alone: only the data differ, not the state it starts from."""
    together, alone = tmp_path / "together", tmp_path / "alone"
    changes = {"data__protocol": "loso", "training__max_steps": 2}
    assert train_here(*overrides(small_dataset, tiny_llm, together, data__fold=None, **changes)) == 0
    assert train_here(*overrides(small_dataset, tiny_llm, alone, data__fold=3, **changes)) == 0
    assert logits(together, 3) == logits(alone, 3)
    metrics = json.loads((together / "metrics.json").read_text())
    assert (metrics["num_clips"], metrics["num_subjects"], metrics["folds"]["present"]) == (24, 6, 6)
    # Answers without a token are pooled as all others are: copies of the answers themselves must score the same.
    for index, path in find_predictions(together).items():
        shutil.copy(path, FoldPaths(together, index).zeroed("content"))
    score, change = zeroed_scores(together)["content"]
    assert score == pytest.approx(metrics["mean"]["f1_macro"])
    assert change == 0


def test_cross_domain_trains_on_one_corpus_and_tests_on_the_other(small_dataset, tiny_llm, tmp_path):
    spec = SyntheticSpec(corpus="samm", subjects=3, clips_per_subject=4, num_frames=(8, 12), frame_size=(32, 32))
    write_corpus(spec, tmp_path / "corpus")
    prepare("samm", tmp_path / "corpus", tmp_path / "samm", PrepareOptions(size=32, num_workers=1))
    run = tmp_path / "run"
    target = json.dumps([str(tmp_path / "samm")])
    settings = overrides(
        small_dataset, tiny_llm, run, data__protocol="cross", data__test=target, data__fold=None, training__max_steps=1
    )
    assert train_here(*settings) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    # The AUs that both corpora code, and every clip of the target corpus.
    assert (metrics["aus"], metrics["num_clips"]) == ([2, 4, 7, 12], 12)
    assert metrics["direction"] == "casme2->samm"
    assert "Protocol cross on casme2->samm" in (run / "table.md").read_text()
    (fold,) = json.loads((run / "folds.json").read_text())["folds"]
    assert all(name.startswith("samm/") for name in fold["test"])
    assert all(name.startswith("casme2/") for name in fold["train"] + fold["inner"])


def test_folds_of_a_file_and_of_several_corpora_train_and_evaluate(small_dataset, tiny_llm, tmp_path):
    """Leave one dataset out, as a protocol and from its own JSON: the same folds, the same answers."""
    spec = SyntheticSpec(corpus="mmew", subjects=3, clips_per_subject=3, num_frames=(8, 12), frame_size=(32, 32))
    write_corpus(spec, tmp_path / "corpus")
    prepare("mmew", tmp_path / "corpus", tmp_path / "mmew", PrepareOptions(size=32, num_workers=1))
    both = json.dumps([str(small_dataset), str(tmp_path / "mmew")])
    plan = tmp_path / "folds.json"
    assert main(["folds", "lodo", str(small_dataset), str(tmp_path / "mmew"), "--out", str(plan)]) == 0
    named, read = tmp_path / "named", tmp_path / "read"
    common = {"data__train": both, "data__fold": None, "data__inner_fraction": 0.15, "training__max_steps": 1}
    assert train_here(*overrides(small_dataset, tiny_llm, named, **{**common, "data__protocol": "lodo"})) == 0
    assert (
        train_here(
            *overrides(small_dataset, tiny_llm, read, **{**common, "data__fold": 1, "data__folds_file": str(plan)})
        )
        == 0
    )
    assert (named / "folds.json").read_bytes() == (read / "folds.json").read_bytes() == plan.read_bytes()
    assert logits(named, 1) == logits(read, 1)
    metrics = json.loads((named / "metrics.json").read_text())
    assert metrics["aus"] == [1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17]
    assert {name: part["num_clips"] for name, part in metrics["per_corpus"].items()} == {"casme2": 24, "mmew": 9}
    assert "Each corpus on its own" in (named / "table.md").read_text()
    report = json.loads((named / "stratification.json").read_text())
    assert [fold["test"]["clips"] for fold in report["folds"]] == [24, 9]


def test_a_run_on_streamed_clips_resumes_bit_for_bit(tiny_llm, tmp_path):
    spec = SyntheticSpec(corpus="casme", subjects=4, clips_per_subject=3, num_frames=(6, 8), frame_size=(32, 32))
    write_corpus(spec, tmp_path / "corpus")
    prepare("casme", tmp_path / "corpus", tmp_path / "casme", PrepareOptions(size=32, num_workers=1, fmt="parquet"))
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {"data__streaming": True, "data__shuffle_buffer": 4, "training__max_steps": 4}
    steps = {"training__save_every_steps": 2, "training__keep_checkpoints": 5}
    assert train_here(*overrides(tmp_path / "casme", tiny_llm, whole, **changes, **steps)) == 0
    shutil.copytree(whole, cut)
    shutil.rmtree(newest_checkpoint(cut))
    (prediction,) = find_predictions(cut).values()
    prediction.unlink()
    assert train_here(*overrides(tmp_path / "casme", tiny_llm, cut, **changes, **steps), "--resume", "auto") == 0
    expected, found = (checkpoint_tensors(newest_checkpoint(run)) for run in (whole, cut))
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert logits(whole) == logits(cut)


def test_the_baseline_is_trained_on_the_same_folds(small_dataset, tiny_llm, tmp_path, capsys):
    run = tmp_path / "run"
    assert train_here(*overrides(small_dataset, tiny_llm, run, training__baseline=True, training__max_steps=1)) == 0
    assert "no-LLM baseline (led_cnn)" in capsys.readouterr().out
    assert (run / "folds.json").read_bytes() == (run / "baselines" / "led_cnn" / "folds.json").read_bytes()
    assert logits(run).keys() == logits(run / "baselines" / "led_cnn").keys()


def test_protocol_all_trains_on_everything_and_keeps_inner_answers(small_dataset, tiny_llm, tmp_path, capsys):
    run = tmp_path / "run"
    settings = overrides(small_dataset, tiny_llm, run, data__protocol="all", data__fold=None, training__max_steps=1)
    assert train_here(*settings) == 0
    plan = json.loads((run / "folds.json").read_text())
    assert plan["folds"][0]["test"] == []
    assert set(logits(run)) == set(plan["folds"][0]["inner"])
    assert "Checkpoints" in capsys.readouterr().out
    thresholds = json.loads((run / "fold-00" / "thresholds.json").read_text())["thresholds"]
    assert set(thresholds) == {f"AU{au}" for au in (1, 2, 4, 7, 12, 14, 15, 17)}


def _with_other_test_labels(dataset, run, folder, how):
    """Copy a prepared dataset with the labels of fold 0's test clips permuted or deleted."""
    test = set(json.loads((run / "folds.json").read_text())["folds"][0]["test"])
    assert test
    rows = datasets.load_from_disk(str(dataset))
    labels = dict(zip(rows["sample_id"], rows["aus"], strict=True))
    before = {name: labels[name] for name in labels if name in test}
    if how == "permuted":
        after = dict(zip(before, [*list(before.values())[1:], next(iter(before.values()))], strict=True))
    else:
        after = {name: [] for name in before}
    assert after != before
    changed = rows.map(lambda row: {"aus": after.get(row["sample_id"], row["aus"])}, keep_in_memory=True)
    changed.save_to_disk(str(folder))
    return folder


@pytest.fixture(scope="module")
def fitted(small_dataset, tiny_llm, tmp_path_factory):
    """A run that fits all that a run can fit, with the true labels."""
    run = tmp_path_factory.mktemp("fitted") / "run"
    assert train_here(*overrides(small_dataset, tiny_llm, run, **FITTED)) == 0
    return run


FITTED = {"training__max_steps": 4, "model__training_statistics": True, "data__size": 32}


@pytest.mark.parametrize("how", ["permuted", "deleted"])
def test_labels_of_the_test_fold_change_no_training_artefact(fitted, small_dataset, tiny_llm, tmp_path, how):
    """Prior statistics, weights, optimizer and the thresholds' own answers must not know the test labels."""
    first, second = fitted, tmp_path / "second"
    other = _with_other_test_labels(small_dataset, first, tmp_path / "other", how)
    assert train_here(*overrides(other, tiny_llm, second, **FITTED)) == 0
    expected, found = (checkpoint_tensors(newest_checkpoint(run)) for run in (first, second))
    assert expected.keys() == found.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert (first / "folds.json").read_bytes() == (second / "folds.json").read_bytes()
    assert logits(first) == logits(second)
    tables = [json.loads((run / "metrics.json").read_text()) for run in (first, second)]
    assert tables[0]["inner_thresholds"]["folds"] == tables[1]["inner_thresholds"]["folds"]
    # The labels did change, or all of the above would show nothing.
    assert tables[0]["mean"] != tables[1]["mean"]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"model__llm": "/no/such/model"}, "/no/such/model"),
        ({"data__fold": 2, "data__folds": 40}, "folds"),
        ({"data__aus": "[4, 99]"}, "AU99"),
        ({"data__train": '["/no/such/dataset"]'}, "/no/such/dataset"),
        ({"data__size": 96}, "data.size is 96"),
        ({"model__lora_targets": "[no_such_layer]"}, "no_such_layer"),
        ({"training__processes": 2, "training__global_batch": 8}, "training.processes is 2"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(small_dataset, tiny_llm, tmp_path, capsys, changes, part):
    assert train_here(*overrides(small_dataset, tiny_llm, tmp_path / "run", **changes)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert part in lines[-1]
    assert lines[-1].startswith("train.py: error: ")
    assert not list((tmp_path).rglob("checkpoints"))


def test_a_start_that_failed_does_not_occupy_the_run_folder(small_dataset, tiny_llm, tmp_path):
    settings = overrides(small_dataset, tiny_llm, tmp_path / "run", training__max_steps=1)
    assert train_here(*settings, "model.llm=/no/such/model") == 2
    assert not (tmp_path / "run").exists()
    assert train_here(*settings) == 0


def test_a_replacement_that_cannot_start_leaves_the_old_run(finished, tmp_path):
    run, settings = finished
    kept = tmp_path / "run"
    shutil.copytree(run, kept)
    assert train_here(*settings, f"training.output={kept}", "--replace", "model.llm=/no/such/model") == 2
    assert logits(kept) == logits(run)
    assert (kept / "metrics.json").is_file()


def test_resume_refuses_data_that_changed(finished, small_dataset, tmp_path, capsys):
    run, settings = finished
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    smaller = datasets.load_from_disk(str(small_dataset)).select(range(20))
    smaller.save_to_disk(str(tmp_path / "smaller"))
    config = (resumed / "config.yaml").read_text().replace(str(small_dataset), str(tmp_path / "smaller"))
    (resumed / "config.yaml").write_text(config)
    other = [f"training.output={resumed}", f'data.train=["{tmp_path}/smaller"]']
    assert train_here(*settings, *other, "--resume", "auto") == 2
    assert "the data changed since the run began" in capsys.readouterr().err
    assert (resumed / "folds.json").read_bytes() == (run / "folds.json").read_bytes()


def test_resume_refuses_frames_that_were_prepared_otherwise(finished, small_dataset, tmp_path, capsys):
    run, settings = finished
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    prepare(
        "casme2",
        small_dataset.parent / "corpus",
        tmp_path / "other",
        PrepareOptions(size=32, crop="center", num_workers=1),
    )
    config = (resumed / "config.yaml").read_text().replace(str(small_dataset), str(tmp_path / "other"))
    (resumed / "config.yaml").write_text(config)
    other = [f"training.output={resumed}", f'data.train=["{tmp_path}/other"]']
    assert train_here(*settings, *other, "--resume", "auto") == 2
    assert "the data changed since the run began" in capsys.readouterr().err


def test_an_unfinished_run_says_so_in_its_table(finished, tmp_path):
    run, _ = finished
    stopped = tmp_path / "run"
    shutil.copytree(run, stopped)
    assert not any("unfinished" in note for note in evaluate_run(stopped, bootstrap=0)["notes"])
    sorted((stopped / "fold-00" / "predictions").iterdir())[-1].unlink()
    notes = evaluate_run(stopped, bootstrap=0)["notes"]
    assert any("fold-00 is unfinished: these are the answers of step" in note for note in notes)


def test_kernels_that_are_not_there_are_refused(small_dataset, tiny_llm, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("AULLM_KERNELS", "triton")
    assert train_here(*overrides(small_dataset, tiny_llm, tmp_path / "run")) == 2
    assert "AULLM_KERNELS is 'triton'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_that_cannot_be_written_is_one_line(small_dataset, tiny_llm, tmp_path, capsys):
    run = tmp_path / "run"
    (run / "fold-00").mkdir(parents=True)
    (run / "fold-00" / "checkpoints").write_text("in the way")
    settings = overrides(small_dataset, tiny_llm, run, training__max_steps=1)
    assert train_here(*settings, "--resume", "auto") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("train.py: error: checkpoint ")
    assert "could not be written" in message


def test_a_resumed_run_keeps_every_tensorboard_point(finished, tmp_path):
    run, settings = finished
    resumed = tmp_path / "run"
    shutil.copytree(run, resumed)
    shutil.rmtree(newest_checkpoint(resumed))
    assert train_here(*settings, f"training.output={resumed}", "--resume", "auto") == 0
    assert scalars(resumed, "loss/loss") == scalars(run, "loss/loss")
    assert scalars(resumed, "heldout/f1_macro") == scalars(run, "heldout/f1_macro")


def test_not_finite_gradients_are_skipped_and_then_stop_the_run(small_dataset, tiny_llm, tmp_path, capsys):
    settings = overrides(small_dataset, tiny_llm, tmp_path / "run", training__lr_new=1e30, training__max_bad_steps=2)
    assert train_here(*settings) == 2
    message = capsys.readouterr().err
    assert "skipped (1 in a row)" in message
    assert "not finite in 2 steps in a row" in message


@pytest.mark.launch
def test_launched_as_a_user_would_with_one_process(small_dataset, tiny_llm, tmp_path):
    result = launch(*overrides(small_dataset, tiny_llm, tmp_path / "run", training__max_steps=2))
    assert result.returncode == 0, result.stderr
    assert "Held-out subjects" in result.stdout
    assert "2/2" in result.stderr
    noise = [line for line in result.stderr.splitlines() if "warn" in line.lower() or "deprecat" in line.lower()]
    assert not [line for line in noise if "hardly uses it" not in line], noise
