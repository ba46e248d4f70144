"""What a release folder holds, what its card says, and every way in which it is refused."""

import datetime
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from release_samples import STEP, checkpoint, exported, llm, write_run  # noqa: F401
from safetensors.torch import load_file

import aullm_dist
from aullm_dist.cli import main
from aullm_dist.errors import UserError
from aullm_dist.evaluation.caveats import RANDOM_LLM, SYNTHETIC
from aullm_dist.evaluation.evaluate import score_run
from aullm_dist.evaluation.metrics import logit_of
from aullm_dist.evaluation.thresholds import choose_thresholds
from aullm_dist.release.card import CardFacts, card_text
from aullm_dist.release.export import export
from aullm_dist.release.facts import Scores, describe_base
from aullm_dist.release.hub_results import eval_results_text
from aullm_dist.release.layout import RELEASE_FILE
from aullm_dist.release.origin import find_origin
from aullm_dist.release.probe import probe_clips
from aullm_dist.runs.paths import FoldPaths
from aullm_dist.runs.predictions import pool, read_predictions


def refused(capsys, *words: object) -> str:
    """Run a command that must end with 2, and return its one line."""
    assert main([str(word) for word in words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aullm-dist: error: ")]
    assert len(errors) == 1
    return errors[0]


def copy_of(release: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(release, tmp_path / "copy"))


def test_only_safetensors_json_and_texts(exported):
    suffixes = {path.suffix for path in exported.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".md", ".cff", ".yaml"}
    assert len({path.stat().st_mode & 0o777 for path in exported.rglob("*.safetensors")}) == 1


def test_thresholds_are_those_of_the_inner_subjects(checkpoint, exported, tmp_path):
    rows = read_predictions(FoldPaths(checkpoint.parents[2], 0).predictions(2)).rows
    inner = pool(row for row in rows if row.role == "inner")
    expected = choose_thresholds(inner.labels, inner.logits)
    thresholds = aullm_dist.load(exported).thresholds
    assert logit_of(torch.tensor(list(thresholds.values.values())).numpy()) == pytest.approx(expected, abs=1e-5)
    assert "inner held-out subjects (" in thresholds.policy
    assert any(value != 0.5 for value in thresholds.values.values())
    # The answers of another step are another model's; a checkpoint outside its run has none.
    run = Path(shutil.copytree(checkpoint.parents[2], tmp_path / "run"))
    path = FoldPaths(run, 0).predictions(2)
    path.write_text(path.read_text().replace(f'"step": {STEP}', f'"step": {STEP + 1}'))
    for folder, reason in (
        (run / "fold-00", "no stored answers of step 10"),
        (Path(shutil.copytree(checkpoint, tmp_path / checkpoint.name)), "lies in no run folder"),
    ):
        thresholds = aullm_dist.load(folder).thresholds
        assert set(thresholds.values.values()) == {0.5}
        assert reason in thresholds.policy


def test_the_card_is_one_of_the_hub(exported, checkpoint):
    card = ModelCard.load(exported / "README.md")
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    metrics = score_run(checkpoint.parents[2])
    results = {result.metric_name.partition(",")[0]: result for result in card.data.eval_results}
    assert set(results) == {"f1_binary", "f1_macro", "auc"}
    for name, result in results.items():
        assert result.metric_value == pytest.approx(metrics["mean"][name], abs=1e-4)
        assert result.metric_args["ci95"] == pytest.approx(metrics["ci"]["mean"][name], abs=1e-4)
    assert card.data.license == "other"
    assert card.data.pipeline_tag == "video-classification"
    # A folder of this machine is no name on the Hub.
    assert "base_model" not in card.data.to_dict()
    sections = [line[3:] for line in card.text.splitlines() if line.startswith("## ")]
    assert sections == [
        "Use", "Training", "Scores", "Intended use", "Limits", "Licences", "Versions", "Citation",
    ]  # fmt: skip
    assert "| casme2" not in card.text
    assert "f1_macro CI" in card.text
    assert "95% CI of the mean" in card.text
    assert "Trained on drawn faces" in card.text
    assert "random weights" in card.text


def test_the_card_knows_a_random_llm_that_was_moved(checkpoint, llm, tmp_path):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "release"
    shutil.copytree(llm, elsewhere)
    hidden = llm.rename(llm.with_name("away"))
    try:
        export(checkpoint, out, format="adapter", record=False, llm=str(elsewhere), device="cpu")
    finally:
        hidden.rename(llm)
    assert "random weights" in ModelCard.load(out / "README.md").text
    assert json.loads((out / "config.json").read_text())["caveats"][1] == "random LLM"


def test_the_scores_are_entries_of_the_hub(exported, checkpoint):
    text = (exported / ".eval_results" / "aullm.yaml").read_text()
    entries = parse_eval_result_entries(yaml.safe_load(text))
    metrics = score_run(checkpoint.parents[2])
    assert [entry.task_id for entry in entries] == ["f1_binary", "f1_macro", "auc"]
    for entry in entries:
        assert entry.value == pytest.approx(metrics["mean"][entry.task_id], abs=1e-4)
        assert entry.dataset_id == "casme2"
        assert datetime.date.fromisoformat(entry.date) <= datetime.date.today() + datetime.timedelta(days=1)
        assert "drawn faces in the layout of CASME II" in entry.notes
        assert "95% CI" in entry.notes
    # The same numbers as the card's, which the Hub calls legacy.
    card = ModelCard.load(exported / "README.md")
    assert [result.metric_value for result in card.data.eval_results] == [entry.value for entry in entries]
    told = eval_results_text(metrics, False, benchmark="org/casme2", date=datetime.date(2026, 11, 1), others=True)
    for entry in parse_eval_result_entries(yaml.safe_load(told)):
        assert (entry.dataset_id, entry.date) == ("org/casme2", "2026-11-01")
        assert "drawn" not in entry.notes
        assert entry.notes.endswith("scores of the models of another run")
    drawn = {**metrics, "caveats": [SYNTHETIC, RANDOM_LLM]}
    told = eval_results_text(drawn, False, benchmark=None, date=datetime.date(2026, 11, 1))
    for entry in parse_eval_result_entries(yaml.safe_load(told)):
        assert "drawn faces" in entry.notes
        assert "an LLM of random weights" in entry.notes


def test_a_base_of_the_hub_is_named_with_its_licence(checkpoint, tmp_path):
    cached = tmp_path / "models--org--llama-8b" / "snapshots" / ("0" * 40)
    cached.mkdir(parents=True)
    (cached / "README.md").write_text("---\nlicense: llama3.1\n---\n# Llama\n")
    for name, licence in ((str(cached), "llama3.1"), ("org/llama-8b", None)):
        base = describe_base(name)
        assert (base.title, base.hub_name, base.licence) == ("org/llama-8b", "org/llama-8b", licence)
    facts = CardFacts(
        format="merged",
        base=describe_base(str(cached)),
        counts=(),
        scores=Scores(metrics=None, missing="no test side"),
        scores_preface="",
        training={},
        commit=None,
    )
    card = ModelCard(card_text(find_origin(checkpoint, None), facts, folder="x", merge_note="N", difference=0.25))
    assert card.data.base_model == "org/llama-8b"
    assert card.data.base_model_relation == "finetune"
    assert card.data.eval_results is None
    assert "Base LLM org/llama-8b: llama3.1." in card.text
    assert "None: no test side." in card.text
    assert "differ from those of the model that was trained by at most 2.5e-01" in card.text


def test_the_citation_is_in_the_citation_file_format(exported):
    citation = yaml.safe_load((exported / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "A. Author"}]
    assert {"message", "title", "date-released"} <= citation.keys()
    reference = citation["references"][0]
    assert {"type", "title", "authors"} <= reference.keys()


def test_no_path_of_this_machine_but_the_base(exported, llm, tiny_dataset, checkpoint):
    for path in exported.rglob("*"):
        if path.suffix in (".json", ".md", ".cff", ".yaml"):
            text = path.read_text().replace(str(llm), "")
            for private in (tiny_dataset, checkpoint, Path.home() / ".cache"):
                assert str(private) not in text, path


def test_verify_says_what_it_compared(exported, capsys):
    assert main(["release", "verify", str(exported)]) == 0
    said = capsys.readouterr().out
    assert "adapter release" in said
    assert "largest difference of a logit 0.0e+00, allowed 0.001 in float32" in said


def test_a_release_without_answers_is_verified_by_its_files(checkpoint, llm, tmp_path, capsys):
    out = tmp_path / "release"
    export(checkpoint, out, format="adapter", record=False)
    assert not (out / "probe.safetensors").exists()
    hidden = llm.rename(llm.with_name("away"))
    try:
        assert main(["release", "verify", str(out)]) == 0
    finally:
        hidden.rename(llm)
    assert "none were recorded" in capsys.readouterr().out


def remove(path: Path) -> None:
    path.unlink()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def add(path: Path) -> None:
    path.write_bytes(b"x")


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (remove, "adapter/adapter_model.safetensors", "missing"),
        (flip, "aullm_modules.safetensors", "altered"),
        (flip, "config.json", "altered"),
        (flip, "tokenizer.json", "altered"),
        (remove, "RELEASE.json", "RELEASE.json"),
        (flip, "RELEASE.json", "altered"),
        (add, "adapter/adapter_model.bin", "is no file of this release"),
    ],
)
def test_a_damaged_release_is_refused(exported, tmp_path, capsys, damage, name, message):
    folder = copy_of(exported, tmp_path)
    damage(folder / name)
    line = refused(capsys, "release", "verify", folder)
    assert name.rpartition("/")[2] in line
    assert message in line
    with pytest.raises(UserError, match=message):
        aullm_dist.load(folder)


def test_a_card_may_be_corrected_but_is_then_not_the_exported_one(exported, tmp_path, capsys):
    folder = copy_of(exported, tmp_path)
    (folder / "README.md").write_text("better words")
    (folder / ".eval_results" / "aullm.yaml").write_text("[]")
    assert aullm_dist.load(folder).format == "adapter"
    for name in ("aullm.yaml", "README.md"):
        assert name in refused(capsys, "release", "verify", folder)
        # The first that differs is named; it takes its place in the folder again.
        original = next(exported.rglob(name))
        shutil.copyfile(original, folder / original.relative_to(exported))


def test_a_taken_folder_stays_as_it_is(checkpoint, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="is taken; give a new or an empty folder"):
            export(checkpoint, out, format="adapter", record=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    export(checkpoint, empty, format="adapter", record=False)
    assert (empty / RELEASE_FILE).is_file()


def test_a_failed_merge_leaves_nothing(checkpoint, tmp_path):
    def merge(target):
        target.mkdir()
        (target / "model-00001.safetensors").write_bytes(b"half")
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="the disk is full"):
        export(checkpoint, tmp_path / "release", format="merged", merge=merge, record=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("release", "verify", "{tmp}/nowhere"), "no such folder; allowed: a folder that aullm-dist merge wrote"),
        (("release", "verify", "{tmp}"), "is no release (no RELEASE.json in it)"),
        (("release", "verify", "{release}", "--device", "toaster"), "device toaster: is not there; allowed: cpu"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(exported, tmp_path, capsys, words, message):
    words = [word.format(tmp=tmp_path, release=exported) for word in words]
    assert message in refused(capsys, *words)


def test_the_probe_clips_are_a_formula():
    clips = probe_clips(6, 64)
    assert clips.shape == (4, 6, 64, 64)
    # Worked out by hand for clip 1, frame 2, row 3, column 4: 3 * 3 + 5 * 4 + 7 * 2 + 31 = 74, and 64 + |74 - 127|.
    assert clips[1, 2, 3, 4] == 117
    assert torch.equal(clips[0, 0], clips[0, 5])
    assert not torch.equal(clips[1, 0], clips[1, 5])


def test_the_adapter_files_are_the_checkpoints_own(exported, checkpoint):
    name = "adapter_model.safetensors"
    found, expected = load_file(exported / "adapter" / name), load_file(checkpoint / name)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
