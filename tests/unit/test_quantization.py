"""NF4: what is quantised and in which dtypes, the remedies that training on it needs, stored bases, refusals."""

import gc
import inspect
import json
import logging
import shutil

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_architectures import ARCHITECTURES, write_backbone
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import BackboneOptions, embedding_rms, load_backbone
from aullm_dist.llm.quantization import nf4_config, quantized_modules, save_packed_weights_for_backward
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.packing.forward import decoder_of

WIDTH = 64
LINEAR = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
NAMES = tuple(f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEAR)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return build_tiny_backbone(tmp_path_factory.mktemp("tiny") / "llama", hidden=WIDTH, layers=2, heads=2)


@pytest.fixture(scope="module")
def stored(tiny, tmp_path_factory):
    """The same backbone stored in NF4, by the dtype of its storage; both were written to compute in float16."""
    root = tmp_path_factory.mktemp("stored")
    for storage in ("bfloat16", "uint8"):
        recipe = nf4_config(torch.float16)
        recipe.bnb_4bit_quant_storage = getattr(torch, storage)
        model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16, quantization_config=recipe)
        model.save_pretrained(root / storage)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(root / storage)
    return root


def load(folder, **options):
    return load_backbone(folder, BackboneOptions(**({"quantization": "nf4", "lora_rank": 4} | options)))


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def embeds_of(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 9, WIDTH, generator=generator) * embedding_rms(model)


def loss_of(model, embeds):
    return decoder_of(model)(inputs_embeds=embeds.to(model.dtype)).last_hidden_state.float().square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_decoders_linear_layers_are_quantised(tiny, dtype):
    backbone = load(tiny, dtype=dtype)
    assert backbone.quantized_modules == NAMES
    assert quantized_modules(backbone.model) == NAMES, "the names are those of the plain LLM under PEFT too"
    named = dict(backbone.model.get_base_model().named_parameters())
    packed = {name for name in named if name.removesuffix(".base_layer.weight") in NAMES}
    assert len(packed) == len(NAMES)
    assert {named[name].dtype for name in packed} == {torch.bfloat16}
    lora = {name for name in named if ".lora_" in name}
    assert len(lora) == 2 * len(NAMES)
    assert {named[name].dtype for name in lora} == {torch.float32}
    others = set(named) - packed - lora
    assert {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"} <= others
    assert {named[name].dtype for name in others} == {dtype}
    assert {name for name, p in named.items() if p.requires_grad} == lora
    for layer in layers_of(backbone.model):
        state = layer.weight.quant_state
        assert (state.nested, state.quant_type, state.dtype, layer.compute_dtype) == (True, "nf4", dtype, dtype)


def test_the_log_tells_what_was_quantised_and_counts_unpacked_weights(tiny):
    plain, nf4 = load_backbone(tiny), load(tiny, dtype=torch.bfloat16)
    assert nf4.reasons["quantization"] == (
        "NF4, double quantisation, bfloat16 storage, 14 linear layers; computed in bfloat16 (quantised while loading); "
        "0.00 GB in 4 bits, 0.00 GB not"
    )
    assert plain.quantized_modules == ()
    assert "quantization" not in plain.reasons
    size = plain.reasons["backbone"].split(", ")[1]
    assert size.endswith("M parameters")
    assert size in nf4.reasons["backbone"]


@pytest.mark.parametrize("storage", ["bfloat16", "uint8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_nf4_base_is_taken_as_it_is(tiny, stored, storage, dtype):
    backbone = load(stored / storage, dtype=dtype)
    assert backbone.quantized_modules == NAMES
    computed = str(dtype).removeprefix("torch.")
    assert backbone.reasons["quantization"] == (
        f"NF4, double quantisation, {storage} storage, 14 linear layers; computed in {computed} (as stored); "
        "0.00 GB in 4 bits, 0.00 GB not"
    )
    files = load_file(stored / storage / "model.safetensors")
    for name, layer in zip(NAMES, layers_of(backbone.model), strict=True):
        assert torch.equal(layer.weight.data.view(torch.uint8), files[f"{name}.weight"].view(torch.uint8))
        assert (layer.compute_dtype, layer.weight.quant_state.dtype) == (dtype, dtype)
    fresh = load(tiny, dtype=torch.bfloat16).model.eval()
    if dtype == torch.bfloat16:
        embeds = embeds_of(fresh)
        assert torch.equal(loss_of(backbone.model.eval(), embeds), loss_of(fresh, embeds))


def test_gradients_are_those_of_the_dequantised_weights(stored):
    """The files say bfloat16, the products run in float32: a backward pass through rounded weights would be off."""
    model = load(stored / "bfloat16", dtype=torch.float32, lora_rank=0).model
    layer = layers_of(model)[0]
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
    rows = torch.stack([torch.autograd.grad(layer(x)[:, i].sum(), x)[0][0] for i in range(WIDTH)])
    torch.testing.assert_close(layer(x), x @ rows.T, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "qwen2"])
def test_tied_embeddings_and_biases_stay_as_they_are(tiny, tmp_path, name):
    folder = write_backbone(tmp_path / name, name, tiny)
    plain, nf4 = (load_backbone(folder, BackboneOptions(lora_rank=0, quantization=q)).model for q in ("none", "nf4"))
    assert len(quantized_modules(nf4)) == 14
    weights = dict(plain.named_parameters())
    kept = {key: p for key, p in nf4.named_parameters() if key.removesuffix(".weight") not in quantized_modules(nf4)}
    assert kept
    assert all(torch.equal(parameter, weights[key]) for key, parameter in kept.items())
    assert ARCHITECTURES[name][0] != "gemma2" or nf4.lm_head.weight is nf4.model.embed_tokens.weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_changes_no_training_step(tiny, dtype):
    """On CPUs with AVX512-BF16 one evaluation used to freeze the loss."""

    def losses(evaluate):
        model = load(tiny, dtype=dtype).model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
        embeds = embeds_of(model).requires_grad_()
        found = []
        for _ in range(3):
            loss = loss_of(model, embeds)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
            if evaluate:
                with torch.no_grad():
                    loss_of(model.eval(), embeds)
                model.train()
        return found

    plain = losses(evaluate=False)
    assert len(set(plain)) == 3
    assert losses(evaluate=True) == plain


def test_no_layer_may_repack_its_weight(tiny, monkeypatch):
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers_of(load(tiny).model))
    assert "self.support_avx512bf16_for_cpu" in inspect.getsource(Linear4bit.forward), "renamed: see _keep_layout"
    monkeypatch.setattr("aullm_dist.llm.quantization._PACKS_FOR_CPU", "renamed_by_another_version")
    with pytest.raises(UserError, match=r"bitsandbytes 0\S+: Linear4bit has no renamed_by_another_version") as caught:
        load(tiny)
    assert "\n" not in str(caught.value)


def storages_kept_alive(model, hooks):
    """Release every packed weight after a forward pass, as ZeRO-3 does, and count what still holds its storage."""
    embeds = embeds_of(model).requires_grad_()
    if hooks:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: None):
            loss = loss_of(model, embeds)
    else:
        loss = loss_of(model, embeds)
    layers = layers_of(model)
    storages = [StorageWeakRef(layer.weight.untyped_storage()) for layer in layers]
    for layer in layers:
        layer.weight.data = torch.empty(0, dtype=layer.weight.dtype)
    gc.collect()
    assert loss.grad_fn is not None
    return sum(not storage.expired() for storage in storages)


@pytest.mark.parametrize("hooks", [False, True], ids=["plain", "saved tensors dropped"])
def test_a_forward_pass_keeps_no_packed_weight_alive(tiny, hooks):
    assert storages_kept_alive(load(tiny).model.train(), hooks) == 0


def test_upstream_still_keeps_packed_weights_alive(tiny, monkeypatch):
    """Fails once bitsandbytes (issue 2034) has mended it: then drop `save_packed_weights_for_backward`."""
    model = load(tiny).model.train()
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", bitsandbytes.matmul_4bit.__wrapped__)
    assert storages_kept_alive(model, hooks=True) == len(NAMES)


def gradients_of(model, between=lambda: None):
    model.zero_grad()
    embeds = embeds_of(model).requires_grad_()
    loss = loss_of(model, embeds)
    between()
    loss.backward()
    return [loss.detach(), embeds.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("checkpointing", ["none", "non_reentrant", "reentrant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_upstream(tiny, monkeypatch, dtype, checkpointing):
    model = load(tiny, dtype=dtype, activation_checkpointing=checkpointing).model.train()
    ours = gradients_of(model)
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", bitsandbytes.matmul_4bit.__wrapped__)
    theirs = gradients_of(model)
    assert len(ours) == 2 + 2 * len(NAMES)
    assert all(map(torch.equal, ours, theirs))


def test_weights_that_were_released_and_fetched_again_give_the_same_gradients(tiny):
    model = load(tiny).model.train()
    expected = gradients_of(model)

    def release_and_fetch():
        for layer in layers_of(model):
            kept = layer.weight.data.clone()
            layer.weight.data = torch.empty(0, dtype=kept.dtype)
            layer.weight.data = kept

    assert all(map(torch.equal, gradients_of(model, release_and_fetch), expected))


def test_the_patch_is_applied_once():
    save_packed_weights_for_backward()
    patched = bitsandbytes.matmul_4bit
    save_packed_weights_for_backward()
    assert bitsandbytes.matmul_4bit is patched
    assert not hasattr(patched.__wrapped__, "__wrapped__")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_an_adapter_loads_with_stock_peft_onto_a_fresh_nf4_base(tiny, tmp_path):
    model = load(tiny).model
    for index, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(index))
    model.save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tiny, dtype=torch.float32, quantization_config=nf4_config(torch.float32), attn_implementation="sdpa"
    )
    stock = PeftModel.from_pretrained(base, tmp_path)
    for layer in layers_of(stock):
        layer.support_avx512bf16_for_cpu = False
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
        torch.testing.assert_close(stock.eval()(input_ids=ids).logits, logits, rtol=0, atol=1e-5)
        with stock.disable_adapter():
            assert (stock(input_ids=ids).logits - logits).abs().max() > 1e-2


def refused(folder, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        load(folder, **options)
    assert "\n" not in str(caught.value)


def test_an_unknown_quantisation_and_checkpointing_are_refused(tiny):
    refused(tiny, "quantization is 'int8'; allowed: none, nf4", quantization="int8")
    refused(tiny, "is True; allowed: none, non_reentrant, reentrant", activation_checkpointing=True)


def test_a_stored_nf4_base_must_be_asked_for(stored):
    refused(stored / "uint8", "quantised by bitsandbytes NF4; set model.quantization=nf4", quantization="none")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("recipe", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        (BitsAndBytesConfig(load_in_8bit=True).to_dict(), "bitsandbytes 8-bit"),
        (BitsAndBytesConfig(load_in_4bit=True).to_dict(), "bitsandbytes FP4"),
        ({"load_in_4bit": True}, "bitsandbytes FP4"),
    ],
)
def test_other_methods_are_refused_by_name(tiny, tmp_path, recipe, method, quantization):
    folder = shutil.copytree(tiny, tmp_path / "base")
    _set_recipe(folder, recipe)
    refused(folder, f"quantised by {method}; allowed: bitsandbytes NF4", quantization=quantization)


def test_other_storage_dtypes_are_refused_by_name(stored, tmp_path):
    folder = shutil.copytree(stored / "bfloat16", tmp_path / "base")
    recipe = json.loads((folder / "config.json").read_text())["quantization_config"]
    _set_recipe(folder, recipe | {"bnb_4bit_quant_storage": "float32"})
    refused(folder, "NF4 weights are stored as float32; allowed: bfloat16, uint8")


def _set_recipe(folder, recipe):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": recipe}, default=str))


@pytest.mark.parametrize("kind", ["quantised while loading", "as stored"])
def test_damaged_weights_are_refused_in_nf4_too(tiny, stored, tmp_path, kind):
    folder = shutil.copytree(tiny if kind == "quantised while loading" else stored / "bfloat16", tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    damaged = NAMES[-2]

    def save(changed):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    save({key: value for key, value in weights.items() if not key.startswith(damaged)})
    refused(folder, f"1 weights are missing in its files, first {damaged}.weight")
    save(weights | {"model.norm.weight": torch.ones(3)})
    refused(folder, "of another shape in its files, first model.norm.weight")
    save(weights | {f"{damaged}.weight": weights[f"{damaged}.weight"][:-8].clone()})
    refused(folder, f"of another shape in its files, first {damaged}.weight")
    if kind == "as stored":
        save({key: value for key, value in weights.items() if key != f"{damaged}.weight.absmax"})
        refused(folder, "another shape")
    (folder / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    refused(folder, "is truncated")


def test_only_the_complaint_about_the_kernel_is_hidden(caplog):
    from bitsandbytes.backends.cpu import ops

    complaint = "Failed to load CPU gemm_4bit_forward from kernels-community: %s."
    assert complaint in inspect.getsource(ops), "reworded: see hide_missing_cpu_kernel"
    with caplog.at_level(logging.WARNING):
        ops.logger.warning(complaint, "no module")
        ops.logger.warning("anything else")
    assert [record.message for record in caplog.records] == ["anything else"]
