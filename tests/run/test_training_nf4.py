"""A run on an NF4 base: what its checkpoints say, that it resumes exactly, and that no other base takes them."""

import json
import shutil

import pytest
import torch
from training_runs import checkpoint_tensors, interrupted, logits, newest_checkpoint, overrides, train_here


@pytest.fixture(scope="module")
def finished(small_dataset, tiny_llm, tmp_path_factory):
    """Four steps with an evaluation after each: an evaluation used to end learning on some CPUs."""
    run = tmp_path_factory.mktemp("nf4") / "run"
    settings = overrides(
        small_dataset, tiny_llm, run, training__max_steps=4, training__save_every_steps=2, training__epochs=9,
        training__global_batch=16, training__micro_batch=16, model__quantization="nf4",
    )  # fmt: skip
    assert train_here(*settings) == 0
    return run, settings


def test_the_checkpoint_names_the_quantised_layers(finished):
    manifest = json.loads((newest_checkpoint(finished[0]) / "MANIFEST.json").read_text())
    names = manifest["quantized_modules"]
    assert len(names) == 14
    assert "model.layers.0.self_attn.q_proj" in names


def test_a_resumed_run_is_bit_identical(finished, tmp_path):
    run, settings = finished
    resumed = interrupted(run, tmp_path / "run")
    assert newest_checkpoint(resumed).name == "step-00000002"
    assert train_here(*settings, f"training.output={resumed}", "--resume", "auto") == 0
    expected, found = (checkpoint_tensors(newest_checkpoint(folder)) for folder in (run, resumed))
    assert expected.keys() == found.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert logits(run) == logits(resumed)


def test_a_checkpoint_on_nf4_is_not_loaded_onto_the_unquantised_base(
    finished, small_dataset, tiny_llm, tmp_path, capsys
):
    other = tmp_path / "run"
    settings = overrides(small_dataset, tiny_llm, other, training__max_steps=1)
    assert train_here(*settings) == 0
    shutil.rmtree(other / "fold-00" / "checkpoints")
    shutil.copytree(finished[0] / "fold-00" / "checkpoints", other / "fold-00" / "checkpoints")
    capsys.readouterr()
    assert train_here(*settings, "--resume", "auto") == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "quantization is 'nf4' in the checkpoint, 'none'" in message
