import errno
import json
import logging
import os
import shutil
import warnings

import pytest
import torch
from checkpoint_samples import (
    AUS,
    BASE,
    LLM_CONFIG,
    MODEL_CONFIG,
    NoLLM,
    TinyModel,
    build,
    plain_llm,
    save,
    snapshot,
    train,
)
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from aullm_dist.errors import CheckpointError, UserError
from aullm_dist.training import checkpoint as checkpoint_module
from aullm_dist.training.base_identity import base_identity
from aullm_dist.training.checkpoint import load_checkpoint
from aullm_dist.training.manifest import read_manifest, verify_checkpoint
from aullm_dist.training.retention import find_newest_valid, list_checkpoints, rotate

FILES = {
    "MANIFEST.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "aullm_config.json",
    "aullm_modules.safetensors",
    "optimizer.safetensors",
    "trainer_state.json",
}


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory):
    """Steps 1 and 2 of one run; read only."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    model, optimizer = build()
    for step in (1, 2):
        train(model, optimizer, step - 1, step)
        save(root, step, model, optimizer)
    return root


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
    entry = read_manifest(two_checkpoints / "step-00000002")["parameters"]["unused"]
    assert entry == {"file": "aullm_modules.safetensors", "key": "unused", "trainable": True, "optimizer": ["master"]}


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
    tensors = read_manifest(folder)["tensors"]
    assert tensors["aullm_modules.safetensors"]["reasoner.au_head.weight"]["dtype"] == "BF16"
    assert tensors["optimizer.safetensors"]["reasoner.au_head.weight.master"]["dtype"] == "F32"
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
    keys = {key for table in manifest["tensors"].values() for key in table}
    assert not [key for key in keys if "base_layer" in key or "embed_tokens" in key or "scratch" in key]
    assert {"frozen_gain", "edges", "mask"} <= manifest["tensors"]["aullm_modules.safetensors"].keys()
    model, _ = build()
    trainable = {name for name, param in model.named_parameters() if param.requires_grad}
    assert {name for name, entry in manifest["parameters"].items() if entry["trainable"]} == trainable
    for name in trainable:
        entry = manifest["parameters"][name]
        with safe_open(folder / entry["file"], "pt") as file:
            assert file.get_slice(entry["key"]).get_shape() == list(model.get_parameter(name).shape)
    assert (manifest["step"], manifest["base"], manifest["quantized_modules"]) == (2, BASE, [])
    assert manifest["config"]["training"] == {"seed": 0}
    assert {"torch", "peft", "python"} <= manifest["versions"].keys()


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


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def _grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES = {"missing": lambda path: path.unlink(), "truncated": _truncate, "altered": _flip, "too long": _grow}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", sorted(FILES))
def test_damaged_checkpoint_is_refused_by_name_and_an_older_one_found(two_checkpoints, tmp_path, caplog, name, damage):
    root = shutil.copytree(two_checkpoints, tmp_path / "run")
    folder = root / "step-00000002"
    DAMAGES[damage](folder / name)
    model, optimizer = build(seed=1)
    before = snapshot(model, optimizer)
    word = "altered" if name == "MANIFEST.json" and damage == "too long" else damage
    with pytest.raises(UserError, match=f"{name}: .*{word}"):
        load_checkpoint(folder, model, optimizer)
    assert snapshot(model, optimizer) == before
    with caplog.at_level(logging.WARNING):
        assert find_newest_valid(root, logging.getLogger("test")) == root / "step-00000001"
    assert name in caplog.text


def test_find_newest_valid_prefers_the_newest_and_may_find_none(two_checkpoints, tmp_path):
    assert find_newest_valid(two_checkpoints) == two_checkpoints / "step-00000002"
    assert find_newest_valid(tmp_path / "nowhere") is None
    root = shutil.copytree(two_checkpoints, tmp_path / "run")
    for folder in list_checkpoints(root):
        _flip(folder / "trainer_state.json")
    assert find_newest_valid(root) is None


def _expect_refusal(folder, pattern, *, model_config=MODEL_CONFIG, base=BASE, change=None, **options):
    model, optimizer = build(seed=1, **options)
    if change is not None:
        change(model)
    before = snapshot(model, optimizer)
    with pytest.raises(UserError, match=pattern) as refusal:
        load_checkpoint(folder, model, optimizer, model_config=model_config, base=base)
    assert "\n" not in str(refusal.value)
    assert "is of another model" in str(refusal.value)
    assert snapshot(model, optimizer) == before


def test_checkpoint_of_another_model_is_refused(two_checkpoints):
    folder = two_checkpoints / "step-00000002"
    _expect_refusal(
        folder, r"LoRA r is 4 in the checkpoint, 2 expected.*\(4, 16\) in the checkpoint, \(2, 16\)", rank=2
    )
    _expect_refusal(folder, "lora_alpha is 8 in the checkpoint, 16 expected", alpha=16)
    _expect_refusal(folder, "lora_A.weight is in the checkpoint's adapter_model.safetensors, but not in", lora=False)
    _expect_refusal(
        folder, r"aus is \[1, 4, 12\] in the checkpoint, \[1, 4\]", model_config={**MODEL_CONFIG, "aus": [1, 4]}
    )
    _expect_refusal(
        folder, "readout is 'last' in the checkpoint, 'per_au'", model_config={"aus": AUS, "readout": "per_au"}
    )
    _expect_refusal(
        folder,
        r"strength has shape \(5,\) in the checkpoint, \(7,\) expected",
        change=lambda model: setattr(model, "strength", nn.Parameter(torch.zeros(7))),
    )
    _expect_refusal(
        folder,
        r"extra.weight \(shape \(1, 1\)\) is not in the checkpoint's aullm_modules",
        change=lambda model: setattr(model, "extra", nn.Linear(1, 1, bias=False)),
    )
    _expect_refusal(
        folder,
        r"edges has shape \(2, 5\) in the checkpoint, \(2, 6\)",
        change=lambda model: setattr(model, "edges", torch.zeros(2, 6, dtype=torch.long)),
    )
    _expect_refusal(
        folder,
        "frozen_gain is trained here, but was frozen",
        change=lambda model: model.frozen_gain.requires_grad_(True),
    )


def test_checkpoint_of_another_base_is_refused(two_checkpoints):
    folder = two_checkpoints / "step-00000002"
    other_config = {**LLM_CONFIG.to_dict(), "rope_theta": 1.0}
    _expect_refusal(
        folder,
        "org/tiny in the checkpoint, org/tiny expected, and their configs differ",
        base=base_identity("org/tiny", other_config),
    )
    _expect_refusal(
        folder,
        "base org/tiny in the checkpoint, org/tiny-chat expected",
        base=base_identity("org/tiny-chat", LLM_CONFIG.to_dict()),
    )


def test_base_weights_are_told_apart_wherever_they_lie(tmp_path):
    config = LLM_CONFIG.to_dict()
    model = plain_llm()
    model.save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(tmp_path / "tuned")
    here, there, tuned = (base_identity(str(tmp_path / name), config) for name in ("here", "there", "tuned"))
    trained, optimizer = build()
    folder = save(tmp_path / "run", 0, trained, optimizer, base=here)
    load_checkpoint(folder, trained, optimizer, base=there)
    with pytest.raises(UserError, match="their model.safetensors differ"):
        load_checkpoint(folder, trained, optimizer, base=tuned)


def _expect_incomplete(root, pattern, model, optimizer):
    with pytest.raises(CheckpointError, match=pattern):
        save(root, 3, model, optimizer)
    assert [path.name for path in root.iterdir()] == ["step-00000002"]
    assert find_newest_valid(root) == root / "step-00000002"


def test_completeness_gate(tmp_path):
    model, optimizer = build()
    train(model, optimizer, 0, 2)
    save(tmp_path, 2, model, optimizer)
    bias = model.reasoner.au_head.bias
    bias.data[1] = float("nan")
    _expect_incomplete(tmp_path, r"reasoner.au_head.bias: 1 of 3 values are not finite", model, optimizer)
    bias.data[1] = 0
    lora = next(param for name, param in model.named_parameters() if "lora_A" in name)
    lora.data[0, 0] = float("inf")
    _expect_incomplete(tmp_path, r"lora_A.default.weight: 1 of 64 values are not finite", model, optimizer)
    lora.data[0, 0] = 0
    optimizer.state[bias]["exp_avg"][0] = float("nan")
    _expect_incomplete(tmp_path, r"au_head.bias.exp_avg: 1 of 3", model, optimizer)
    optimizer.state[bias]["exp_avg"] = torch.zeros(2)
    _expect_incomplete(tmp_path, r"au_head.bias.exp_avg: shape \(2,\) differs", model, optimizer)
    del optimizer.state[bias]["exp_avg"]
    _expect_incomplete(tmp_path, r"au_head.bias: optimizer state lacks \['exp_avg'\]", model, optimizer)
    optimizer.state.clear()
    _expect_incomplete(tmp_path, "no parameter has optimizer state after 3 steps", model, optimizer)


def test_completeness_gate_knows_what_ought_to_be_there(tmp_path, monkeypatch):
    model, optimizer = build()
    train(model, optimizer, 0, 2)
    save(tmp_path, 2, model, optimizer)
    model.late = nn.Parameter(torch.ones(1))
    _expect_incomplete(tmp_path, "late: trainable, but in 0 param groups", model, optimizer)
    del model.late
    shard = torch.nn.Parameter(torch.empty(0))
    model.strength, whole = shard, model.strength
    _expect_incomplete(tmp_path, "strength: size 0", model, optimizer)
    model.strength = whole
    plan = checkpoint_module.plan_tensors
    monkeypatch.setattr(checkpoint_module, "plan_tensors", lambda model: plan(model)[1:])
    _expect_incomplete(tmp_path, "strength: trainable, but in the checkpoint 0 times", model, optimizer)
    monkeypatch.setattr(checkpoint_module, "plan_tensors", lambda model: [*plan(model), plan(model)[0]])
    _expect_incomplete(tmp_path, "strength: trainable, but in the checkpoint 2 times", model, optimizer)


@pytest.mark.parametrize(
    "state", [{"best": float("nan")}, {"pair": (1, 2)}, {"by_fold": {1: 2}}, {"tensor": torch.ones(1)}]
)
def test_state_that_json_would_change_is_refused(tmp_path, state):
    model, optimizer = build()
    with pytest.raises(CheckpointError, match="trainer state"):
        save(tmp_path / "run", 0, model, optimizer, state=state)
    assert not (tmp_path / "run").exists()


def test_processes_that_do_not_write_touch_no_disk(tmp_path):
    model, optimizer = build()
    folder = save(tmp_path / "run", 7, model, optimizer, is_writer=False)
    assert folder == tmp_path / "run" / "step-00000007"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("target", ["save_file", "write_durably", "write_manifest"])
def test_full_disk_leaves_earlier_checkpoints_and_no_rest(two_checkpoints, tmp_path, monkeypatch, target):
    root = shutil.copytree(two_checkpoints, tmp_path / "run")
    model, optimizer = build()
    train(model, optimizer, 0, 3)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_module, target, full)
    with pytest.raises(CheckpointError, match="step-00000003 could not be written.*No space left"):
        save(root, 3, model, optimizer)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000001", "step-00000002"]


class Killed(BaseException):
    """The process is gone: from here on nothing reaches the disk, no clean-up either."""


def _kill_at(monkeypatch, operation: int) -> None:
    """Let the process die just before its `operation`-th change of the file system."""
    done = 0

    def guard(function):
        def guarded(*args, **kwargs):
            nonlocal done
            done += 1
            if done >= operation:
                raise Killed
            return function(*args, **kwargs)

        return guarded

    for module, name in ((os, "fsync"), (os, "rename"), (os, "mkdir"), (shutil, "rmtree")):
        monkeypatch.setattr(module, name, guard(getattr(module, name)))
    monkeypatch.setattr(checkpoint_module, "save_file", guard(checkpoint_module.save_file))


def test_save_killed_between_any_two_file_operations_loses_nothing(two_checkpoints, tmp_path, monkeypatch):
    """Saves step 2 again, so that the moments between the two renames of a replacement are among them."""
    model, optimizer = build()
    train(model, optimizer, 0, 2)
    marker = {"again": True}
    outcomes = []
    for operation in range(1, 100):
        root = shutil.copytree(two_checkpoints, tmp_path / f"run{operation}")
        shutil.rmtree(root / "step-00000001")
        with monkeypatch.context() as patch:
            _kill_at(patch, operation)
            try:
                save(root, 2, model, optimizer, state=marker)
                break
            except Killed:
                pass
        found = find_newest_valid(root)
        assert found is not None, operation
        fresh, fresh_optimizer = build(seed=1)
        outcomes.append(load_checkpoint(found, fresh, fresh_optimizer).get("again", False))
        assert snapshot(fresh, fresh_optimizer) == snapshot(model, optimizer)
        save(root, 3, fresh, fresh_optimizer)
        assert sorted(path.name for path in root.iterdir()) == ["step-00000002", "step-00000003"]
        assert verify_checkpoint(root / "step-00000002") == []
    assert len(outcomes) > 15
    assert outcomes == sorted(outcomes)
    assert {False, True} == set(outcomes)


def test_exception_during_a_save_leaves_no_folder(tmp_path, monkeypatch):
    model, optimizer = build()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 0, model, optimizer)
    assert list(tmp_path.iterdir()) == []


def test_damaged_checkpoint_of_the_same_step_is_replaced(two_checkpoints, tmp_path):
    root = shutil.copytree(two_checkpoints, tmp_path / "run")
    _flip(root / "step-00000002" / "optimizer.safetensors")
    model, optimizer = build()
    load_checkpoint(find_newest_valid(root), model, optimizer)
    train(model, optimizer, 1, 2)
    save(root, 2, model, optimizer)
    assert verify_checkpoint(root / "step-00000002") == []
    assert sorted(path.name for path in root.iterdir()) == ["step-00000001", "step-00000002"]


def test_rotation_keeps_the_newest_and_the_protected(tmp_path):
    model = NoLLM()
    for step in range(6):
        save(tmp_path, step, model, None, base=None)
    gone = rotate(tmp_path, 2, protect=[tmp_path / "step-00000001"])
    assert [path.name for path in gone] == ["step-00000000", "step-00000002", "step-00000003"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001", "step-00000004", "step-00000005"]
    assert rotate(tmp_path, 9) == []
    with pytest.raises(UserError, match="allowed is 1 or more"):
        rotate(tmp_path, 0)


def test_rotation_never_deletes_the_last_valid_checkpoint(tmp_path):
    model = NoLLM()
    for step in range(4):
        save(tmp_path, step, model, None, base=None)
    for step in (2, 3):
        _flip(tmp_path / f"step-0000000{step}" / "aullm_modules.safetensors")
    assert [path.name for path in rotate(tmp_path, 2)] == ["step-00000000"]
    assert find_newest_valid(tmp_path) == tmp_path / "step-00000001"


def test_rotation_that_cannot_delete_only_warns(tmp_path, monkeypatch, caplog):
    for step in range(3):
        save(tmp_path, step, NoLLM(), None, base=None)

    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "rename", refuse)
    monkeypatch.setattr(logging.getLogger("aullm_dist"), "propagate", True)  # another test may have set logging up
    with caplog.at_level(logging.WARNING, "aullm_dist"):
        assert rotate(tmp_path, 2) == []
    assert len(list_checkpoints(tmp_path)) == 3
    assert "step-00000000 could not be deleted: Permission denied" in caplog.text


def test_prefix_that_is_not_the_peft_model_is_a_mistake_of_ours(tmp_path):
    class Misnamed(TinyModel):
        adapter_prefix = "reasoner"

    torch.manual_seed(0)
    with pytest.raises(TypeError, match="adapter_prefix"):
        save(tmp_path, 0, Misnamed(), None)
