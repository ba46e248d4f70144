"""Layers whose weights the library's code uses past the layer are not packed, whoever loads them."""

import pytest
import torch
from merge_samples import checkpoint_of
from test_pieces import assert_same, load
from tiny_backbones import small_config, write_any, write_config
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aullm_dist.cli import main
from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.llm.bypassed import bypassed_layers, shared_layers
from aullm_dist.llm.pieces.placement import Alone
from aullm_dist.llm.pieces.skeleton import model_without_storage
from aullm_dist.llm.quantization import nf4_config
from aullm_dist.merge.merge import merge_llm
from aullm_dist.packing.shrink import keep_layers, shrink

LEAVES = {
    "llama": set(),
    "qwen3_5_text": set(),
    "falcon_h1": set(),
    "longcat_flash": {"classifier"},
    "mamba": {"dt_proj"},
    "rwkv": {"output", "value"},
    "hunyuan_v1_moe": {"wg"},
    "gemma3n_text": {"prediction_coefs", "correction_coefs"},
}


@pytest.mark.parametrize("name", LEAVES)
def test_what_is_bypassed_is_seen_and_stays_plain(name):
    config = small_config(name)
    model = model_without_storage(config, torch.float32, None)
    found = bypassed_layers(model)
    assert {layer.rpartition(".")[2] for layer in found} == LEAVES[name]
    packed = dict(model_without_storage(config, torch.float32, nf4_config(torch.float32)).named_modules())
    assert all(type(packed[layer]) is nn.Linear for layer in found)
    linear = [layer for layer, module in model.named_modules() if type(module) is nn.Linear and layer not in found]
    assert {type(packed[layer]).__name__ for layer in linear if layer != "lm_head"} == {"Linear4bit"}


@pytest.mark.parametrize("name", ["longcat_flash", "mamba"])
def test_all_ways_of_loading_leave_the_same_layers_plain(tiny_llm, tmp_path, name):
    write_any(tmp_path / "llm", name, tiny_llm)
    whole = load_backbone(tmp_path / "llm", BackboneOptions(lora_rank=2, quantization="nf4", packing=False))
    assert not any(layer.endswith(tuple(LEAVES[name])) for layer in whole.quantized_modules)
    (pieces,) = load(tmp_path / "llm", 1, torch.float32, nf4_config(torch.float32))
    plain = {layer for layer, module in pieces.named_modules() if type(module) is nn.Linear}
    assert any(layer.endswith(tuple(LEAVES[name])) for layer in plain)
    assert main(["quantize", str(tmp_path / "llm"), "--out", str(tmp_path / "packed")]) == 0
    stored = load_backbone(tmp_path / "packed", BackboneOptions(lora_rank=2, quantization="nf4", packing=False))
    assert stored.quantized_modules == whole.quantized_modules
    (again,) = load(tmp_path / "packed", 1, torch.bfloat16, nf4_config(torch.bfloat16), stored=True)
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16), again)
    embeds = torch.randn(1, 7, whole.hidden_size, requires_grad=True)
    whole.model.train().get_base_model().base_model(inputs_embeds=embeds).last_hidden_state.sum().backward()
    assert embeds.grad.isfinite().all()


def test_what_cannot_be_built_small_is_left_as_it_was():
    config = CONFIG_MAPPING["mpt"](d_model=64, n_heads=4, n_layers=2, vocab_size=96)
    assert bypassed_layers(model_without_storage(config, torch.float32, None)) == []


def test_a_publishers_nf4_of_such_layers_is_refused(tiny_llm, tmp_path):
    write_any(tmp_path / "llm", "longcat_flash", tiny_llm)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "llm", dtype=torch.float32, quantization_config=nf4_config(torch.float32)
    )
    model.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(tiny_llm).save_pretrained(tmp_path / "packed")
    with pytest.raises(UserError, match=r"classifier is in NF4, but longcat_flash uses its weight past the layer"):
        load_backbone(tmp_path / "packed", BackboneOptions(lora_rank=0, quantization="nf4", packing=False))


def test_blocks_that_share_their_weights(tiny_llm, tmp_path):
    """Plain in NF4, without LoRA, the same weights in every place for whoever loads them, and merged as trained."""
    config = shrink(keep_layers(CONFIG_MAPPING["zamba2"](), [0, 6, 7, 12]), keep_layers=True)
    config.intermediate_size = 128
    write_config(tmp_path / "llm", config, tiny_llm)
    options = BackboneOptions(lora_rank=2, quantization="nf4", packing=False, attention="eager")
    backbone = load_backbone(tmp_path / "llm", options)
    assert "others are none that LoRA can be on in zamba2" in backbone.reasons["lora"]
    shared = shared_layers(backbone.model.get_base_model())
    assert {name.split(".")[2] for name in shared} == {"1", "3"}
    assert set(shared.values()) < set(shared)
    assert not set(shared) & set(backbone.quantized_modules)
    pieces = load_backbone(tmp_path / "llm", BackboneOptions(lora_rank=0, packing=False), placement=Alone())
    whole = load_backbone(tmp_path / "llm", BackboneOptions(lora_rank=0, packing=False))
    assert_same(whole.model, pieces.model)
    assert shared_layers(pieces.model) == shared
    with pytest.raises(UserError, match=r"LoRA target 'gate_up_proj': its weight is that of model.layers.1"):
        load_backbone(tmp_path / "llm", BackboneOptions(lora_targets=("gate_up_proj",), packing=False))
    checkpoint = checkpoint_of(tmp_path / "run", backbone, tmp_path / "llm")
    receipt = merge_llm(checkpoint, tmp_path / "out", dtype=torch.float32, probe=["Action units"])
    assert receipt.probe["relative_logit_error"]["nf4-exact"] < 1e-5
