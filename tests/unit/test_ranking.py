"""Ranking and calibration against scikit-learn, runs beside each other, and the leaky variants."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from test_evaluate import AUS, make_run, write_fold

from aullm_dist.cli import main
from aullm_dist.errors import UserError
from aullm_dist.evaluation.compare import compare_runs, seed_summary
from aullm_dist.evaluation.evaluate import evaluate_run
from aullm_dist.evaluation.metrics import f1_macro, probability_of
from aullm_dist.evaluation.ranking import average_precision, calibration, weighted_ap, within_subject_auc
from aullm_dist.runs.paths import FoldPaths


def draws(n=60, ties=True, seed=0):
    generator = np.random.default_rng(seed)
    labels = (generator.random(n) < 0.3).astype(int)
    logits = labels + generator.normal(size=n)
    return labels, np.round(logits, 1) if ties else logits


def test_average_precision_is_scikit_learns():
    for seed in range(5):
        labels, logits = draws(seed=seed)
        assert average_precision(labels, logits) == pytest.approx(average_precision_score(labels, logits))
    assert average_precision(np.ones(4), np.arange(4)) is None
    assert average_precision(np.zeros(4), np.arange(4)) is None


def test_weighted_ap_equals_repeating_rows():
    labels, logits = draws()
    weights = np.random.default_rng(1).integers(0, 3, size=(4, 60))
    expected = [average_precision_score(np.repeat(labels, w), np.repeat(logits, w)) for w in weights]
    assert weighted_ap(labels, logits, weights) == pytest.approx(expected)
    assert np.isnan(weighted_ap(labels, logits, weights * (labels == 0))).all()


def test_auc_within_subjects_is_free_of_offsets():
    labels, logits = draws(ties=False)
    subjects = [f"s{position % 6}" for position in range(60)]
    shifted = logits + 20.0 * np.array([int(name[1:]) for name in subjects])
    within = within_subject_auc(labels, logits, subjects)
    assert within_subject_auc(labels, shifted, subjects) == pytest.approx(within)
    assert roc_auc_score(labels, shifted) < roc_auc_score(labels, logits) - 0.1
    # By hand: over subjects, weighted by pairs.
    total = wins = 0.0
    for name in set(subjects):
        own = np.array([subject == name for subject in subjects])
        pairs = labels[own].sum() * (1 - labels[own]).sum()
        if pairs:
            total, wins = total + pairs, wins + pairs * roc_auc_score(labels[own], logits[own])
    assert within == pytest.approx(wins / total)
    assert within_subject_auc(labels, logits, [str(label) for label in labels]) is None


def test_calibration():
    labels, logits = draws()
    result = calibration(labels, logits)
    assert result["brier"] == pytest.approx(brier_score_loss(labels, probability_of(logits)))
    certain = calibration(np.array([0, 0, 1, 1]), np.array([-50.0, -50.0, 50.0, 50.0]))
    assert certain["brier"] == pytest.approx(0)
    assert certain["ece"] == pytest.approx(0)
    wrong = calibration(np.array([0, 0, 0, 0]), np.full(4, 50.0))
    assert (wrong["ece"], wrong["brier_floor"]) == (pytest.approx(1.0), 0.0)


def test_the_table_says_that_pooled_auc_is_biased_and_gives_the_one_within(tmp_path, capsys):
    make_run(tmp_path)
    assert main(["evaluate", str(tmp_path), "--bootstrap", "20"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "both are biased low" in text
    assert "Ranking and calibration" in text
    saved = json.loads((tmp_path / "metrics.json").read_text())["ranking"]
    assert saved["per_au"]["AU45"]["auc_within_subject"] is None
    assert 0 < saved["mean"]["auc_within_subject"] <= 1
    # AU45 has no positive clip: it is in neither mean.
    floors = [row["ap_floor"] for row in saved["per_au"].values()]
    assert floors[3] is None
    assert saved["mean"]["ap_floor"] == pytest.approx(np.mean(floors[:3]))


def test_a_run_compared_with_itself_differs_by_nothing(tmp_path):
    make_run(tmp_path / "a")
    result = compare_runs(tmp_path / "a", tmp_path / "a", bootstrap=50)
    for part in result["mean"].values():
        assert part["first"] == part["second"] > 0
        assert (part["difference"], part["ci"]) == (0.0, [0.0, 0.0])
    assert result["per_au"]["AU45"]["auc"]["difference"] is None


def test_the_difference_of_two_runs_is_paired(tmp_path, capsys):
    _, rows = make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    for index, fold in rows.items():
        better = [replace(r, logits=tuple(x + 2 * y for x, y in zip(r.logits, r.labels, strict=True))) for r in fold]
        write_fold(tmp_path / "b", index, better)
    first, second = (evaluate_run(tmp_path / name, bootstrap=50) for name in "ab")
    result = compare_runs(tmp_path / "a", tmp_path / "b", bootstrap=50)
    for name in ("f1_binary", "f1_macro", "auc"):
        expected = second["mean"][name] - first["mean"][name]
        assert result["mean"][name]["difference"] == pytest.approx(expected)
    low, high = result["mean"]["auc"]["ci"]
    assert 0 < low <= high
    # Unpaired, the two intervals overlap; paired, the difference is clear.
    assert high - low < sum(part["ci"]["mean"]["auc"][1] - part["ci"]["mean"]["auc"][0] for part in (first, second))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--bootstrap", "20"]) == 0
    out = capsys.readouterr().out
    assert "minus" in out
    assert max(len(line) for line in out.splitlines() if str(tmp_path) not in line) <= 100


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", seed=1)
    make_run(tmp_path / "c", clips=7)
    with pytest.raises(UserError, match="has other labels than in"):
        compare_runs(tmp_path / "a", tmp_path / "b")
    with pytest.raises(UserError, match="does not test clip"):
        compare_runs(tmp_path / "a", tmp_path / "c")
    with pytest.raises(UserError, match="no such run folder"):
        compare_runs(tmp_path / "a", tmp_path / "d")


def test_several_seeds_are_scored_one_by_one_and_averaged(tmp_path, capsys):
    _, rows = make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    for index, fold in rows.items():
        write_fold(tmp_path / "b", index, [replace(row, logits=tuple(-x for x in row.logits)) for row in fold])
    alone = [evaluate_run(tmp_path / name, bootstrap=0)["mean"]["f1_macro"] for name in "ab"]
    result = seed_summary([tmp_path / "a", tmp_path / "b"])
    assert result["mean"]["f1_macro"]["mean"] == pytest.approx(np.mean(alone))
    assert result["mean"]["f1_macro"]["sd"] == pytest.approx(np.std(alone, ddof=1))
    assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert "Mean and standard deviation over 2 runs" in capsys.readouterr().out
    assert main(["evaluate", str(tmp_path / "a"), str(tmp_path / "b"), "--leaky"]) == 2


def test_leaky_variants_stand_beside_the_result_and_change_nothing(tmp_path, capsys):
    _, rows = make_run(tmp_path)
    for index, fold in rows.items():
        good = [replace(r, logits=tuple(4.0 * y - 2.0 for y in r.labels)) for r in fold]
        write_fold(tmp_path, index, good if index < 3 else fold, epoch=1)
        write_fold(tmp_path, index, good if index >= 3 else fold, epoch=2)
    honest = evaluate_run(tmp_path, bootstrap=0)
    leaky = evaluate_run(tmp_path, bootstrap=0, leaky=True)
    assert honest["leaky"] is None
    assert {**leaky, "leaky": None} == honest
    variants = {part["name"]: part for part in leaky["leaky"]["variants"]}
    tuned = variants["thresholds tuned on the test clips"]["mean"]["f1_macro"]
    one = variants["best test epoch, one for all folds"]
    each = variants["best test epoch of each fold"]
    assert tuned >= honest["mean"]["f1_macro"]
    assert one["chosen"]["epoch"] in (1, 2)
    assert list(each["chosen"]["epochs"].values()) == [1, 1, 1, 2, 2, 2]
    # Each fold has an epoch without a mistake; AU45 has no positive clip, so half of its f1_macro is 0.
    assert each["mean"]["f1_macro"] == pytest.approx((3 + 0.5) / 4)
    assert each["mean"]["f1_macro"] > one["mean"]["f1_macro"] > honest["mean"]["f1_macro"]
    assert main(["evaluate", str(tmp_path), "--bootstrap", "0", "--leaky"]) == 0
    out = capsys.readouterr().out
    assert "Not results: what choices made on the test labels would have added to them" in out
    assert out.count("LEAKY: ") == 4


def test_tuned_thresholds_are_the_best_of_the_grid(tmp_path):
    _, rows = make_run(tmp_path)
    tests = [row for fold in rows.values() for row in fold if row.role == "test"]
    labels, logits = np.array([row.labels for row in tests]), np.array([row.logits for row in tests])
    grid = np.arange(10, 86, 5) / 100
    best = np.max([f1_macro(labels, probability_of(logits) > threshold) for threshold in grid], axis=0)
    leaky = evaluate_run(tmp_path, bootstrap=0, leaky=True)["leaky"]["variants"][0]
    assert leaky["mean"]["f1_macro"] == pytest.approx(best.mean())
    assert set(leaky["chosen"]["thresholds"]) == {f"AU{au}" for au in AUS}


def test_an_epoch_with_other_clips_is_refused(tmp_path):
    _, rows = make_run(tmp_path)
    write_fold(tmp_path, 0, rows[0][:-1], epoch=1)
    with pytest.raises(UserError, match="answers other test clips"):
        evaluate_run(tmp_path, bootstrap=0, leaky=True)
    assert FoldPaths(tmp_path, 0).predictions(1).exists()
