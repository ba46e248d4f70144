"""Texts of run files and overrides mean what stands there, and paths are where the user means them."""

import json
import os
from pathlib import Path

import pytest

from aullm_dist import config
from aullm_dist.config.schema import settings
from aullm_dist.errors import UserError
from aullm_dist.llm.identity import BaseIdentity, WeightFile
from aullm_dist.runs.recorded import find_base, find_recorded, moved
from aullm_dist.shell import command

# Each is something else to YAML: a date, one that does not exist, octal, clock times, a comment, a truth, nothing.
TEXTS = (
    "2026-01-31", "2026-02-30", "2026-01-31 12:30:45", "012", "0x10", "0b11", "1_000", "12:30:45", "1:30", "12", "1e5",
    "1.5", "runs/x #1", "#1", "yes", "no", "off", "~x: y", "a: b", "- a", "[a", "{a", "&a", "*a", "!a", "%a", "@a",
    "`a", "a, b", "'", "it's", "=", "a=b", ".nan", "<<", "|", ">",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_of_an_override_is_taken_as_it_stands(text):
    wanted = text.replace("~", "tilde")  # a home folder is another matter
    assert config.load(None, [f"training.output={wanted}"]).training.output == wanted
    if not wanted.startswith("["):  # a list
        assert config.load(None, [f"data.train={wanted}"]).data.train == (wanted,)


@pytest.mark.parametrize("text", [text for text in TEXTS if text not in ("'", "it's")])
def test_quotes_around_a_text_are_those_of_yaml(text):
    wanted = text.replace("~", "tilde")
    for quote in ("'", '"'):
        assert config.load(None, [f"model.llm={quote}{wanted}{quote}"]).model.llm == wanted


@pytest.mark.parametrize("text", ["2026-01-31", "2026-02-30", "012", "0x10", "12:30:45", "1:30", "1e5"])
def test_a_run_file_reads_dates_clock_times_and_octals_as_text(tmp_path, text):
    (tmp_path / "run.yaml").write_text(f"training:\n  output: {text}\n")
    assert config.load(tmp_path / "run.yaml").training.output == text


@pytest.mark.parametrize("text", ["12", "1.5", "no", "null"])
def test_a_text_that_a_run_file_must_quote_is_refused_with_the_remedy(tmp_path, text):
    (tmp_path / "run.yaml").write_text(f"training:\n  output: {text}\n")
    with pytest.raises(UserError, match="written in quotes"):
        config.load(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("training.seed=012", "without leading zeros"),
        ("training.seed=0x1F", "training.seed is '0x1F'"),
        ("training.seed=1:30", "training.seed is '1:30'"),
        ("training.seed=2026-02-30", "training.seed is '2026-02-30'"),
        ("training.seed=1 #2", "cut off as a comment"),
        ("training.seed=!!python/none x", "tag"),
        ("training.seed=" + "9" * 5000, "override"),
        ("training.epochs=99999999999999999999", "training.epochs is 99999999999999999999; allowed"),
        ("data.aus=[99999999999999999999]", None),
        ("training.lr_new=1" + "0" * 400, "training.lr_new"),
        ("training.output= runs/x", "blank"),
        ("training.output=a\nb", "control characters"),
        ("training.output=", "training.output is empty"),
        ("data.folds_file=", "data.folds_file is empty"),
        ("model.llm=", "model.llm is empty"),
        ("data.train=", "data.train is ''"),
        ("data.train=['']", "data.train[0] is empty"),
        ("data.train=[a] #b", "cut off as a comment"),
        ("training.output=~no_such_user_at_all/x", "no such user"),
    ],
)
def test_what_would_be_something_else_is_refused_in_one_line(override, part):
    try:
        loaded = config.load(None, [override])
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert part is not None
        assert part in message
    else:
        assert part is None, loaded


def test_every_whole_number_has_an_upper_end():
    for setting in settings():
        if setting.kind in (int, int | None):
            with pytest.raises(UserError, match=setting.name):
                config.load(None, [f"{setting.name}=99999999999999999999"])


def test_a_path_with_a_comma_in_brackets_is_not_cut_where_it_exists(tmp_path):
    whole = tmp_path / "with, comma"
    whole.mkdir()
    with pytest.raises(UserError, match="the comma makes 2 paths"):
        config.load(None, [f"data.train=[{whole}]"])
    for written in (f'["{whole}"]', str(whole)):
        assert config.load(None, [f"data.train={written}"]).data.train == (str(whole),)
    assert config.load(None, ["data.train=[a, b]"]).data.train == ("a", "b")


def places():
    return [setting for setting in settings() if setting.about.place is not None]


def test_every_setting_that_is_a_path_knows_the_home_folder(tmp_path, monkeypatch):
    """A setting that names a file or a folder and is none of these loses `~`."""
    names = {setting.name for setting in places()}
    assert names == {
        "model.llm", "data.train", "data.test", "data.folds_file", "training.output", "training.strategy",
    }  # fmt: skip
    monkeypatch.setenv("HOME", str(tmp_path))
    for setting in places():
        group, key = setting.group, setting.key
        for given in (f"{setting.name}=~/x",):
            value = setting.value(config.with_overrides(config.Config(), [given]))
            assert value in (f"{tmp_path}/x", (f"{tmp_path}/x",)), setting.name
        value = ["~/x"] if isinstance(setting.default, tuple) else "~/x"
        assert "~" not in str(setting.value(config.Config().changed({f"{group}.{key}": value})))


def test_records_hold_full_paths_and_names_stay_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llm").mkdir()
    (tmp_path / "tiny").mkdir()
    loaded = config.load(None, ["training.output=runs/x", "data.train=[a, ../b]", "model.llm=llm"])
    record = config.to_record(loaded)
    assert record["training"]["output"] == str(tmp_path / "runs/x")
    assert record["data"]["train"] == [str(tmp_path / "a"), str(tmp_path.parent / "b")]
    assert record["model"]["llm"] == str(tmp_path / "llm")
    assert record["training"]["strategy"] == "ddp"
    assert config.to_record(config.load())["model"]["llm"] == "tiny", "whatever lies in the working folder"
    assert config.to_record(config.load(None, ["model.llm=org/name"]))["model"]["llm"] == "org/name"
    assert config.different_settings(config.to_dict(loaded), record) == []
    other = config.to_dict(config.load(None, ["training.output=runs/y", "data.train=[a, b]", "model.llm=llm"]))
    assert config.different_settings(record, other) == ["data.train", "training.output"]


def test_what_a_run_recorded_is_found_again(tmp_path, monkeypatch):
    project = tmp_path / "project"
    checkpoint = project / "runs" / "demo" / "fold-00" / "checkpoints" / "step-00000001"
    checkpoint.mkdir(parents=True)
    backbone = project / "runs" / "demo" / "backbone"
    backbone.mkdir()
    monkeypatch.chdir("/")
    # An older run recorded it relative to the folder that it was started in.
    assert find_recorded("runs/demo/backbone", "runs/demo", checkpoint) == backbone
    moved_to = tmp_path / "moved"
    os.rename(project / "runs" / "demo", moved_to)
    there = moved_to / "fold-00" / "checkpoints" / "step-00000001"
    assert find_recorded(str(backbone), str(project / "runs" / "demo"), there) == moved_to / "backbone"
    assert find_recorded("runs/demo/backbone", "runs/demo", there) == moved_to / "backbone"
    assert find_recorded("/no/such", "runs/demo", there) is None
    # A baseline lies in its run, and moves with it.
    places = moved(Path("/old/run/dataset/x"), Path("/old/run/baselines/b"), Path("/new/place/baselines/b"))
    assert Path("/new/place/dataset/x") in places


def test_an_llm_that_is_gone_is_named_with_the_option_that_gives_it(tmp_path):
    base = BaseIdentity(
        name="runs/x/backbone", revision=None, config_sha256="0", files={"model.safetensors": WeightFile(1, "0")}
    )
    with pytest.raises(UserError, match="--llm DIR") as caught:
        find_base(base, {"training": {"output": "runs/x"}}, tmp_path)
    assert "below the folder the run was started in" in str(caught.value)
    hub = BaseIdentity(name="org/name", revision="commit", config_sha256="0", files={})
    assert find_base(hub, {}, tmp_path) == "org/name"


def test_a_recorded_configuration_that_was_cut_is_no_configuration(tmp_path):
    path = tmp_path / "config.yaml"
    whole = json.dumps(config.to_dict(config.load())) + "\n"
    path.write_text(whole)
    assert config.load_recorded(path) == config.load()
    for damaged in ("", "{}\n", whole[:-1], whole[:100]):
        path.write_text(damaged)
        with pytest.raises(UserError, match=r"config\.yaml"):
            config.load_recorded(path)


def test_a_printed_command_is_quoted():
    assert command("aullm-dist", "evaluate", Path("runs/my run")) == "aullm-dist evaluate 'runs/my run'"
