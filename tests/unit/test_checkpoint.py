"""Checkpoints: what is in them, and what comes back out of them."""

import json
import warnings

import pytest
import torch
from checkpoint_samples import (
    BASE,
    FILES,
    MODEL_CONFIG,
    NoLLM,
    TinyModel,
    build,
    load_checkpoint,
    plain_llm,
    save,
    snapshot,
    train,
)
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file

from aullm_dist.checkpoint import store as checkpoint_module
from aullm_dist.checkpoint.entries import ParameterEntry
from aullm_dist.checkpoint.manifest import read_manifest
from aullm_dist.errors import CheckpointError


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}, {"amsgrad": True}])
def test_resumed_run_is_bit_identical(tmp_path, options):
    whole, whole_optimizer = build(optimizer_options=options)
    train(whole, whole_optimizer, 0, 5)
    first, first_optimizer = build(optimizer_options=options)
    train(first, first_optimizer, 0, 2)
    folder = save(tmp_path / "a", 2, first, first_optimizer)
    resumed, resumed_optimizer = build(seed=1, optimizer_options=options)
    state = load_checkpoint(folder, resumed, resumed_optimizer, model_config=MODEL_CONFIG, base=BASE)
    assert state == {"step": 2, "consumed_samples": 4, "epoch": 0, "best": {"f1_macro": 0.5}}
    assert snapshot(resumed, resumed_optimizer) == snapshot(first, first_optimizer)
    train(resumed, resumed_optimizer, 2, 5)
    assert snapshot(resumed, resumed_optimizer) == snapshot(whole, whole_optimizer)
    left, right = save(tmp_path / "b", 5, whole, whole_optimizer), save(tmp_path / "c", 5, resumed, resumed_optimizer)
    assert {p.name: p.read_bytes() for p in left.iterdir()} == {p.name: p.read_bytes() for p in right.iterdir()}


def test_each_parameter_gets_its_own_step_tensor(two_checkpoints):
    model, optimizer = build(seed=1)
    load_checkpoint(two_checkpoints / "step-00000002", model, optimizer)
    steps = [entries["step"] for entries in optimizer.state.values()]
    assert len({step.data_ptr() for step in steps}) == len(steps) > 10
    assert {step.item() for step in steps} == {2.0}


def test_param_groups_are_left_to_the_trainer(two_checkpoints):
    model, optimizer = build(seed=1)
    for group in optimizer.param_groups:
        group["lr"] = 0.125
    load_checkpoint(two_checkpoints / "step-00000002", model, optimizer)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.125, 0.1), (0.125, 0.0)]


def test_never_stepped_parameter_stays_without_state(two_checkpoints):
    model, optimizer = build(seed=1)
    train(model, optimizer, 0, 1)
    optimizer.state[model.unused] = {"step": torch.tensor(9.0)}
    load_checkpoint(two_checkpoints / "step-00000002", model, optimizer)
    assert model.unused not in optimizer.state
    entry = read_manifest(two_checkpoints / "step-00000002").parameters["unused"]
    assert entry == ParameterEntry(
        file="aullm_modules.safetensors", key="unused", trainable=True, optimizer=("master",)
    )


def test_weights_load_without_an_optimizer(two_checkpoints):
    trained, optimizer = build()
    train(trained, optimizer, 0, 2)
    model, untouched = build(seed=1)
    load_checkpoint(two_checkpoints / "step-00000002", model)
    assert snapshot(model, untouched) == snapshot(trained, torch.optim.AdamW(trained.parameters()))


def test_bfloat16_parameters_keep_their_dtype_and_have_fp32_masters(tmp_path):
    model, optimizer = build()
    model.reasoner.au_head.to(torch.bfloat16)
    model.forward = lambda clips: model.reasoner.au_head(clips.flatten(1)[:, :16].bfloat16())
    train(model, optimizer, 0, 2)
    folder = save(tmp_path, 2, model, optimizer)
    tensors = read_manifest(folder).tensors
    assert tensors["aullm_modules.safetensors"]["reasoner.au_head.weight"].dtype == "BF16"
    assert tensors["optimizer.safetensors"]["reasoner.au_head.weight.master"].dtype == "F32"
    again, again_optimizer = build(seed=1)
    again.reasoner.au_head.to(torch.bfloat16)
    load_checkpoint(folder, again, again_optimizer)
    assert snapshot(again, again_optimizer) == snapshot(model, optimizer)


@pytest.mark.parametrize(
    ("head", "lora"),
    [
        (True, {"task_type": "CAUSAL_LM"}),
        (True, {"use_rslora": True}),
        (True, {"use_dora": True}),
        (False, {}),
        (False, {"use_dora": True}),
    ],
)
def test_stock_peft_loads_the_adapter(tmp_path, head, lora):
    model, optimizer = build(head=head, **lora)
    train(model, optimizer, 0, 2)
    folder = save(tmp_path, 2, model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns about adapter keys that fit nowhere
        loaded = PeftModel.from_pretrained(plain_llm(), folder)
    embeds = torch.randn(2, 6, 16)
    live = model.reasoner.llm(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1]
    plain = plain_llm()(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1]
    stock = loaded(inputs_embeds=embeds, output_hidden_states=True).hidden_states[-1]
    assert torch.equal(stock, live)
    assert not torch.allclose(stock, plain)


def test_adapter_keys_are_those_that_peft_itself_saves(tmp_path):
    model, optimizer = build()
    train(model, optimizer, 0, 1)
    folder = save(tmp_path / "ours", 1, model, optimizer)
    model.peft_model().save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "theirs"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    config = json.loads((folder / "adapter_config.json").read_text())
    expected = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    assert config.keys() >= expected.keys() - {"auto_mapping"}
    assert (config["base_model_name_or_path"], config["task_type"]) == ("org/tiny", "CAUSAL_LM")


def test_folder_holds_the_trainables_and_nothing_of_the_frozen_llm(two_checkpoints):
    folder = two_checkpoints / "step-00000002"
    assert {path.name for path in folder.iterdir()} == FILES
    manifest = read_manifest(folder)
    keys = {key for table in manifest.tensors.values() for key in table}
    assert not [key for key in keys if "base_layer" in key or "embed_tokens" in key or "scratch" in key]
    assert {"frozen_gain", "edges", "mask"} <= manifest.tensors["aullm_modules.safetensors"].keys()
    model, _ = build()
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert {name for name, entry in manifest.parameters.items() if entry.trainable} == trainable
    for name in trainable:
        entry = manifest.parameters[name]
        with safe_open(folder / entry.file, "pt") as file:
            assert file.get_slice(entry.key).get_shape() == list(model.get_parameter(name).shape)
    assert (manifest.step, manifest.base, manifest.quantized_modules) == (2, BASE, ())
    assert manifest.config["training"] == {"seed": 0}
    assert {"torch", "peft", "python"} <= manifest.versions.keys()


def test_nothing_in_the_folder_is_pickled(two_checkpoints):
    for path in (two_checkpoints / "step-00000002").iterdir():
        assert path.suffix in {".json", ".safetensors"}
        assert not path.read_bytes().startswith((b"\x80", b"PK"))


def test_files_are_as_readable_as_any_other(two_checkpoints, tmp_path):
    (tmp_path / "ordinary").write_text("")
    modes = {path.stat().st_mode for path in (two_checkpoints / "step-00000002").iterdir()}
    assert modes == {(tmp_path / "ordinary").stat().st_mode}


def test_files_that_did_not_arrive_whole_are_not_published(tmp_path, monkeypatch):
    model, optimizer = build()
    write = checkpoint_module.save_file

    def lose_one(tensors, path, metadata):
        write(dict(list(tensors.items())[1:]), path, metadata=metadata)

    monkeypatch.setattr(checkpoint_module, "save_file", lose_one)
    with pytest.raises(CheckpointError, match="does not hold the tensors"):
        save(tmp_path, 0, model, optimizer)
    assert list(tmp_path.iterdir()) == []


def test_model_without_llm_has_no_adapter_files(tmp_path):
    torch.manual_seed(0)
    model = NoLLM()
    folder = save(tmp_path, 0, model, torch.optim.AdamW(model.parameters()), base=None)
    assert {path.name for path in folder.iterdir()} == FILES - {"adapter_config.json", "adapter_model.safetensors"}
    other = NoLLM()
    load_checkpoint(folder, other, torch.optim.AdamW(other.parameters()))
    assert torch.equal(other.network.weight, model.network.weight)


def test_llm_without_lora_is_not_written(tmp_path):
    model, optimizer = build(lora=False)
    train(model, optimizer, 0, 1)
    folder = save(tmp_path, 1, model, optimizer)
    assert not (folder / "adapter_model.safetensors").exists()
    assert not [name for name in load_file(folder / "aullm_modules.safetensors") if name.startswith("reasoner.llm")]


def test_prefix_that_is_not_the_peft_model_is_a_mistake_of_ours(tmp_path):
    class Misnamed(TinyModel):
        adapter_prefix = "reasoner"

    torch.manual_seed(0)
    with pytest.raises(TypeError, match="adapter_prefix"):
        save(tmp_path, 0, Misnamed(), None)
