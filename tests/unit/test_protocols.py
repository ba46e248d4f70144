"""Folds: whole subjects, the same in every process, and blind to labels."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from aullm_dist.data.corpora import CORPORA
from aullm_dist.data.protocols import (
    FoldPlan,
    SampleInfo,
    au_vocabulary,
    make_folds,
    plan_from_file,
    read_folds,
    select_fold,
    write_folds,
)
from aullm_dist.data.stratification import render_stratification, stratification
from aullm_dist.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def make_samples(corpus="casme2", sizes=(5, 3, 8, 1, 2, 13, 4, 4), aus=(1, 4)):
    return [
        SampleInfo(f"{corpus}/sub{s:02d}/clip{c}", f"{corpus}/sub{s:02d}", corpus, aus)
        for s, size in enumerate(sizes, start=1)
        for c in range(size)
    ]


def subjects_of(samples, ids):
    wanted = set(ids)
    return {sample.subject for sample in samples if sample.sample_id in wanted}


def assert_sound(folds, samples):
    everything = {sample.sample_id for sample in samples}
    for fold in folds:
        assert set(fold.train) | set(fold.inner) | set(fold.test) == everything
        sides = [subjects_of(samples, side) for side in (fold.train, fold.inner, fold.test)]
        assert sum(map(len, sides)) == len(set.union(*sides))


def test_loso_tests_each_subject_once():
    samples = make_samples()
    folds = make_folds(samples, "loso", inner_fraction=0.2)
    assert_sound(folds, samples)
    assert [subjects_of(samples, fold.test) for fold in folds] == [{fold.name} for fold in folds]
    assert [fold.name for fold in folds] == sorted({sample.subject for sample in samples})
    assert all(len(subjects_of(samples, fold.inner)) == 1 for fold in folds)


def test_loso_inner_subjects_vary_over_folds():
    samples = make_samples(sizes=(2,) * 20)
    folds = make_folds(samples, "loso", inner_fraction=0.1)
    held_out = [subject for fold in folds for subject in subjects_of(samples, fold.inner)]
    assert len(set(held_out)) > 10


def test_grouped_covers_all_and_balances_clips():
    samples = make_samples(sizes=tuple(range(1, 27)))
    folds = make_folds(samples, "grouped", num_folds=5, inner_fraction=0)
    assert_sound(folds, samples)
    assert sorted(name for fold in folds for name in fold.test) == sorted(s.sample_id for s in samples)
    sizes = [len(fold.test) for fold in folds]
    assert max(sizes) - min(sizes) <= 5
    assert all(not fold.inner for fold in folds)


def test_grouped_follows_the_seed():
    samples = make_samples(sizes=(3,) * 12)
    first, again, other = (make_folds(samples, "grouped", num_folds=4, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_cross_trains_on_one_corpus_and_tests_on_the_other():
    samples = make_samples("casme2") + make_samples("samm") + make_samples("4dme")
    (fold,) = make_folds(samples, "cross", train_corpora=["casme2"], test_corpora=["samm"], inner_fraction=0.25)
    assert fold.name == "casme2->samm"
    assert {name.split("/")[0] for name in fold.train + fold.inner} == {"casme2"}
    assert {name.split("/")[0] for name in fold.test} == {"samm"}
    assert len(fold.test) == 40
    assert len(subjects_of(samples, fold.inner)) == 2


def every_corpus():
    return [sample for name in CORPORA for sample in make_samples(name, sizes=(3, 2, 4))]


@pytest.mark.parametrize(("source", "target"), list(permutations(CORPORA, 2)))
def test_every_ordered_pair_shares_aus(source, target):
    shared = au_vocabulary([source, target], "cross")
    assert set(shared) == set(CORPORA[source].aus) & set(CORPORA[target].aus)
    (fold,) = make_folds(every_corpus(), "cross", train_corpora=[source], test_corpora=[target])
    assert {name.split("/")[0] for name in fold.train + fold.inner} == {source}
    assert {name.split("/")[0] for name in fold.test} == {target}


def test_lodo_leaves_each_corpus_out_once():
    samples = [sample for sample in every_corpus() if sample.corpus != "casme3c"]
    folds = make_folds(samples, "lodo")
    assert_sound(folds, samples)
    assert [fold.name for fold in folds] == ["4dme", "casme", "casme2", "casme3a", "mmew", "samm"]
    assert all({name.split("/")[0] for name in fold.test} == {fold.name} for fold in folds)
    assert all(fold.inner for fold in folds)
    assert au_vocabulary(["casme2", "samm"], "lodo") == (1, 2, 4, 5, 6, 7, 9, 10, 12, 14, 15, 17)
    assert make_folds(samples, "lodo", seed=1) != folds  # the seed chooses inner subjects


def test_composite_leaves_each_subject_of_any_corpus_out_once():
    samples = every_corpus()
    folds = make_folds(samples, "composite", inner_fraction=0)
    assert_sound(folds, samples)
    assert [subjects_of(samples, fold.test) for fold in folds] == [{fold.name} for fold in folds]
    assert len(folds) == 3 * len(CORPORA)
    assert all(len({name.split("/")[0] for name in fold.train}) == len(CORPORA) for fold in folds)


def test_the_fewest_subjects_of_each_protocol():
    two = make_samples(sizes=(3, 2))
    folds = make_folds(two, "loso", inner_fraction=0)
    assert [(len(fold.train), len(fold.test)) for fold in folds] == [(2, 3), (3, 2)]
    assert len(make_folds(two, "grouped", num_folds=2, inner_fraction=0)) == 2
    with pytest.raises(UserError, match="protocol loso needs at least 2 subjects, got 1"):
        make_folds(make_samples(sizes=(3,)), "loso")
    with pytest.raises(UserError, match="3 folds: protocol grouped takes 2 up to the number of subjects, 2"):
        make_folds(two, "grouped", num_folds=3)
    with pytest.raises(UserError, match="1 folds: protocol grouped"):
        make_folds(two, "grouped", num_folds=1)
    for inner_fraction in (-0.1, 1.0):
        with pytest.raises(UserError, match="must be at least 0 and below 1"):
            make_folds(two, "loso", inner_fraction=inner_fraction)
    assert len(make_folds(make_samples(), "grouped")) == 5  # as it is documented
    # Of two training subjects none is held out, of three one.
    assert not any(fold.inner for fold in make_folds(make_samples(sizes=(1, 1, 1)), "loso", inner_fraction=0.1))
    assert all(fold.inner for fold in make_folds(make_samples(sizes=(1, 1, 1, 1)), "loso", inner_fraction=0.1))


def test_stratification_counts_positives_of_each_side():
    samples = [replace(sample, aus=(1,) if "sub01" in sample.subject else (4,)) for sample in make_samples()]
    plan = FoldPlan("loso", ("casme2",), (1, 4), 0, make_folds(samples, "loso", inner_fraction=0))
    report = stratification(plan, samples)
    first, second = report["folds"][:2]
    assert first["test"]["positives"] == {"AU1": first["test"]["clips"], "AU4": 0}
    assert first["train"]["positives"]["AU1"] == 0
    assert second["train"]["positives"]["AU1"] == first["test"]["clips"]
    assert report["empty"] == {"test": {"AU1": 7, "AU4": 1}, "train": {"AU1": 1, "AU4": 0}}
    text = render_stratification(report)
    assert "Folds without a positive test clip: AU1 in 7, AU4 in 1." in text
    assert "Folds without a positive training clip: AU1 in 1." in text


def test_folds_from_a_file_are_those_of_the_file(tmp_path):
    samples = make_samples()
    path = tmp_path / "folds.json"
    plan = FoldPlan("grouped", ("casme2",), (1, 4), 3, make_folds(samples, "grouped", seed=3, num_folds=3))
    write_folds(path, plan)
    assert plan_from_file(path, samples) == plan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fold: fold["test"].append("casme2/sub99/clip0"), "test: clip casme2/sub99/clip0 is in none"),
        (lambda fold: fold["train"].append(fold["test"].pop()), "is on the sides train and test"),
        (lambda fold: fold.update(train=[]), "trains on nothing"),
        (lambda fold: fold.update(train="casme2/sub01/clip0"), "must be lists of sample ids"),
        (lambda fold: fold["train"].append(7), "must be lists of sample ids"),
    ],
)
def test_a_file_of_folds_that_leaks_or_names_no_clip_is_refused(tmp_path, change, message):
    samples = make_samples()
    path = tmp_path / "folds.json"
    write_folds(path, FoldPlan("loso", ("casme2",), (1, 4), 0, make_folds(samples, "loso")))
    content = json.loads(path.read_text())
    change(content["folds"][1])
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        plan_from_file(path, samples)


def test_all_has_no_test_side():
    samples = make_samples()
    (fold,) = make_folds(samples, "all", inner_fraction=0.25)
    assert fold.test == ()
    assert len(subjects_of(samples, fold.inner)) == 2


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("loso", {}),
        ("grouped", {"num_folds": 3}),
        ("cross", {"train_corpora": ["casme2"], "test_corpora": ["samm"]}),
        ("lodo", {}),
        ("composite", {}),
        ("all", {}),
    ],
)
def test_labels_and_order_change_nothing(protocol, options):
    samples = make_samples("casme2") + make_samples("samm")
    folds = make_folds(samples, protocol, inner_fraction=0.2, seed=3, **options)
    altered = [replace(sample, aus=(number % 30,)) for number, sample in enumerate(samples)]
    random.Random(0).shuffle(altered)
    assert make_folds(altered, protocol, inner_fraction=0.2, seed=3, **options) == folds


def test_same_folds_in_another_process(tmp_path):
    samples = make_samples()
    path = tmp_path / "folds.json"
    write_folds(path, FoldPlan("grouped", ("casme2",), (1, 4), 7, make_folds(samples, "grouped", seed=7)))
    program = (
        "import sys; from pathlib import Path\n"
        "from aullm_dist.data.protocols import FoldPlan, SampleInfo, make_folds, write_folds\n"
        f"samples = [SampleInfo(*row) for row in {[(s.sample_id, s.subject, s.corpus, s.aus) for s in samples]!r}]\n"
        "plan = FoldPlan('grouped', ('casme2',), (1, 4), 7, make_folds(samples, 'grouped', seed=7))\n"
        "write_folds(Path(sys.argv[1]), plan)\n"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules\n"
    )
    other = tmp_path / "other.json"
    environment = {"PYTHONHASHSEED": "5", "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-c", program, str(other)], check=True, env=environment)
    assert other.read_bytes() == path.read_bytes()
    assert read_folds(path).folds == make_folds(samples, "grouped", seed=7)


def test_inner_needs_three_training_subjects():
    folds = make_folds(make_samples(sizes=(2, 2, 2)), "loso", inner_fraction=0.5)
    assert all(not fold.inner and fold.train for fold in folds)
    folds = make_folds(make_samples(sizes=(2, 2, 2, 2)), "loso", inner_fraction=0.99)
    assert all(len(fold.inner) == len(fold.test) * 2 and fold.train for fold in folds)


def test_au_vocabulary():
    assert au_vocabulary(["casme2"], "loso") == (1, 2, 4, 7, 12, 14, 15, 17)
    assert au_vocabulary(["samm", "casme2"], "cross") == (2, 4, 7, 12)
    assert au_vocabulary(["casme2", "4dme"], "all") == (1, 2, 4, 6, 7, 12, 14, 15, 17, 45)


@pytest.mark.parametrize(
    ("corpora", "protocol", "message"),
    [
        (
            ["casme9"],
            "loso",
            "corpus 'casme9' is unknown; allowed are casme, casme2, samm, 4dme, mmew",
        ),
        (["cross"], "loso", "corpus 'cross' is unknown"),
        (["casme2"], "kfold", "protocol 'kfold' is unknown; allowed are loso, grouped, cross, lodo, composite, all"),
        ([], "loso", "no corpus given"),
    ],
)
def test_au_vocabulary_refuses(corpora, protocol, message):
    with pytest.raises(UserError, match=message):
        au_vocabulary(corpora, protocol)


@pytest.mark.parametrize(
    ("samples", "protocol", "options", "message"),
    [
        (make_samples(sizes=(4,)), "loso", {}, "needs at least 2 subjects, got 1"),
        ([], "loso", {}, "no corpus given"),
        (make_samples("casme9"), "loso", {}, "corpus 'casme9' is unknown"),
        (make_samples(), "grouped", {"num_folds": 9}, "2 up to the number of subjects, 8"),
        (make_samples(), "grouped", {"num_folds": 1}, "1 folds"),
        (make_samples(), "loso", {"inner_fraction": 1.0}, "must be at least 0 and below 1"),
        (make_samples(), "lodo", {}, "needs at least 2 corpora, got 1"),
        (make_samples(), "composite", {}, "needs at least 2 corpora, got 1"),
        (make_samples(), "cross", {}, "needs a training corpus and a test corpus"),
        (make_samples(), "cross", {"train_corpora": ["casme2"], "test_corpora": ["casme2"]}, "is on both sides"),
        (make_samples(), "cross", {"train_corpora": ["casme2"], "test_corpora": ["samm"]}, "no clips of corpus samm"),
        (make_samples() + make_samples()[:1], "loso", {}, "casme2/sub01/clip0 occurs twice"),
        ([replace(make_samples()[0], subject="sub01")], "all", {}, "must start with 'casme2/'"),
    ],
)
def test_make_folds_refuses(samples, protocol, options, message):
    with pytest.raises(UserError, match=message) as caught:
        make_folds(samples, protocol, **options)
    assert "\n" not in str(caught.value)


def test_select_fold_range():
    folds = make_folds(make_samples(), "loso")
    assert select_fold(folds, 7) is folds[7]
    for index in (-1, 8):
        with pytest.raises(UserError, match="allowed are 0 to 7"):
            select_fold(folds, index)


def test_read_folds_refuses_what_it_did_not_write(tmp_path):
    path = tmp_path / "folds.json"
    with pytest.raises(UserError, match="cannot be read"):
        read_folds(path)
    path.write_text("{}")
    with pytest.raises(UserError, match="not a fold plan"):
        read_folds(path)
    write_folds(path, FoldPlan("loso", ("casme2",), (1,), 0, make_folds(make_samples(), "loso")))
    good = json.loads(path.read_text())
    leaking = json.loads(path.read_text())
    leaking["folds"][2]["train"].append(good["folds"][2]["test"][0])
    path.write_text(json.dumps(leaking))
    with pytest.raises(UserError, match=r"fold 2: clip casme2/sub03/clip0 is listed twice"):
        read_folds(path)
    tested_twice = json.loads(json.dumps(good))
    moved = good["folds"][0]["test"][0]
    tested_twice["folds"][1]["test"].append(moved)
    for side in ("train", "inner"):
        tested_twice["folds"][1][side] = [name for name in good["folds"][1][side] if name != moved]
    path.write_text(json.dumps(tested_twice))
    with pytest.raises(UserError, match="fold 1: clip casme2/sub01/clip0 is listed twice"):
        read_folds(path)
