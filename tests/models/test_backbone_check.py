"""`aullm-dist backbone check`: what is said of an LLM from its config alone, and what of it is refused."""

import json
import time

import pytest
import torch
from tiny_backbones import full_config, small_config
from tiny_wrappers import write_wrapper
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aullm_dist.cli import main
from aullm_dist.packing import probe

SMALL = ["model.structure=false", "model.readout=last"]


def check(folder, capsys, tmp_path, *settings):
    """Return exit code, what was printed in one line, and the JSON."""
    file = tmp_path / "found.json"
    code = main(["backbone", "check", str(folder), "--json", str(file), *SMALL, *settings])
    return code, " ".join(capsys.readouterr().out.split()), json.loads(file.read_text())


def test_a_wrapper_with_its_tokenizer(tiny_llm, tmp_path, capsys):
    write_wrapper(tmp_path / "wrapper", "gemma3", tiny_llm)
    code, text, found = check(tmp_path / "wrapper", capsys, tmp_path, "model.lora_targets=[q_proj]")
    assert code == 0
    assert "gemma3_text inside gemma3" in text
    assert "packing on: at tiny size it equals padded rows within" in text
    assert (found["wrapper"], found["lora_layers"], found["lora_left_out"]) == ("gemma3", 2, 12)
    assert found["lora_weights"] == 2 * 16 * (64 + 64)
    assert found["prefix_tokens"] > 2 < found["suffix_tokens"]
    assert [(case["gpus"], case["gpu_bytes"] > 0) for case in found["memory"]] == [(1, True), (8, True)]
    assert found["refused"] == []


def test_experts_that_stay_in_16_bits_are_counted_from_a_released_config(tmp_path, capsys):
    """No weights, no tokenizer: the sizes are those of the published model."""
    full_config("qwen3_moe").save_pretrained(tmp_path / "llm")
    config = full_config("qwen3_moe")
    begun = time.process_time()
    _, text, found = check(tmp_path / "llm", capsys, tmp_path, "model.lora_targets=[q_proj]")
    assert time.process_time() - begun < 60
    experts = config.num_hidden_layers * config.num_experts * 3 * config.hidden_size * config.moe_intermediate_size
    assert found["weights_left_plain"] == experts
    assert found["weights_in_nf4"] > 0
    assert "in fused experts stay in 16 bits" in text
    assert "no tokenizer at hand" in text


def test_what_is_refused_is_said_with_the_reason(tmp_path, capsys):
    config = CONFIG_MAPPING["stablelm"](num_hidden_layers=2, hidden_size=64, intermediate_size=96, vocab_size=96)
    config.save_pretrained(tmp_path / "llm")
    _, text, found = check(tmp_path / "llm", capsys, tmp_path)
    assert found["packs"] is False
    assert "padded rows work (model.packing=false)" in text
    assert any("gives other hidden states" in line for line in found["refused"])
    small_config("llama").save_pretrained(tmp_path / "other")
    code, _, found = check(tmp_path / "other", capsys, tmp_path, "model.lora_targets=[nothing]")
    assert code == 1
    assert any("matches no linear layer" in line for line in found["refused"])


def test_layers_that_no_gradient_reaches_are_counted(tmp_path, capsys):
    small_config("deepseek_v32").save_pretrained(tmp_path)
    _, text, found = check(tmp_path, capsys, tmp_path, "model.packing=false")
    assert 0 < found["lora_idle"] < found["lora_layers"]
    assert f"; {found['lora_idle']} of them get no gradient and stay as they are" in text


def test_a_damaged_base_is_one_line(tiny_llm, tmp_path, capsys):
    """Of a wrapper, as `test_damaged_bases` has plain decoders."""
    write_wrapper(tmp_path / "wrapper", "gemma3", tiny_llm)
    (file,) = (tmp_path / "wrapper").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    capsys.readouterr()
    for command in (["check"], ["extract", "--out", str(tmp_path / "out")]):
        assert main(["backbone", command[0], str(tmp_path / "wrapper"), *command[1:]]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert "is truncated" in line


def test_what_is_no_backbone(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert main(["backbone", "check", str(tmp_path)]) == 2
    assert "is no decoder" in capsys.readouterr().err
    assert main(["backbone", "check", str(tmp_path / "nothing")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_a_probe_that_takes_too_long_is_ended_and_said(monkeypatch):
    """No architecture of its own: any one takes longer than nothing."""
    monkeypatch.setattr(probe, "SECONDS", 0)
    config = small_config("llama")
    config.rope_parameters = {"rope_type": "default", "rope_theta": 123.0}  # not in the cache
    for finding in (probe.probe_padded(config), probe.probe_packed(config)):
        assert finding.refusal is not None
        assert "too long to prove anything" in finding.refusal
        assert not finding.proven
    probe._padded.cache_clear()
    probe._packed.cache_clear()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["nemotron_h", "bailing_hybrid"])
def test_released_hybrids_are_probed_within_the_limit(name):
    """Their layers are cut as everybody's, whatever says how many there are."""
    layers = {"nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"] * 13}}
    config = CONFIG_MAPPING[name](**layers.get(name, {}))
    begun = time.thread_time()
    assert probe.probe_packed(config).refusal is None
    assert time.thread_time() - begun < probe.SECONDS
