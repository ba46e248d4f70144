"""LoRA that no gradient reaches and layers that cannot be in NF4: found on the architecture alone, said or refused."""

import pytest
import torch
from tiny_backbones import small_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from aullm_dist.errors import UserError
from aullm_dist.llm import trial
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.llm.lora import lora_targets_of
from aullm_dist.llm.trial import refuse_without_nf4, try_adapting
from aullm_dist.packing import probe
from aullm_dist.packing.shrink import shrink

INDEXER = {"wq_b", "wk", "weights_proj"}
"""Of DeepSeek 3.2: they pick the keys that a query sees, and nothing else."""


def targets_of(config):
    with torch.device("meta"):
        return set(lora_targets_of(AutoModelForCausalLM.from_config(config), "all-linear"))


@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "gpt_oss", "lfm2"])
def test_every_layer_that_computes_gets_a_gradient(name, nf4):
    assert try_adapting(small_config(name), nf4=nf4) == trial.Trial()


def test_layers_that_choose_or_are_bypassed_get_none():
    config = shrink(AutoConfig.for_model("deepseek_v32"))
    idle = try_adapting(config, nf4=False).idle
    assert {name.rpartition(".")[2] for name in idle} == INDEXER
    assert idle == {name for name in targets_of(config) if ".indexer." in name}
    # Falcon Mamba takes another way where its layers are quantised.
    config = shrink(AutoConfig.for_model("falcon_mamba"))
    assert {name.rpartition(".")[2] for name in try_adapting(config, nf4=False).idle} == {"dt_proj"}
    assert try_adapting(config, nf4=True).idle == frozenset()


@pytest.fixture(scope="module")
def sparse(tiny_llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.save_pretrained(folder)
    config = shrink(AutoConfig.for_model("deepseek_v32"))
    config.vocab_size = len(tokenizer)
    config.n_routed_experts = 0
    config.first_k_dense_replace = config.num_hidden_layers
    config.mlp_layer_types = ["dense"] * config.num_hidden_layers
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def test_they_are_said_and_frozen_and_stay_in_the_adapter(sparse):
    backbone = load_backbone(sparse, BackboneOptions(packing=False, lora_rank=2))
    lora = {name: p.requires_grad for name, p in backbone.model.named_parameters() if ".lora_" in name}
    frozen = {name for name, trained in lora.items() if not trained}
    assert frozen == {name for name in lora if ".indexer." in name}
    assert frozen
    assert f"{len(frozen) // 2} of them get no gradient and stay as they are, first" in backbone.reasons["lora"]


def test_asking_for_nothing_else_is_refused(sparse):
    with pytest.raises(UserError, match="LoRA target 'wq_b': no gradient reaches it in deepseek_v32"):
        load_backbone(sparse, BackboneOptions(packing=False, lora_targets=["o_proj", "wq_b"]))


BYPASSED = ["mamba", "longcat_flash", "rwkv"]


@pytest.mark.parametrize("name", BYPASSED)
def test_weights_that_are_used_past_their_layer_are_left_out_of_nf4(name):
    refuse_without_nf4(shrink(AutoConfig.for_model(name)))


@pytest.mark.parametrize("name", BYPASSED)
def test_what_fails_in_nf4_is_refused(name, monkeypatch):
    """As these types do where their bypassed layers are packed like the others."""
    monkeypatch.setattr(trial, "left_plain", lambda model: [])
    monkeypatch.setattr(trial, "_trial", trial._trial.__wrapped__)
    with pytest.raises(UserError, match=rf"type {name}: cannot run in NF4 \(\w+\.\w+ fails with .*quantization=none"):
        refuse_without_nf4(shrink(AutoConfig.for_model(name)))


def test_what_takes_too_long_says_nothing(monkeypatch):
    monkeypatch.setattr(probe, "SECONDS", 0)
    monkeypatch.setattr(trial, "_trial", trial._trial.__wrapped__)
    assert try_adapting(small_config("llama"), nf4=True) == trial.Trial()
