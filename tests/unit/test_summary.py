"""What a finished run prints of itself, its soft tokens zeroed, and the thresholds that go with it."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_evaluate import AUS, make_run

from aullm_dist.config import load
from aullm_dist.data.protocols import write_folds
from aullm_dist.evaluation.evaluate import evaluate_run, write_thresholds
from aullm_dist.evaluation.metrics import f1_macro
from aullm_dist.evaluation.more_tables import corpora_block, ladder_block, ranking_block
from aullm_dist.evaluation.summary import print_summaries, print_summary, zeroed_scores
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runs.predictions import write_predictions


def _zeroed(run, token, rows, change, folds=None):
    """Write a token's zeroed answers, the logits moved by `change`."""
    for index, fold in rows.items():
        if folds is None or index in folds:
            moved = [replace(row, logits=tuple(x + change for x in row.logits)) for row in fold if row.role == "test"]
            write_predictions(RunPaths(run).fold(index).zeroed(token), moved, aus=AUS, epoch=3, step=30)


def _config(**changes):
    return load(None, [f"{name.replace('__', '.')}={value}" for name, value in changes.items()])


def test_scores_without_a_soft_token_by_hand(tmp_path):
    _, rows = make_run(tmp_path)
    assert zeroed_scores(tmp_path) == {}
    _zeroed(tmp_path, "content", rows, -1.5)
    _zeroed(tmp_path, "instruction", rows, 0.5, folds={0, 1})  # not of every fold: left out
    tests = [row for fold in rows.values() for row in fold if row.role == "test"]
    labels, logits = (np.array([getattr(row, name) for row in tests]) for name in ("labels", "logits"))
    moved = np.abs(1 / (1 + np.exp(-logits)) - 1 / (1 + np.exp(1.5 - logits))).mean()

    def f1(wanted, said):
        return 2 * (wanted & said).sum() / max(1, wanted.sum() + said.sum())

    positive, said = labels == 1, logits > 1.5
    each = [(f1(p, s) + f1(~p, ~s)) / 2 for p, s in zip(positive.T, said.T, strict=True)]
    by_hand = np.mean(each)
    assert zeroed_scores(tmp_path) == {"content": (pytest.approx(by_hand), pytest.approx(moved))}
    assert f1_macro(labels, said) == pytest.approx(each)


def test_a_finished_run_is_summed_up(tmp_path, capsys):
    run = tmp_path / "run"
    _, rows = make_run(run)
    make_run(run / "baselines" / "led_cnn", seed=0)
    (run / "baselines" / "broken").mkdir()
    (run / "baselines" / "broken" / "folds.json").write_text("{")
    _zeroed(run, "content", rows, -1.5)
    _zeroed(run, "instruction", rows, 0.25)
    print_summary(run, _config(monitor__tensorboard="true"))
    out = capsys.readouterr().out
    metrics = evaluate_run(run)
    score = f"{100 * metrics['mean']['f1_macro']:.1f}"
    scores = {name: f"{100 * score:.1f}" for name, (score, _) in zeroed_scores(run).items()}
    lines = {line[:42].strip(): line[42:].split() for line in out.splitlines()}
    assert lines["AULLM++"] == [score]
    assert lines["with the content token (CT) zeroed"][0] == scores["content"]
    assert lines["with the instruction token (IT) zeroed"][0] == scores["instruction"]
    change = f"{zeroed_scores(run)['content'][1]:.3f}"
    assert lines["with the content token (CT) zeroed"][1:] == ["answers", "move", "by", change, "on", "average"]
    assert lines["no-LLM baseline (led_cnn)"][:1] == [score]
    assert lines["floor: never predicting an AU"] == [f"{100 * metrics['floors']['f1_macro']:.1f}"]
    assert "no-LLM baseline (broken)" not in lines
    for part in (f"Run folder   {run}\n", "/fold-*/thresholds.json", "TensorBoard", "metrics.json", "Next"):
        assert part in out
    assert "The corpus above is synthetic" in out


def test_a_network_s_run_with_nothing_beside_it_has_no_comparison(tmp_path, capsys):
    make_run(tmp_path, inner_fraction=0)
    settings = {"model__llm": "none", "monitor__tensorboard": "false", "data__train": tmp_path / "data"}
    print_summary(tmp_path, _config(**settings))
    out = capsys.readouterr().out
    assert "Mean f1_macro" not in out
    assert "TensorBoard" not in out
    assert "Thresholds" not in out
    assert "synthetic" not in out
    assert f"\nNext: aullm-dist evaluate {tmp_path}\n" in out


@pytest.mark.parametrize("llm", ["none", "tiny"])
def test_a_run_without_a_test_side_gets_thresholds(tmp_path, capsys, llm):
    plan, _ = make_run(tmp_path)
    write_folds(tmp_path / "folds.json", replace(plan, folds=tuple(replace(fold, test=()) for fold in plan.folds)))
    print_summary(tmp_path, _config(model__llm=llm))
    out = capsys.readouterr().out
    assert not (tmp_path / "metrics.json").exists()
    assert RunPaths(tmp_path).fold(0).thresholds.exists()
    assert "Numbers" not in out
    assert f"Next: aullm-dist predict {tmp_path}/fold-00 CLIPS" in out
    assert ("aullm-dist merge" in out) == (llm != "none")


def test_runs_of_a_sweep_are_a_line_each(tmp_path, capsys):
    make_run(tmp_path / "a")
    make_run(tmp_path / "a" / "baselines" / "led_cnn", seed=2)
    plan, _ = make_run(tmp_path / "b", seed=1)
    write_folds(tmp_path / "b" / "folds.json", replace(plan, folds=tuple(replace(f, test=()) for f in plan.folds)))
    print_summaries({"first": tmp_path / "a", "second": tmp_path / "b"}, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    mean, other = (
        evaluate_run(folder)["mean"] for folder in (tmp_path / "a", tmp_path / "a" / "baselines" / "led_cnn")
    )
    assert lines[1].split()[:3] == ["run", "f1_macro", "auc"]
    assert lines[2].split() == ["first", f"{100 * mean['f1_macro']:.1f}", f"{100 * mean['auc']:.1f}"]
    assert lines[3].rsplit(maxsplit=2)[1:] == [f"{100 * other['f1_macro']:.1f}", f"{100 * other['auc']:.1f}"]
    assert lines[3].startswith("first, no LLM (led_cnn)")
    assert lines[4].split() == ["second", "no", "test", "side"]
    assert (tmp_path / "b" / "fold-00" / "thresholds.json").exists()
    assert f"Next: aullm-dist report ablation {tmp_path}/a {tmp_path}/b" in lines


def test_thresholds_are_those_of_the_fold_s_inner_rows(tmp_path):
    _, rows = make_run(tmp_path)
    written = write_thresholds(tmp_path)
    assert sorted(written) == sorted(rows)
    content = json.loads(written[2].read_text())
    assert content["epoch"] == 3
    assert list(content["thresholds"]) == [f"AU{au}" for au in AUS]
    inner = [row for row in rows[2] if row.role == "inner"]
    labels, logits = (np.array([getattr(row, name) for row in inner]) for name in ("labels", "logits"))
    for column, threshold in enumerate(content["thresholds"].values()):
        said = 1 / (1 + np.exp(-logits[:, column])) > threshold
        truth = labels[:, column]
        assert f1_macro(truth, said) >= f1_macro(truth, logits[:, column] > 0)


def test_cells_of_further_tables_by_hand():
    row = {"auc": 0.5, "auc_within_subject": None, "ap": 0.25, "ap_floor": 0.125, "brier": 0.2, "brier_floor": 0.1}
    row |= {"ece": 0.05, "subjects_with_both": 3}
    mean = {key: value for key, value in row.items() if key != "subjects_with_both"}
    ci = {"mean": {"auc": [0.4, 0.6], "auc_within_subject": None, "ap": [0.2, 0.3]}}
    metrics = {"aus": [12], "ranking": {"per_au": {"AU12": row}, "mean": mean}, "ci": ci}
    block = ranking_block(metrics)
    assert block.rows[0][1:] == ("50.0", "-", "3", "25.0", "12.5", "20.0", "10.0", "5.0")
    assert block.rows[1] == ("mean of 1 AUs", "50.0", "-", "", "25.0", "12.5", "20.0", "10.0", "5.0")
    assert block.rows[2][0] == "95% CI of the mean"
    assert [place for place, cell in enumerate(block.rows[2]) if cell] == [0, 1, 2, 4]
    assert len(block.notes) == 2
    assert len(ranking_block({**metrics, "ci": None}).rows) == 2
    part = {"mean": {"f1_binary": 0.1, "f1_macro": 0.2, "auc": 0.3}, "num_clips": 7, "aus": [1, 4]}
    assert corpora_block({"per_corpus": {"samm": part}}).rows == (("samm", "7", "1 4", "10.0", "20.0", "30.0"),)
    scores = {"f1_binary": 0.1, "f1_macro": 0.2, "auc": 0.3, "ap": 0.4}
    step = {"f1_macro": {"difference": 0.0125, "ci": [-0.01, 0.03]}, "auc": {"difference": None, "ci": None}}
    bare = {"f1_macro": {"difference": -0.5, "ci": None}, "auc": {"difference": 0.25, "ci": [0.1, 0.4]}}
    ladder = [
        {"stage": "evidence", "mean": scores, "step": None},
        {"stage": "structure", "mean": scores, "step": step},
        {"stage": "deduction", "mean": scores, "step": bare},
    ]
    cells = [entry[-4:] for entry in ladder_block(ladder).rows]
    assert cells == [
        ("", "", "", ""), ("+1.2", "-1.0..+3.0", "-", "-"), ("-50.0", "-", "+25.0", "+10.0..+40.0")
    ]  # fmt: skip
