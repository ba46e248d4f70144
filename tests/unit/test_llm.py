"""Loading a backbone: LoRA that stock PEFT can load, freezing, the tiny backbone, refusals."""

import json
import shutil
import socket

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    StableLmConfig,
)

from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import BackboneOptions, embedding_rms, load_backbone, mean_embeddings
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.packing.forward import decoder_of


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_backbone(tmp_path_factory.mktemp("tiny") / "llama", hidden=32, layers=2, heads=2)


def randomise_lora(model):
    generator = torch.Generator().manual_seed(1)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.normal_(std=0.1, generator=generator)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapter_loads_with_stock_peft_onto_the_plain_model(tiny, tmp_path):
    backbone = load_backbone(tiny, BackboneOptions(lora_rank=4))
    randomise_lora(backbone.model)
    backbone.model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tiny)
    embeds = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        before = plain.model(inputs_embeds=embeds).last_hidden_state
        stock = PeftModel.from_pretrained(plain, tmp_path).eval()
        after = stock(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1]
        ours = decoder_of(backbone.model.eval())(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(ours, after, rtol=0, atol=1e-6)
    assert (ours - before).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_lora_is_trainable_and_float32(tiny, dtype):
    model = load_backbone(tiny, BackboneOptions(dtype=dtype, lora_rank=4)).model
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 2 * 7  # A and B on 7 linear layers of 2 decoder layers
    assert all(".lora_" in name and "lm_head" not in name for name in trainable)
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {p.dtype for name, p in model.named_parameters() if name not in trainable} == {dtype}


def test_lora_targets_by_name_and_rank_zero(tiny):
    model = load_backbone(tiny, BackboneOptions(lora_rank=2, lora_targets=["q_proj", "v_proj"])).model
    assert {name.split(".")[-4] for name, p in model.named_parameters() if p.requires_grad} == {"q_proj", "v_proj"}
    plain = load_backbone(tiny, BackboneOptions(lora_rank=0)).model
    assert not isinstance(plain, PeftModel)
    assert not any(p.requires_grad for p in plain.parameters())


def test_lora_seed_decides_the_weights_and_leaves_the_global_generator(tiny):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first, again, other = (load_backbone(tiny, BackboneOptions(seed=seed)).model for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    name = next(name for name, _ in first.named_parameters() if "lora_A" in name)
    assert torch.equal(first.get_parameter(name), again.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def test_activation_checkpointing_needs_no_gradient_of_the_embeddings(tiny):
    model = load_backbone(tiny, BackboneOptions(activation_checkpointing="non_reentrant")).model
    layers = decoder_of(model).layers
    assert all(layer.gradient_checkpointing for layer in layers)
    assert not model.get_input_embeddings()(torch.tensor([3])).requires_grad


def test_local_folder_asks_no_hub(tiny, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a local path opened a connection")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert load_backbone(tiny).hidden_size == 32


def test_embedding_helpers(tiny):
    model = load_backbone(tiny).model
    weight = model.get_input_embeddings().weight
    assert not weight[0].any(), "the row of <pad> is zero and must not count"
    assert embedding_rms(model) == pytest.approx(weight[1:].square().mean().sqrt().item(), rel=1e-5)
    torch.testing.assert_close(mean_embeddings(model, [(5,), (6, 8)])[1], (weight[6] + weight[8]) / 2)


def test_paths_that_are_no_model(tmp_path, tiny):
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "absent"), str(tmp_path / "empty"), "./absent", ""):
        with pytest.raises(
            UserError, match="allowed: a local folder with config.json, or a Hugging Face name"
        ) as caught:
            load_backbone(name)
        assert "\n" not in str(caught.value)
    bare = tmp_path / "bare"
    bare.mkdir()
    for content in ("{not json", json.dumps({"model_type": "nothing-known"}), (tiny / "config.json").read_text()):
        (bare / "config.json").write_text(content)
        with pytest.raises(UserError, match="cannot be read|cannot be loaded|is missing") as caught:
            load_backbone(bare)
        assert str(bare) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_damaged_weights_are_refused(tmp_path, tiny):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(tiny, broken)
    weights = load_file(tiny / "model.safetensors")
    lacking = {k: v for k, v in weights.items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(lacking, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights are missing in its files, first model.layers.1.mlp.up_proj.weight"):
        load_backbone(broken)
    reshaped = weights | {"model.norm.weight": torch.ones(31)}
    save_file(reshaped, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"of another shape in its files, first model.norm.weight"):
        load_backbone(broken)
    (broken / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match="is truncated"):
        load_backbone(broken)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"attention": "flash_attention_2"}, "attention is 'flash_attention_2'; allowed: auto, prefix, sdpa, eager"),
        ({"lora_targets": ["q_proj", "nope"]}, "LoRA target 'nope': matches no linear layer"),
        ({"lora_targets": ["lm_head"]}, "LoRA target 'lm_head': the vocabulary head is never called"),
        ({"lora_targets": []}, "LoRA targets: none given"),
    ],
)
def test_options_that_are_refused(tiny, options, match):
    with pytest.raises(UserError, match=match):
        load_backbone(tiny, BackboneOptions(**options))


def test_architectures_that_are_refused(tmp_path):
    StableLmConfig().save_pretrained(tmp_path / "stablelm")
    with pytest.raises(UserError, match=r"'stablelm' gives other hidden states .* packed than padded .*packing=false"):
        load_backbone(tmp_path / "stablelm")
    BertConfig(is_encoder_decoder=True).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="'bert' is no decoder"):
        load_backbone(tmp_path / "bert")
    Qwen3Config(num_hidden_layers=2, layer_types=["full_attention", "sliding_attention"]).save_pretrained(
        tmp_path / "swa"
    )
    with pytest.raises(UserError, match="has sliding_window=None"):
        load_backbone(tmp_path / "swa")


def test_a_decoder_without_linear_layers_is_refused(tiny, tmp_path):
    """GPT-2 keeps its weights in a layer type of its own."""
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    config = GPT2Config(n_embd=16, n_layer=1, n_head=1, vocab_size=len(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="backbone of type gpt2: has no linear layers that LoRA could adapt"):
        load_backbone(tmp_path, BackboneOptions(packing=False))
