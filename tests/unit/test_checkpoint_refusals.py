"""Checkpoints that are damaged, of another model or incomplete are refused by name."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_samples import (
    AUS,
    BASE,
    FILES,
    LLM_CONFIG,
    MODEL_CONFIG,
    build,
    flip,
    load_checkpoint,
    plain_llm,
    save,
    snapshot,
    train,
)
from torch import nn

from aullm_dist.checkpoint import store as checkpoint_module
from aullm_dist.checkpoint.base_identity import base_identity
from aullm_dist.checkpoint.compatibility import ExpectedModel, StoredModel, refuse_other_model
from aullm_dist.checkpoint.retention import find_newest_valid, list_checkpoints
from aullm_dist.errors import CheckpointError, UserError


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def _grow(path):
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGES = {"missing": lambda path: path.unlink(), "truncated": _truncate, "altered": flip, "too long": _grow}


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
        flip(folder / "trainer_state.json")
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


def test_a_checkpoint_older_than_a_setting_had_its_default(two_checkpoints):
    model, optimizer = build(seed=1)
    newer = {**MODEL_CONFIG, "evidence": "full"}
    assert load_checkpoint(two_checkpoints / "step-00000002", model, optimizer, model_config=newer, base=BASE)


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
        folder, "visual is 'led' in the checkpoint, 'flow' expected", model_config={**MODEL_CONFIG, "visual": "flow"}
    )
    _expect_refusal(
        folder,
        "evidence is 'full' in the checkpoint, 'mid_only'",
        model_config={**MODEL_CONFIG, "evidence": "mid_only"},
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
        base=base_identity("org/tiny", other_config, None),
    )
    _expect_refusal(
        folder,
        "base org/tiny in the checkpoint, org/tiny-chat expected",
        base=base_identity("org/tiny-chat", LLM_CONFIG.to_dict(), None),
    )


def test_base_weights_are_told_apart_wherever_they_lie(tmp_path):
    config = LLM_CONFIG.to_dict()
    model = plain_llm()
    model.save_pretrained(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    model.model.norm.weight.data[0] += 1
    model.save_pretrained(tmp_path / "tuned")
    here, there, tuned = (
        base_identity(str(tmp_path / name), config, tmp_path / name) for name in ("here", "there", "tuned")
    )
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


def test_other_aus_are_named_first_and_no_more_than_five_differences():
    saved = {"aus": [1, 2], "alpha": 1, "beta": 2, "gamma": 3, "delta": 4, "epsilon": 5}
    wanted = {"aus": [1, 4], "alpha": 2, "beta": 3, "gamma": 4, "delta": 5, "zeta": 6}
    stored = StoredModel(tensors={}, config=saved, base=None)
    with pytest.raises(UserError) as caught:
        refuse_other_model(
            Path("step-1"), stored, ExpectedModel(plan=(), config=wanted, base=None), with_optimizer=True
        )
    text = str(caught.value)
    assert text.startswith("checkpoint step-1 is of another model: aus is [1, 2] in the checkpoint, [1, 4] expected; ")
    assert text.endswith("epsilon is 5 in the checkpoint, None expected; and 2 more")
    five = ExpectedModel(plan=(), config={**wanted, "gamma": 3, "zeta": None}, base=None)
    with pytest.raises(UserError, match=r"epsilon is 5 in the checkpoint, None expected$"):
        refuse_other_model(Path("step-1"), stored, five, with_optimizer=True)
    refuse_other_model(Path("step-1"), stored, ExpectedModel(plan=(), config=saved, base=None), with_optimizer=True)
