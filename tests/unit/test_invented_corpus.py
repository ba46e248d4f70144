"""A corpus from one module outside the package: registered, prepared, folded, planned, drawn and named on a card."""

import dataclasses
import json

import invented_corpus
import pytest

from aullm_dist.cli import main
from aullm_dist.config import load
from aullm_dist.data.clips import read_samples
from aullm_dist.data.corpora import (
    CORPORA,
    CorpusSpec,
    SyntheticFacts,
    corpus_names,
    find_corpus,
    get_corpus,
    read_corpus,
    register,
    registry,
)
from aullm_dist.data.corpora.drawn import DRAWN_AUS
from aullm_dist.data.protocols import au_vocabulary, read_folds
from aullm_dist.data.synthetic import SyntheticSpec, plan_clips
from aullm_dist.data.synthetic.faces import Subject, au_bumps
from aullm_dist.errors import UserError
from aullm_dist.planning.cluster import Cluster
from aullm_dist.planning.planner import plan
from aullm_dist.planning.prompts import plan_prompt
from aullm_dist.release.facts import corpus_licence, corpus_title


@pytest.fixture
def invented():
    """The corpus, registered for one test."""
    yield register(invented_corpus.SPEC)
    del CORPORA[invented_corpus.SPEC.name]


def test_an_invented_corpus_goes_all_the_way_to_a_plan(invented, tmp_path, capsys):
    root, data, folds = invented_corpus.write_release(tmp_path / "raw"), tmp_path / "odd-name", tmp_path / "folds.json"
    line = ["prepare", "invented", "--root", root, "--out", data, "--size", 16, "--workers", 1]
    assert main(list(map(str, line))) == 0
    report = json.loads((data / "report.json").read_text())
    assert (report["corpus"], report["title"], report["fps"], report["num_clips"]) == (
        "invented",
        "The Invented Corpus",
        50.0,
        5,
    )
    # Its harness rule reads `12|4` as the grammar does; by the common one there would be an AU124 and a difference.
    assert report["differences"] == {"AU12": {"here": 2, "published": 3, "clips": [], "in_the_sheet_itself": -1}}
    assert main(["folds", "loso", str(data), "--out", str(folds)]) == 0
    written = read_folds(folds)
    assert (written.corpora, written.aus) == (("invented",), (1, 4, 12))
    assert [fold.name for fold in written.folds] == ["invented/p1", "invented/p2", "invented/p3"]
    # Whatever makes the traced passes short.
    small = ["model.llm_layers=1", "model.llm_hidden=32", "model.lora_targets=[q_proj]", "model.structure=false"]
    small += ["counterfactual.enabled=false", "model.attention=sdpa", "model.packing=false"]
    config = load(None, [f"data.train=[{data}]", "training.micro_batch=1", "training.global_batch=1", *small])
    planned = plan(config, Cluster(gpus=1, cpu=True), speed=False)
    assert any("prompt of 3 AUs (invented)" in text for text in planned.assumptions)
    assert au_vocabulary(["invented", "samm"], "cross") == (4, 12)


def test_an_invented_corpus_is_drawn_and_read_back(invented, tmp_path, capsys):
    out = tmp_path / "drawn"
    assert main(["synthesize", "invented", "--out", str(out), "--subjects", "2", "--clips", "2"]) == 0
    spec = SyntheticSpec(corpus="invented", subjects=2, clips_per_subject=2, amplitude_percent=2.0)
    records = read_corpus("invented", out).records
    assert [record.aus for record in records] == [clip.active_aus for clip in plan_clips(spec)]
    assert all(record.folder is not None and record.onset == 1 for record in records)
    # Without a number of its own the random streams are keyed by the name: no other corpus has them.
    assert spec.seed_words[1] not in {other.synthetic.stream for other in CORPORA.values()}


def test_the_card_names_the_makers_and_the_licence(invented):
    assert corpus_title("invented") == "The Invented Corpus"
    assert corpus_licence("invented") == (
        "The Invented Corpus: of the University of Nowhere, who publish it under CC BY 4.0."
    )
    signed = "who give it to research groups that sign for it; read what you signed."
    assert corpus_licence("samm") == f"SAMM: of Manchester Metropolitan University, {signed}"
    assert corpus_licence("lost") == f"lost: of its makers, {signed}"


def test_nothing_of_it_is_left_after_a_test():
    assert find_corpus("invented") is None
    with pytest.raises(UserError, match=r"'invented' is not known; allowed: casme, .*casme3c$"):
        get_corpus("invented")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "samm"}, "'samm' is registered already"),
        ({"name": "An/other"}, "allowed: a-z, 0-9 and _"),
        ({"aus": (4, 1)}, "at least one AU number, ascending"),
        ({"aus": (1, 4, 6)}, "no AU combination of its synthetic facts holds AU6"),
    ],
)
def test_what_cannot_be_registered_is_refused(changes, message):
    with pytest.raises(UserError, match=message):
        register(dataclasses.replace(invented_corpus.SPEC, **changes))
    assert find_corpus("invented") is None


def test_facts_about_aus_that_cannot_be_drawn_are_refused():
    facts = invented_corpus.SPEC.synthetic
    with pytest.raises(UserError, match=r"AU18, which is not drawn; allowed: 1, 2, 4, .*45"):
        dataclasses.replace(facts, combinations={(1, 18): 1.0})
    face = Subject(SyntheticSpec(corpus="casme2", frame_size=(32, 32)), 0).geometry
    assert all(au_bumps(au, face) for au in DRAWN_AUS)
    assert isinstance(facts, SyntheticFacts)


class _Point:
    """Stands for an installed package's entry point."""

    name, value = "invented", "elsewhere:SPEC"

    def __init__(self, made: object) -> None:
        self.made = made

    def load(self) -> object:
        if self.made is ImportError:
            raise ImportError("no module")
        return self.made


def test_other_packages_add_corpora(monkeypatch):
    def installed(made: object) -> None:
        points = [_Point(made)]
        monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.ENTRY_POINTS else [])

    installed(ImportError)
    assert corpus_names()[-1] == "invented"
    with pytest.raises(UserError, match=r"elsewhere:SPEC cannot be loaded \(no module\)"):
        get_corpus("invented")
    installed(dataclasses.replace(invented_corpus.SPEC, name="other"))
    with pytest.raises(UserError, match=r"elsewhere:SPEC is no aullm_dist.data.corpora.CorpusSpec of this name"):
        get_corpus("invented")
    installed(invented_corpus.SPEC)
    try:
        assert get_corpus("invented") is invented_corpus.SPEC
        assert corpus_names().count("invented") == 1
    finally:
        CORPORA.pop("invented", None)


def _planned(*overrides: str) -> str:
    return plan_prompt(load(None, list(overrides)), prefix=100, suffix=10).assumption


def test_a_plan_takes_the_corpus_from_the_dataset_else_from_the_longest_name(tiny_dataset, tmp_path):
    for name in CORPORA:
        for folder in (name, f"{name}-64px"):
            aus = len(CORPORA[name].aus)
            assert f"prompt of {aus} AUs ({name})," in _planned(f"data.train=[{tmp_path / folder}]")
    assert [sample.corpus for sample in read_samples([tiny_dataset])][0] == "casme2"
    elsewhere = tmp_path / "samm-not-at-all"
    elsewhere.symlink_to(tiny_dataset)
    assert "prompt of 8 AUs (casme2)," in _planned(f"data.train=[{elsewhere}]")
    report = tmp_path / "casme" / "report.json"
    report.parent.mkdir()
    report.write_text('{"corpus": "mmew"}')
    assert "(mmew)," in _planned(f"data.train=[{report.parent}]")
    with pytest.raises(UserError, match=r"the corpus of 'mine' is not known from its name; allowed: .*casme3c"):
        _planned("data.train=[/nowhere/mine]")


def test_a_plan_reads_the_clips_where_no_report_is_left(tiny_dataset, tmp_path):
    folder = tmp_path / "samm"
    folder.mkdir()
    for file in tiny_dataset.iterdir():
        if file.name != "report.json":
            (folder / file.name).symlink_to(file)
    assert "(casme2)," in _planned(f"data.train=[{folder}]")


def test_a_synthetic_corpus_that_cannot_be_drawn_is_refused_where_it_is_set(capsys):
    assert main(["config", "data.synthetic_corpus=casme9"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "data.synthetic_corpus is 'casme9' (did you mean casme" in line
    assert line.endswith("allowed: casme, casme2, samm, 4dme, mmew, casme3a, casme3c")
    undrawn = dataclasses.replace(invented_corpus.SPEC, synthetic=None)
    register(undrawn)
    try:
        with pytest.raises(UserError, match=r"corpus is 'invented'; allowed: casme, .*casme3c$"):
            SyntheticSpec(corpus="invented")
        with pytest.raises(UserError, match=r"data.synthetic_corpus is 'invented'; allowed"):
            _planned("data.synthetic_corpus=invented")
    finally:
        del CORPORA["invented"]
    assert isinstance(undrawn, CorpusSpec)
