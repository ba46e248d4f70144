"""The strict configuration: precedence, types, and one-line refusals that name the key and what is allowed."""

import subprocess
import sys
from pathlib import Path

import pytest

from aullm_dist import config
from aullm_dist.errors import UserError


def _write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_precedence_is_defaults_then_yaml_then_overrides(tmp_path):
    path = _write(tmp_path, "training:\n  seed: 3\n  epochs: 7\n")
    loaded = config.load(path, ["training.seed=5"])
    assert (loaded.training.seed, loaded.training.epochs) == (5, 7)
    assert loaded.training.clip_norm == config.TrainingConfig().clip_norm


def test_scientific_notation_without_a_dot_is_a_number(tmp_path):
    assert config.load(_write(tmp_path, "training:\n  lr_lora: 1e-4\n")).training.lr_lora == 1e-4


def test_yaml_off_means_false_for_packing():
    assert config.load(None, ["model.packing=off"]).model.packing is False


def test_round_trip_through_plain_dictionaries():
    loaded = config.load(None, ["data.aus=[1, 2]", "data.fold=1", "model.readout=per_au"])
    assert config.from_dict(config.to_dict(loaded), "saved") == loaded


def test_a_recorded_configuration_of_before_flow_means_led():
    old = config.to_dict(config.load())
    assert old["model"].pop("visual") == "flow"
    assert config.from_dict(old, "saved").model.visual == "led"
    assert config.from_dict({}, "saved").model.visual == "led"
    assert config.from_dict({}, "saved").data.neutral_share == 0
    with pytest.raises(UserError, match=r"override 'model.visual=flo': .*flow"):
        config.load(None, ["model.visual=flo"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training:\n  sed: 1\n", ["unknown key 'training.sed'", "did you mean 'seed'"]),
        ("trainin:\n  seed: 1\n", ["unknown group 'trainin'", "did you mean 'training'"]),
        ("training:\n  seed: 1\n  seed: 2\n", ["line 3", "'seed' is given twice"]),
        ("training:\n  seed: one\n", ["training.seed is 'one'", "int"]),
        ("training:\n  seed: true\n", ["training.seed is True", "int"]),
        ("training:\n  seed: 1.0\n", ["training.seed is 1.0", "int"]),
        ("model:\n  readout: lst\n", ["model.readout is 'lst'", "did you mean 'last'", "per_au"]),
        ("data:\n  aus: 4\n", ["data.aus is 4", "a list of int"]),
        ("data:\n  aus: [4, four]\n", ["data.aus[1] is 'four'"]),
        ("data:\n  aus: [4, 4]\n", ["each AU once"]),
        ("training: 3\n", ["training is 3"]),
        ("- a\n", ["list", "allowed: model, data"]),
        ("training: {seed: [}\n", ["line 1", "not valid YAML"]),
        ("training:\n  lr_new: -1\n", ["training.lr_new is -1", "above 0"]),
        ("training:\n  lr_new: .nan\n", ["training.lr_new is nan"]),
        ("training:\n  lr_new: .inf\n", ["training.lr_new is inf"]),
        ("training:\n  seed: 99999999999999999999\n", ["training.seed", "4294967295"]),
        ("training:\n  asl_gamma_positive: 0.5\n", ["asl_gamma_positive is 0.5", "from 1"]),
        ("training:\n  output: ''\n", ["training.output is empty"]),
        ("model:\n  kernels: cuda\n", ["model.kernels is 'cuda'", "auto, triton, torch, interpret"]),
        ("training:\n  global_batch: 7\n  micro_batch: 2\n", ["global_batch is 7", "multiple"]),
        ("training:\n  global_batch: 8\n  micro_batch: 4\n  processes: 3\n", ["= 12"]),
        ("data:\n  protocol: cross\n", ["data.train and data.test"]),
        ("data:\n  test: [x]\n", ["protocol: cross only"]),
        ("data:\n  protocol: grouped\n  fold: 5\n", ["data.fold is 5", "0 to 4"]),
        ("data:\n  inner_fraction: 0.9\n", ["between 0 and 0.5"]),
        ("model:\n  llm: none\n  readout: per_au\n", ["llm: none"]),
        ("model:\n  llm: none\n  quantization: nf4\n", ["model.quantization is 'nf4'", "llm: none"]),
        ("model:\n  quantization: int8\n", ["model.quantization is 'int8'", "none, nf4"]),
        ("model:\n  activation_checkpointing: true\n", ["activation_checkpointing", "none, non_reentrant, reentrant"]),
        ("model:\n  lora_rank: 0\n", ["model.lora_rank is 0", "through LoRA alone", "full fine-tuning is not offered"]),
        ("model:\n  structure: false\ncounterfactual:\n  enabled: true\n  branches: 3\n", ["branches is 3", "0 to 2"]),
        ("model:\n  lora_targets: []\n", ["lora_targets is empty"]),
    ],
)
def test_a_mistake_is_one_line_with_the_file_and_what_is_allowed(tmp_path, text, parts):
    path = _write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        config.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("override", ["seed=1", "training.seed", "training.=1", "=", "training.seed={"])
def test_a_malformed_override_is_named(override):
    with pytest.raises(UserError, match="override") as caught:
        config.load(None, [override])
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_an_unknown_shipped_name(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        config.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="demo"):
        config.find_config("no_such_run")


def test_every_shipped_run_file_loads():
    files = sorted((config.configs_folder() / "experiments").rglob("*.yaml"))
    assert len(files) == len(config.shipped_names())
    assert {"demo", "ablation/led_cnn"} < set(config.shipped_names())
    assert "ablation/led_cnn" in config.shipped_names("ablation")
    assert "demo" not in config.shipped_names("ablation")
    for path, name in zip(files, config.shipped_names(), strict=True):
        config.load(path)
        assert config.find_config(name) in files


def test_configuration_needs_no_heavy_library():
    code = "import aullm_dist.config, sys; assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
