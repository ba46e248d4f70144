"""The ladder of an answer in stages: scores and steps against a hand-made example, and files that do not belong."""

import json

import numpy as np
import pytest

from aullm_dist.data.protocols import FoldPlan, SampleInfo, make_folds, write_folds
from aullm_dist.errors import UserError
from aullm_dist.evaluation.evaluate import score_run
from aullm_dist.evaluation.ladder import score_ladder
from aullm_dist.evaluation.tables import render
from aullm_dist.runs.paths import FoldPaths
from aullm_dist.runs.predictions import Pooled, StoredPrediction, write_predictions

AUS = (1, 4)
LABELS = np.array([[1, 0], [0, 1], [1, 1], [0, 0]])


def pooled(signs, subjects=("s1", "s1", "s2", "s2")):
    ids = tuple(f"c/{n}" for n in range(4))
    return Pooled(ids, tuple(subjects), ("c",) * 4, (0,) * 4, LABELS, np.array(signs, dtype=float))


def test_scores_and_steps_of_a_hand_made_example():
    """AU1: two of four right, then three, then all. AU4 is right from the start."""
    right = np.where(LABELS == 1, 1.0, -1.0)
    first, second = right.copy(), right.copy()
    first[[0, 1], 0] *= -1
    second[1, 0] *= -1
    ladder = score_ladder(
        {"evidence": pooled(first), "structure": pooled(second)}, pooled(right), AUS, bootstrap=0, seed=0
    )
    assert [entry["stage"] for entry in ladder] == ["evidence", "structure", "deduction"]
    # AU1 at first: tp 1 (clip 2), fp 1 (clip 1), fn 1 (clip 0), tn 1: both F1 are 0.5. Then tp 2, fp 1, fn 0, tn 1.
    means = [entry["mean"]["f1_macro"] for entry in ladder]
    assert means == pytest.approx([(0.5 + 1) / 2, ((4 / 5 + 2 / 3) / 2 + 1) / 2, 1.0])
    assert [entry["mean"]["f1_binary"] for entry in ladder] == pytest.approx([0.75, 0.9, 1.0])
    assert ladder[0]["step"] is None
    assert ladder[1]["step"]["f1_macro"] == {"difference": pytest.approx(means[1] - means[0]), "ci": None}
    assert ladder[2]["step"]["auc"]["difference"] == pytest.approx(ladder[2]["mean"]["auc"] - ladder[1]["mean"]["auc"])


def test_intervals_are_paired():
    """Answers that are equal clip by clip have a step of exactly 0, however uncertain each score is."""
    noise = np.random.default_rng(0).normal(size=(4, 2))
    ladder = score_ladder({"evidence": pooled(noise)}, pooled(noise), AUS, bootstrap=50, seed=1)
    assert ladder[1]["step"]["f1_macro"] == {"difference": 0.0, "ci": [0.0, 0.0]}
    assert score_ladder({}, pooled(noise), AUS, bootstrap=50, seed=1) is None


@pytest.fixture
def run(tmp_path):
    samples = [SampleInfo(f"casme2/s{s}/c{c}", f"casme2/s{s}", "casme2", ()) for s in range(4) for c in range(3)]
    folds = make_folds(samples, "grouped", seed=0, inner_fraction=0.0, num_folds=2)
    write_folds(tmp_path / "folds.json", FoldPlan("grouped", ("casme2",), AUS, 0, folds))
    rng = np.random.default_rng(3)
    for fold in folds:
        rows = [
            StoredPrediction(
                name, name.rpartition("/")[0], "casme2", fold.index, "test", (n % 2, 1 - n % 2),
                tuple(rng.normal(size=2)),
            )
            for n, name in enumerate(fold.test)
        ]  # fmt: skip
        for path in (FoldPaths(tmp_path, fold.index).predictions(1), FoldPaths(tmp_path, fold.index).stage("evidence")):
            write_predictions(path, rows, aus=AUS, epoch=1, step=4)
    return tmp_path


def test_a_run_with_stages_shows_its_ladder(run):
    metrics = score_run(run, bootstrap=20)
    assert [entry["stage"] for entry in metrics["ladder"]] == ["evidence", "deduction"]
    text = render(metrics, "text")
    assert text.index("Ladder") > text.index("Held-out subjects, threshold fixed")
    assert "+ deduction (the answer)" in text
    assert max(map(len, text.splitlines())) <= 100
    json.loads(render(metrics, "json"))


def test_a_stage_of_some_folds_alone_is_left_out(run):
    FoldPaths(run, 1).stage("evidence").unlink()
    metrics = score_run(run, bootstrap=0)
    assert metrics["ladder"] is None
    assert "Ladder" not in render(metrics, "text")


def test_a_stage_of_another_step_is_left_out(run):
    path = FoldPaths(run, 0).stage("evidence")
    path.write_text(path.read_text().replace('"step": 4', '"step": 3'))
    assert score_run(run, bootstrap=0)["ladder"] is None


def test_a_stage_of_other_clips_is_refused(run):
    path = FoldPaths(run, 0).stage("evidence")
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(UserError, match="evidence.jsonl: answers other clips than .*epoch-0001.jsonl"):
        score_run(run, bootstrap=0)
