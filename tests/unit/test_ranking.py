"""Ranking and calibration against scikit-learn, runs beside each other, and the leaky variants."""

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from test_evaluate import AUS, make_run, write_fold

from aullm_dist.cli import main
from aullm_dist.data.protocols import write_folds
from aullm_dist.errors import UserError
from aullm_dist.evaluation.compare import compare_blocks, compare_runs, seed_summary
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
    for bootstrap, seed in ((-1, 0), (0, -1)):
        with pytest.raises(UserError, match=f"bootstrap {bootstrap}, seed {seed}: both must be at least 0"):
            compare_runs(tmp_path / "a", tmp_path / "a", bootstrap=bootstrap, seed=seed)
    plan, rows = make_run(tmp_path / "e")
    write_folds(tmp_path / "e" / "folds.json", replace(plan, aus=plan.aus[:3]))
    for index, fold in rows.items():
        fewer = [replace(row, labels=row.labels[:3], logits=row.logits[:3]) for row in fold]
        write_fold(tmp_path / "e", index, fewer, aus=plan.aus[:3])
    with pytest.raises(UserError, match=r"AUs \[1, 4, 12\]; .* has \[1, 4, 12, 45\]; the two must be equal"):
        compare_runs(tmp_path / "a", tmp_path / "e")
    with pytest.raises(UserError, match=r"AUs \[1, 4, 12\]; .* has \[1, 4, 12, 45\]"):
        seed_summary([tmp_path / "a", tmp_path / "e"])


def test_the_tables_of_a_comparison_by_hand():
    def part(difference, ci):
        return {"first": 0.5, "second": 0.75, "difference": difference, "ci": ci}

    scores = {"f1_binary": part(0.25, [0.1, 0.4]), "f1_macro": part(-0.0125, [-0.05, 0.025])}
    ranks = {"auc": part(None, None), "ap": part(0.0, None)}
    result = {
        "first": "runs/a", "second": "runs/b", "aus": [12], "num_clips": 40,
        "num_subjects": 7, "resamples": 500, "seed": 3, "caveats": [],
        "mean": {**scores, **ranks}, "per_au": {"AU12": {**scores, **ranks}},
    }  # fmt: skip
    binary, ranking_table = compare_blocks(result)
    assert binary.title[0] == "runs/b minus runs/a, in points"
    assert "40 clips of 7 subjects" in binary.title[1]
    assert "f1_binary 50.0 and 75.0" in binary.title[1]
    assert binary.header == ("AU", "f1_binary", "95% CI", "f1_macro", "95% CI")
    cells = ("+25.0", "+10.0..+40.0", "-1.2", "-5.0..+2.5")
    assert [row[1:] for row in binary.rows] == [cells, cells]
    assert binary.rows[1][0] == "mean of 1 AUs"
    assert ranking_table.header == ("AU", "auc", "95% CI", "ap", "95% CI")
    assert ranking_table.rows[0][1:] == ("-", "-", "+0.0", "-")
    assert "the same 500 resamples of the subjects, seed 3" in ranking_table.notes[0]


def test_the_interval_of_a_difference_is_that_of_differences(tmp_path):
    _, rows = make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    for index, fold in rows.items():
        write_fold(tmp_path / "b", index, [replace(r, logits=tuple(-x for x in r.logits)) for r in fold])
    there, back = (compare_runs(tmp_path / one, tmp_path / two, bootstrap=40, seed=5) for one, two in ("ab", "ba"))
    assert (there["resamples"], there["seed"], there["unit"]) == (40, 5, "fraction")
    assert (there["num_clips"], there["num_subjects"]) == (30, 6)
    for name in ("f1_binary", "f1_macro", "auc", "ap"):
        for key in ("AU1", "AU4", "AU12"):
            one, other = there["per_au"][key][name], back["per_au"][key][name]
            assert one["first"] == other["second"]
            assert one["difference"] == one["second"] - one["first"] == -other["difference"]
            assert one["ci"] == pytest.approx([-bound for bound in reversed(other["ci"])])
            assert one["ci"][0] <= one["difference"] <= one["ci"][1]
    plain = compare_runs(tmp_path / "a", tmp_path / "b", bootstrap=0)
    assert plain["resamples"] == 0
    assert plain["mean"]["auc"]["ci"] is None
    assert plain["mean"]["auc"]["difference"] == there["mean"]["auc"]["difference"]


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
