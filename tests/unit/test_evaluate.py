"""A run folder from predictions to tables: pooling, joining, thresholds without test labels, and every bad input."""

import argparse
import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from prediction_samples import rows_of

from aullm_dist.commands.evaluate import add_arguments, run
from aullm_dist.config import load, to_dict
from aullm_dist.data.corpora import CORPORA
from aullm_dist.data.protocols import FoldPlan, SampleInfo, make_folds, write_folds
from aullm_dist.errors import UserError
from aullm_dist.evaluation.evaluate import evaluate_run
from aullm_dist.evaluation.metrics import f1_macro, logit_of, summarise
from aullm_dist.evaluation.scores import InnerScores, Intervals, Metrics
from aullm_dist.evaluation.tables import render
from aullm_dist.runs.paths import FoldPaths
from aullm_dist.runs.predictions import read_predictions, write_predictions

AUS = (1, 4, 12, 45)


def make_run(run_dir, *, subjects=6, clips=6, seed=0, epoch=3, inner_fraction=0.4, skip=()):
    """Write a LOSO run whose logits carry some evidence; return the plan and the rows of each fold."""
    generator = np.random.default_rng(seed)
    samples, truth = [], {}
    for subject in range(subjects):
        for clip in range(clips - subject % 3):
            name = f"casme2/sub{subject:02d}"
            samples.append(SampleInfo(f"{name}/clip{clip}", name, "casme2", ()))
            truth[samples[-1].sample_id] = tuple(int(x) for x in generator.random(len(AUS)) < (0.5, 0.6, 0.4, 0.0))
    plan = FoldPlan("loso", ("casme2",), AUS, 0, make_folds(samples, "loso", inner_fraction=inner_fraction))
    write_folds(run_dir / "folds.json", plan)
    rows = {}
    for fold in plan.folds:
        rows[fold.index] = rows_of(fold, truth, generator, gain=1.2, offset=-1.4)
        if fold.index not in skip:
            write_fold(run_dir, fold.index, rows[fold.index], epoch)
    return plan, rows


def write_fold(run_dir, fold, rows, epoch=3, aus=AUS):
    write_predictions(FoldPaths(run_dir, fold).predictions(epoch), rows, aus=aus, epoch=epoch, step=10 * epoch)


def edit_line(path, line, changes):
    lines = path.read_text().splitlines()
    lines[line] = json.dumps({**json.loads(lines[line]), **changes})
    path.write_text("\n".join(lines) + "\n")


def test_folds_are_pooled_not_averaged(tmp_path):
    _, rows = make_run(tmp_path)
    metrics = evaluate_run(tmp_path, bootstrap=50)
    assert metrics.keys() == Metrics.__required_keys__
    assert metrics["inner_thresholds"].keys() == InnerScores.__required_keys__
    assert metrics["ci"].keys() == Intervals.__required_keys__
    tests = [row for fold in rows.values() for row in fold if row.role == "test"]
    labels, logits = np.array([row.labels for row in tests]), np.array([row.logits for row in tests])
    expected = summarise((labels, logits), AUS)
    assert metrics["mean"] == pytest.approx(expected["mean"])
    assert metrics["per_au"]["AU4"]["f1_macro"] == pytest.approx(f1_macro(labels, logits > 0)[1])
    folds = [np.array([row.fold for row in tests]) == fold for fold in rows]
    averaged = np.mean([f1_macro(labels[mask], logits[mask] > 0).mean() for mask in folds])
    assert abs(averaged - metrics["mean"]["f1_macro"]) > 0.01
    assert metrics["num_clips"] == len(tests)
    assert metrics["num_subjects"] == 6


def test_row_order_does_not_matter(tmp_path):
    _, rows = make_run(tmp_path)
    before = evaluate_run(tmp_path, bootstrap=50)
    generator = np.random.default_rng(1)
    for fold, fold_rows in rows.items():
        write_fold(tmp_path, fold, [fold_rows[position] for position in generator.permutation(len(fold_rows))])
    assert evaluate_run(tmp_path, bootstrap=50) == before


def test_thresholds_do_not_see_test_labels(tmp_path):
    _, rows = make_run(tmp_path)
    before = evaluate_run(tmp_path, bootstrap=0)
    flipped = {row.sample_id: tuple(1 - label for label in row.labels) for row in rows[0] if row.role == "test"}
    for fold, fold_rows in rows.items():
        write_fold(tmp_path, fold, [replace(row, labels=flipped.get(row.sample_id, row.labels)) for row in fold_rows])
    after = evaluate_run(tmp_path, bootstrap=0)
    assert after["inner_thresholds"]["folds"]["fold-00"] == before["inner_thresholds"]["folds"]["fold-00"]
    assert after["inner_thresholds"]["mean"] != before["inner_thresholds"]["mean"]


def test_inner_thresholds_are_applied_fold_by_fold(tmp_path):
    _, rows = make_run(tmp_path)
    inner = evaluate_run(tmp_path, bootstrap=20)["inner_thresholds"]
    labels, predicted = [], []
    for fold, fold_rows in rows.items():
        thresholds = logit_of(np.array([inner["folds"][f"fold-{fold:02d}"][f"AU{au}"] for au in AUS]))
        for row in fold_rows:
            if row.role == "test":
                labels.append(row.labels)
                predicted.append(np.array(row.logits) > thresholds)
    assert inner["mean"]["f1_macro"] == pytest.approx(f1_macro(np.array(labels), np.array(predicted)).mean())
    assert {values["AU45"] for values in inner["folds"].values()} == {0.5}
    assert len({values["AU4"] for values in inner["folds"].values()}) > 1
    assert inner["ci"]["mean"]["f1_macro"][0] <= inner["mean"]["f1_macro"] <= inner["ci"]["mean"]["f1_macro"][1]


def test_last_epoch_counts_and_another_is_kept_apart(tmp_path):
    _, rows = make_run(tmp_path, epoch=3)
    for fold, fold_rows in rows.items():
        write_fold(tmp_path, fold, [replace(row, logits=(-1.0,) * 4) for row in fold_rows], epoch=10)
    last = evaluate_run(tmp_path, bootstrap=0)
    assert set(last["epochs"].values()) == {10}
    assert last["mean"]["f1_macro"] == pytest.approx(last["floors"]["f1_macro"])
    written = (tmp_path / "metrics.json").read_bytes()
    third = evaluate_run(tmp_path, epoch=3, bootstrap=0)
    assert third["mean"] != last["mean"]
    assert "epoch 3 was chosen by hand" in (tmp_path / "table-epoch-0003.md").read_text()
    assert (tmp_path / "metrics.json").read_bytes() == written
    with pytest.raises(UserError, match=r"fold-00/predictions: no epoch 4; allowed are last and 3, 10"):
        evaluate_run(tmp_path, epoch=4)


def test_missing_and_shorter_folds_are_said_in_words(tmp_path):
    _, rows = make_run(tmp_path, skip=(1, 4))
    write_fold(tmp_path, 0, rows[0], epoch=9)
    text = render(evaluate_run(tmp_path, bootstrap=0), "text").replace("\n", " ")
    assert "4 of 6 folds are here; the scores leave out casme2/sub01, casme2/sub04" in text
    assert "behind epoch 9: fold-02 (epoch 3), fold-03 (epoch 3), fold-05 (epoch 3)" in text


def test_files_hold_the_contract(tmp_path):
    make_run(tmp_path)
    metrics = evaluate_run(tmp_path, bootstrap=30)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert saved == metrics
    assert saved["unit"] == "fraction"
    assert saved["threshold"] == 0.5
    for part in (saved["mean"], saved["floors"], *saved["per_au"].values()):
        assert {"f1_binary", "f1_macro", "auc"} <= set(part)
    assert saved["per_au"]["AU45"]["auc"] is None
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [row["au"] for row in table] == ["1", "4", "12", "45", "mean"] * 2
    assert float(table[4]["f1_macro"]) == pytest.approx(saved["mean"]["f1_macro"], abs=1e-6)
    assert f"| AU12 Lip Corner Puller | {saved['per_au']['AU12']['support']} |" in (tmp_path / "table.md").read_text()
    assert not list(tmp_path.glob(".*.tmp"))


def test_text_table_is_aligned_percent_within_100_columns(tmp_path):
    make_run(tmp_path)
    metrics = evaluate_run(tmp_path, bootstrap=30)
    text = render(metrics, "text")
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0] == "Held-out subjects, threshold fixed at 0.5 on sigmoid(logit)"
    assert "Protocol loso on casme2: 30 clips of 6 subjects, 6 of 6 folds pooled, epoch 3; in percent." in lines
    header = next(line for line in lines if line.startswith("AU "))
    row = next(line for line in lines if line.startswith("AU12 Lip Corner Puller"))
    cell = f"{100 * metrics['per_au']['AU12']['f1_macro']:.1f}"
    assert row[: header.index("f1_macro") + len("f1_macro")].endswith(f" {cell}")
    assert "Without a positive clip: AU45." in text
    widest = {f"AU{au}": {**metrics["per_au"]["AU4"], "support": 1000} for au in (12, 15)}
    full = {
        "mean": dict.fromkeys(metrics["ci"]["mean"], (1.0, 1.0)),
        "per_au": dict.fromkeys(widest, {"f1_macro": (1.0, 1.0)}),
    }
    ranks = {"mean": metrics["ranking"]["mean"], "per_au": dict.fromkeys(widest, metrics["ranking"]["per_au"]["AU4"])}
    extreme = {**metrics, "aus": [12, 15], "per_au": widest, "ci": {**metrics["ci"], **full}, "ranking": ranks}
    extreme["inner_thresholds"] = None
    assert max(map(len, render(extreme, "text").splitlines())) <= 100
    assert "thresholds chosen per fold and AU on inner held-out training subjects" in text


def test_run_without_inner_rows_has_no_second_table(tmp_path):
    make_run(tmp_path, inner_fraction=0)
    metrics = evaluate_run(tmp_path, bootstrap=0)
    assert metrics["inner_thresholds"] is None
    assert metrics["ci"] is None
    text = render(metrics, "text")
    assert "No inner held-out subjects were predicted" in text
    assert "thresholds chosen per fold" not in text


def parse(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(list(words))


def test_command_prints_what_it_was_asked_for(tmp_path, capsys):
    make_run(tmp_path)
    assert run(parse(str(tmp_path), "--bootstrap", "20", "--format", "json")) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "metrics.json").read_text())
    assert run(parse(str(tmp_path), "--epoch", "3", "--bootstrap", "0")) == 0
    assert capsys.readouterr().out.startswith("Held-out subjects, threshold fixed at 0.5")


@pytest.mark.parametrize("words", [("--epoch", "best"), ("--bootstrap", "-1"), ("--format", "html")])
def test_command_refuses_bad_arguments(words, capsys):
    with pytest.raises(SystemExit):
        parse("run", *words)
    assert words[1] in capsys.readouterr().err


def test_non_finite_logits_are_never_written(tmp_path):
    _, rows = make_run(tmp_path / "run")
    path = tmp_path / "epoch-0001.jsonl"
    with pytest.raises(UserError, match="not finite; the training has diverged"):
        write_predictions(path, [replace(rows[0][0], logits=(0.0, float("nan"), 0.0, 0.0))], aus=AUS, epoch=1, step=1)
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_predictions_survive_the_round_trip(tmp_path):
    _, rows = make_run(tmp_path)
    file = read_predictions(FoldPaths(tmp_path, 2).predictions(3))
    assert (file.aus, file.epoch, file.step, list(file.rows)) == (AUS, 3, 30, rows[2])


@pytest.mark.parametrize(
    ("line", "changes", "message"),
    [
        (
            1,
            {"logits": [0.0, float("nan"), 0.0, 0.0]},
            r"line 2 \(.*\): logit of AU4 is nan; it must be a finite",
        ),
        (1, {"logits": [0.0, "1", 0.0, 0.0]}, "logit of AU4 is '1'"),
        (1, {"logits": [0.0]}, "key logits has 1 values for 4 AUs"),
        (1, {"labels": [0, 2, 0, 0]}, "label of AU4 is 2; allowed are 0 and 1"),
        (1, {"role": "train"}, "role 'train'; allowed are test, inner"),
        (1, {"fold": 5}, "says fold 5, the file lies in fold 0"),
        (1, {"subject": 7}, "key subject: 7 is not of type str"),
        (-1, {"sample_id": "casme2/sub01/clip0"}, "casme2/sub01/clip0 is no test clip of fold 0"),
        (-1, {"sample_id": "casme2/sub00/clip0"}, "casme2/sub00/clip0 is predicted twice"),
        (0, {"aus": [1, 4, 12, 17]}, r"AUs \[1, 4, 12, 17\]; folds.json has \[1, 4, 12, 45\]"),
        (0, {"aus": [1, 4, 12, 12]}, "must list different AU numbers"),
        (0, {"epoch": "3"}, "line 1: key epoch: '3' is not of type int"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, changes, message):
    make_run(tmp_path)
    edit_line(FoldPaths(tmp_path, 0).predictions(3), line, changes)
    with pytest.raises(UserError, match=message) as caught:
        evaluate_run(tmp_path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "metrics.json").exists()


def test_bad_runs_are_named(tmp_path):
    with pytest.raises(UserError, match="no such run folder"):
        evaluate_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no fold-\*/predictions/epoch-\*.jsonl"):
        evaluate_run(tmp_path)
    _, rows = make_run(tmp_path)
    first = [row for row in rows[0] if row.role == "test"]
    write_fold(tmp_path, 0, first[1:])
    with pytest.raises(UserError, match="1 of 6 test clips have no row, first casme2/sub00/clip0"):
        evaluate_run(tmp_path)
    write_fold(tmp_path, 0, rows[0])
    write_fold(tmp_path, 6, rows[0])
    with pytest.raises(UserError, match="folds.json has no fold 6; it has 6"):
        evaluate_run(tmp_path)
    FoldPaths(tmp_path, 6).predictions(3).unlink()
    FoldPaths(tmp_path, 1).predictions(3).write_text("")
    with pytest.raises(UserError, match="empty; the first line must be a header"):
        evaluate_run(tmp_path)
    FoldPaths(tmp_path, 1).predictions(3).write_text('{"aus": [1], "epoch": 3}\n')
    with pytest.raises(UserError, match="key step is missing; needed are aus, epoch, step"):
        evaluate_run(tmp_path)
    FoldPaths(tmp_path, 1).predictions(3).write_text('{"aus": [1], "epo')
    with pytest.raises(UserError, match="line 1: not JSON"):
        evaluate_run(tmp_path)
    (tmp_path / "folds.json").unlink()
    with pytest.raises(UserError, match="folds.json: cannot be read"):
        evaluate_run(tmp_path)


def test_test_subject_among_inner_is_refused(tmp_path):
    plan, rows = make_run(tmp_path)
    leaking = [replace(row, subject=plan.folds[0].name) for row in rows[0]]
    write_fold(tmp_path, 0, leaking)
    with pytest.raises(UserError, match="casme2/sub00 is both test and inner"):
        evaluate_run(tmp_path)


def test_subject_tested_in_two_folds_is_refused(tmp_path):
    _, rows = make_run(tmp_path, inner_fraction=0)
    write_fold(tmp_path, 1, [replace(rows[1][0], subject="casme2/sub00"), *rows[1][1:]])
    with pytest.raises(UserError, match="subject casme2/sub00 is also tested in fold 0"):
        evaluate_run(tmp_path)


def test_unwritable_output_is_named(tmp_path):
    make_run(tmp_path)
    (tmp_path / "table.md").mkdir()
    with pytest.raises(UserError, match=r"table.md: cannot be written \(Is a directory\)"):
        evaluate_run(tmp_path, bootstrap=0)
    assert not (tmp_path / "metrics.json").exists()


def test_other_labels_in_another_fold_are_refused(tmp_path):
    plan, rows = make_run(tmp_path)
    name = plan.folds[0].inner[0]
    changed = [replace(row, labels=(1, 1, 1, 1)) if row.sample_id == name else row for row in rows[0]]
    write_fold(tmp_path, 0, changed)
    with pytest.raises(UserError, match=f"{name} has other labels or another subject than in fold 0"):
        evaluate_run(tmp_path)


def test_each_corpus_is_scored_on_its_own_clips_and_aus(tmp_path):
    plan, rows = make_run(tmp_path)
    # Three of the subjects become SAMM's; its AU set is another one, and a corpus that nobody knows has all of them.
    corpora = {0: "samm", 1: "samm", 2: "samm", 3: "casme2", 4: "casme2", 5: "homemade"}
    tests = {index: [row for row in fold if row.role == "test"] for index, fold in rows.items()}
    for index, fold in rows.items():
        write_fold(tmp_path, index, [replace(row, corpus=corpora[int(row.subject[-2:])]) for row in fold])
    scores = evaluate_run(tmp_path, bootstrap=0)["per_corpus"]
    assert list(scores) == ["casme2", "homemade", "samm"]
    for name, part in scores.items():
        own = [row for index, fold in tests.items() if corpora[index] == name for row in fold]
        columns = [c for c, au in enumerate(AUS) if name == "homemade" or au in CORPORA[name].aus]
        assert part["num_clips"] == len(own)
        assert part["aus"] == [AUS[c] for c in columns]
        labels, logits = (np.array([getattr(row, key) for row in own])[:, columns] for key in ("labels", "logits"))
        assert part["mean"] == summarise((labels, logits), part["aus"])["mean"]


def test_folds_that_stopped_early_are_noted(tmp_path):
    plan, _ = make_run(tmp_path)
    (tmp_path / "config.yaml").write_text(
        json.dumps(to_dict(load(None, ["training.epochs=999", "training.max_steps=30"]))) + "\n"
    )
    assert evaluate_run(tmp_path, bootstrap=0)["notes"] == []  # each stands at step 30
    (tmp_path / "config.yaml").write_text(
        json.dumps(to_dict(load(None, ["training.epochs=999", "training.max_steps=31"]))) + "\n"
    )
    notes = evaluate_run(tmp_path, bootstrap=0)["notes"]
    assert len(notes) == len(plan.folds)
    assert notes[0] == "fold-00 is unfinished: these are the answers of step 30 of 31"


def test_protocol_without_test_side_is_refused(tmp_path):
    plan, rows = make_run(tmp_path / "loso")
    run_dir = tmp_path / "all"
    fold = replace(plan.folds[0], name="all", test=())
    write_folds(run_dir / "folds.json", replace(plan, protocol="all", folds=(fold,)))
    write_fold(run_dir, 0, [row for row in rows[0] if row.role == "inner"])
    with pytest.raises(UserError, match="no test predictions; protocol all has nothing to evaluate"):
        evaluate_run(run_dir)


def test_tables_say_that_faces_are_synthetic_and_the_llm_random(tmp_path):
    from aullm_dist import config
    from aullm_dist.evaluation.caveats import RANDOM_LLM, SYNTHETIC, caveats
    from aullm_dist.evaluation.compare import compare_blocks, compare_runs

    make_run(tmp_path)
    assert caveats([tmp_path]) == [], "a run that does not say"
    record = tmp_path / "config.yaml"
    record.write_text(json.dumps(config.to_dict(config.load(None, ["training.epochs=3"]))) + "\n")
    metrics = evaluate_run(tmp_path, bootstrap=0)
    assert metrics["caveats"] == [SYNTHETIC, RANDOM_LLM]
    for fmt in ("text", "markdown", "json"):
        assert "synthetic" in render(metrics, fmt)
        assert "weights are random" in " ".join(render(metrics, fmt).split())
    # What is copied alone says it too: a tabular without its comments, a row of the CSV.
    tabulars = render(metrics, "latex").split(r"\begin{tabular}")[1:]
    assert all(r"{l}{synthetic faces, random LLM} \\" in tabular.split(r"\end")[0] for tabular in tabulars)
    rows = csv.DictReader((tmp_path / "table.csv").open())
    assert {row["caveats"] for row in rows} == {"synthetic faces, random LLM"}
    blocks = compare_blocks(compare_runs(tmp_path, tmp_path, bootstrap=0))
    assert sum("synthetic" in note for block in blocks for note in block.notes) == 1
    # A prepared dataset is asked what it was made of.
    dataset, corpus = tmp_path / "dataset", tmp_path / "corpus"
    dataset.mkdir()
    corpus.mkdir()
    (dataset / "report.json").write_text(json.dumps({"corpus": "casme2", "root": str(corpus)}))
    settings = [f"data.train={dataset}", "model.llm=none"]
    record.write_text(json.dumps(config.to_dict(config.load(None, settings))) + "\n")
    assert caveats([tmp_path]) == []
    (corpus / "SYNTHETIC.json").write_text("{}")
    assert caveats([tmp_path]) == [SYNTHETIC]
    # Newer reports say it themselves: the corpus may be on another machine.
    for root, drawn in ((tmp_path / "gone", True), (corpus, False)):
        report = {"corpus": "casme2", "root": str(root), "synthetic": drawn}
        (dataset / "report.json").write_text(json.dumps(report))
        assert caveats([tmp_path]) == [SYNTHETIC] * drawn
    record.write_text("")
    (said,) = caveats([tmp_path])
    assert str(record) in said


def test_what_is_next_is_quoted_and_can_be_done(tmp_path):
    from aullm_dist import config
    from aullm_dist.evaluation.summary import _next_steps

    run = tmp_path / "my run"
    loaded = config.load(None, ["data.train=[a]"])
    assert f"aullm-dist evaluate '{run}'" in _next_steps(run, loaded, has_test_side=True)
    without = _next_steps(run, loaded, has_test_side=False)
    assert "evaluate" not in without
    assert f"aullm-dist predict '{run}/fold-00'" in without
    assert f"aullm-dist merge '{run}/fold-00'" in without
    networks = config.load(None, ["data.train=[a]", "model.llm=none"])
    assert "merge" not in _next_steps(run, networks, has_test_side=False)
