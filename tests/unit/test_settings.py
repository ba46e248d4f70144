"""What is said of a setting where it is defined, and what follows from it: lists, checks, listing and JSON Schema."""

import dataclasses
import json
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from aullm_dist import config
from aullm_dist.cli import main
from aullm_dist.commands.config import describe_settings, schema_text
from aullm_dist.config import Config, ModelConfig, TrainingConfig
from aullm_dist.config.allowed import OrWord, Range
from aullm_dist.config.json_schema import SCHEMA_FILE, json_schema
from aullm_dist.config.schema import settings
from aullm_dist.config.setting import Affects, Occasion
from aullm_dist.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
OF_TRAINING = """
    training.output training.check_memory training.keep_checkpoints training.save_every_steps training.verify
    training.grace_seconds training.max_failures training.folds_at_once
""".split()
OF_ANSWERS = """
    model.attention model.packing model.suffixes_per_row model.suffix_multiple model.compile model.kernels
    model.trust_remote_code training.strategy training.processes training.micro_batch training.cpu_threads
""".split()
OF_MONITOR = [f"monitor.{item.name}" for item in dataclasses.fields(config.MonitorConfig)]
RELEASED = """
    visual quantization lora_rank lora_alpha lora_targets readout answer packing suffixes_per_row evidence
    evidence_heads structure graph_width graph_heads graph_layers
""".split()


def test_every_setting_says_what_it_means_and_affects():
    described = {setting.name for setting in settings()}
    for group in dataclasses.fields(Config):
        for item in dataclasses.fields(getattr(Config(), group.name)):
            assert f"{group.name}.{item.name}" in described
    for setting in settings():
        about = setting.about
        assert len(about.meaning.split()) >= 3, setting.name
        assert re.fullmatch(r"(\S+ )+\S+\.", about.meaning), setting.name
        assert about.affects in typing.get_args(Affects), setting.name
        assert set(about.may_differ) <= set(typing.get_args(Occasion)), setting.name
        assert setting.value(Config()) == setting.default, setting.name


def test_every_number_has_a_range():
    """A setting added later without a range would let nonsense through."""
    for setting in settings():
        if {int, float} & {setting.kind, *typing.get_args(setting.kind)} and typing.get_origin(
            setting.kind
        ) is not tuple:
            assert isinstance(setting.about.allowed, Range | OrWord), setting.name


def test_what_a_resume_may_change():
    assert set(config.may_differ("resume")) == {
        "model.architecture", "data.workers", "data.crops", "data.fold", "training.processes", "training.strategy",
        "training.micro_batch", "training.cpu_threads", *OF_TRAINING, *OF_MONITOR,
    }  # fmt: skip


def test_what_a_prediction_may_change():
    assert set(config.may_differ("prediction")) == {"model.llm", *OF_ANSWERS}
    assert set(config.may_differ("release")) == {"model.llm", "training.micro_batch", "training.cpu_threads"}


def test_what_may_differ_between_arms():
    # `monitor.*` makes no arm either; it was left out by its prefix before.
    assert set(config.may_differ("ablation")) == {
        "model.architecture", "model.evidence", "model.structure", "model.answer", "model.network", "model.visual",
        "data.neutral_share",
        "training.baseline", "data.workers", "data.fold",
        *OF_ANSWERS, *OF_TRAINING, *OF_MONITOR,
    }  # fmt: skip


def test_what_a_model_without_an_llm_has_no_use_for():
    starts = (
        "model.l", "model.graph", "model.evidence_heads", "model.readout", "model.quantization",
        "model.activation_checkpointing", "model.training_statistics",
    )  # fmt: skip
    # Settings that may differ between arms were not asked about.
    left = {name for name in config.llm_only() if name not in config.may_differ("ablation")}
    assert left == {setting.name for setting in settings() if setting.name.startswith(starts)}


def test_what_a_release_stores():
    stored = config.release_settings(Config())
    assert list(stored["model"]) == RELEASED
    assert {group: list(values) for group, values in stored.items() if group != "model"} == {
        "data": ["num_frames", "size", "crops"],
        "training": ["precision"],
    }
    assert stored["model"]["lora_targets"] == ["all-linear"]


def test_what_defines_the_function_of_a_checkpoint():
    changed = Config().changed({"model.graph_heads": 2, "data.size": 48})
    assert config.function_settings(changed) == {
        "num_frames": 6, "image_size": 48, "visual": "flow", "quantization": "none", "readout": "last",
        "answer": "stages", "evidence": "full",
        "evidence_heads": 4, "structure": True, "graph": [64, 2, 2],
    }  # fmt: skip
    without = config.function_settings(changed.changed({"model.llm": "none"}))
    assert without == {"num_frames": 6, "image_size": 48}


def test_what_is_recorded_cannot_differ_where_it_would_be_another_function():
    for setting in settings():
        if setting.about.affects in ("function", "data") and setting.about.recorded is not None:
            assert not {"prediction", "release"} & set(setting.about.may_differ), setting.name
        assert "release" not in setting.about.may_differ or "prediction" in setting.about.may_differ, setting.name


def test_a_configuration_is_frozen_and_changes_give_another_one():
    before = Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.training = TrainingConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        before.model.llm = "none"
    after = before.changed({"model.llm": "none", "data.aus": [1, 2], "training.lr_new": 1})
    assert before == Config()
    assert (after.model, after.data.aus) == (ModelConfig(llm="none"), (1, 2))
    assert isinstance(after.training.lr_new, float)
    assert after.counterfactual is before.counterfactual


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.llmm": "none"}, "unknown key 'model.llmm'; did you mean 'llm'"),
        ({"modle.llm": "none"}, "unknown group 'modle'; did you mean 'model'"),
        ({"model": {}}, "unknown key 'model.'"),
        ({"training.epochs": 1.5}, r"training.epochs is 1.5 \(float\)"),
        ({"data.aus": ["1"]}, r"data.aus\[0\] is '1'"),
    ],
)
def test_a_change_of_what_there_is_not_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        Config().changed(values)


def test_lists_are_lists_in_files():
    """Manifests and run files of earlier versions hold lists, and are compared with what is written now."""
    loaded = config.load(None, ["data.aus=[1, 2]", "data.train=[a]"])
    written = config.to_dict(loaded)
    assert written["data"]["aus"] == [1, 2]
    assert json.loads(json.dumps(written)) == written
    assert config.from_dict(yaml.safe_load(yaml.safe_dump(written)), "saved") == loaded


def test_a_written_dictionary_shares_nothing_with_the_configuration():
    described = config.load(None, ["model.llm=some/llm", "model.architecture={model_type: llama}"])
    config.to_dict(described)["model"]["architecture"]["model_type"] = "other"
    assert described.model.architecture == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("training.epochs=0", "a finite number above 0"),
        ("training.max_steps=0", "a number above 0, or null"),
        ("model.suffixes_per_row=-1", "a finite number, 0 or more"),
        ("training.weight_decay=.nan", "a finite number, 0 or more"),
        ("training.seed=-1", "0 to 4294967295"),
        ("training.asl_gamma_negative=0.5", "0, or a finite number from 1 (finite gradients)"),
        ("training.asl_gamma_negative=.inf", "0, or a finite number from 1 (finite gradients)"),
        ("training.asl_margin=0.6", "a share between 0 and 0.5"),
        ("counterfactual.structure_edges=1.1", "a share between 0 and 1"),
        ("model.dropout=1.0", "a share from 0 to below 1"),
        ("data.cut_fraction=0.5", "a share between 0 and 0.4"),
        ("model.llm_hidden=100", "a multiple of 32"),
        ("data.num_frames=3", "4 or more, as the visual backbone needs them"),
        ("data.folds=1", "2 or more"),
        ("data.size=16", "a side of 32 to 512 pixels"),
        ("data.fold=-1", "a fold number from 0, or null for all folds"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_is_allowed(override, allowed):
    name = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"{name} is .*; allowed: {re.escape(allowed)}"):
        config.load(None, [override])


def test_settings_are_listed_with_meaning_bounds_and_marks():
    text = describe_settings()
    assert "training.micro_batch = 16   (int; execution; may differ: resume, prediction, release, ablation)" in text
    assert "Clips per forward pass of one process. Allowed: a finite number above 0." in text
    assert "(str | null; data)" in text
    assert "(list[str]; function)" in text
    for setting in settings():
        assert f"  {setting.name} = " in text


def test_the_docs_list_the_settings_as_they_are():
    assert describe_settings() in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": int | float}
COMPARISONS = {
    "minimum": lambda value, end: value >= end,
    "maximum": lambda value, end: value <= end,
    "exclusiveMinimum": lambda value, end: value > end,
    "exclusiveMaximum": lambda value, end: value < end,
    "multipleOf": lambda value, end: value % end == 0,
}


def _accepts(schema: dict[str, Any], value: object) -> bool:
    """Whether a value is valid by the keywords that our schema uses."""
    if "anyOf" in schema and "type" not in schema:
        return any(_accepts(one, value) for one in schema["anyOf"])
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    fits = [
        value is None if kind == "null" else isinstance(value, TYPES[kind]) and (kind == "boolean" or value is not True)
        for kind in kinds
    ]
    if (fits and not any(fits)) or ("enum" in schema and value not in schema["enum"]):
        return False
    if value is None:
        return True
    if isinstance(value, dict):
        known = schema.get("properties", {})
        extra = schema.get("additionalProperties", True)
        return all(_accepts(known[key], item) if key in known else extra for key, item in value.items())
    if isinstance(value, list):
        unique = not schema.get("uniqueItems") or len(set(value)) == len(value)
        return unique and len(value) >= schema.get("minItems", 0) and all(_accepts(schema["items"], i) for i in value)
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    choices = schema.get("anyOf", [{}])
    return any(
        value == choice["const"]
        if "const" in choice
        else all(compare(value, choice[key]) for key, compare in COMPARISONS.items() if key in choice)
        for choice in choices
    ) and all(compare(value, schema[key]) for key, compare in COMPARISONS.items() if key in schema)


def test_the_shipped_schema_is_current():
    path = config.configs_folder() / SCHEMA_FILE
    assert path.read_text(encoding="utf-8") == schema_text(), f"aullm-dist config --schema > {path}"


def test_every_shipped_run_file_names_the_schema_and_is_valid():
    schema, root = json_schema(), config.configs_folder()
    for path in (root / "experiments").rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        found = re.match(r"# yaml-language-server: \$schema=(\S+)\n", text)
        assert found, path
        assert (path.parent / found[1]).resolve() == (root / SCHEMA_FILE).resolve(), path
        assert _accepts(schema, yaml.safe_load(text)), path
    assert _accepts(schema, config.to_dict(Config()))


@pytest.mark.parametrize(
    "text",
    [
        "trainin: {}", "training: {sed: 1}", "training: {seed: one}", "training: {seed: true}", "training: {seed: 1.5}",
        "training: {seed: -1}", "training: {seed: 4294967296}", "training: {output: ' '}", "training: {lr_new: 0}",
        "training: {asl_gamma_positive: 0.5}", "model: {readout: lst}", "model: {llm_hidden: 100}",
        "model: {dropout: 1.0}", "model: {lora_targets: []}", "data: {aus: [4, 4]}", "data: {aus: [four]}",
        "data: {folds: null}", "data: {size: 1000}", "data: 3",
    ],
)  # fmt: skip
def test_schema_and_loader_refuse_the_same(text):
    content = yaml.safe_load(text)
    assert not _accepts(json_schema(), content)
    with pytest.raises(UserError):
        config.from_dict(content, "text")


@pytest.mark.parametrize(
    "text",
    ["training:", "training: {asl_gamma_positive: 0, lr_new: 1, max_steps: null, epochs: 2}", "data: {aus: [1, 2]}"],
)
def test_schema_and_loader_take_the_same(text):
    content = yaml.safe_load(text)
    assert _accepts(json_schema(), content)
    config.from_dict(content, "text")


@pytest.mark.parametrize("name", config.shipped_names())
def test_what_differs_from_the_defaults_is_a_run_file_of_the_same_configuration(name, tmp_path, capsys):
    assert main(["config", name, "--changed", "training.seed=3"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert config.load(tmp_path / "run.yaml") == config.load(config.find_config(name), ["training.seed=3"])
    content = yaml.safe_load(text)
    assert content["training"]["seed"] == 3
    for group, values in content.items():
        assert all(value != config.to_dict(Config())[group][key] for key, value in values.items())


def test_the_command_prints_the_schema_alone(capsys):
    assert main(["config", "--schema"]) == 0
    assert capsys.readouterr().out == schema_text()
    assert main(["config", "demo", "--schema"]) == 2
    assert main(["config", "--changed"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {}
