"""`aullm-dist quantize`: stock transformers loads bit for bit what bitsandbytes makes, and nothing half is left."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_pieces import assert_same
from tiny_architectures import write_backbone
from tiny_backbones import write_any
from transformers import AutoModelForCausalLM, AutoTokenizer

from aullm_dist.cli import main
from aullm_dist.errors import UserError
from aullm_dist.llm.quantization import nf4_config
from aullm_dist.llm.stored import quantize as module


@pytest.fixture(scope="module")
def base(tiny_llm, tmp_path_factory):
    """Return a function that gives the folder of an architecture."""
    root = tmp_path_factory.mktemp("bases")

    def give(name: str):
        return root / name if (root / name).exists() else write_backbone(root / name, name, tiny_llm)

    return give


def quantize(base, out) -> int:
    return main(["quantize", str(base), "--out", str(out)])


def refusal(base, out, capsys) -> str:
    capsys.readouterr()
    assert quantize(base, out) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("file_bytes", [2**31, 20000], ids=["one_file", "several"])
@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("gemma2", True), ("qwen2", False)])
def test_the_library_loads_what_it_would_quantise_itself(base, tmp_path, monkeypatch, name, tied, file_bytes):
    monkeypatch.setattr(module, "_FILE_BYTES", file_bytes)
    # Chunks that end inside a weight.
    monkeypatch.setattr("aullm_dist.llm.pieces.loading.WEIGHTS_AT_ONCE", 5 * 64)
    assert quantize(base(name), tmp_path / "out") == 0
    expected = AutoModelForCausalLM.from_pretrained(
        base(name), dtype=torch.bfloat16, quantization_config=nf4_config(torch.bfloat16)
    )
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_same(expected, found)
    heads = [model.get_output_embeddings().weight for model in (expected, found)]
    assert torch.equal(*heads)
    assert heads[1].dtype == torch.bfloat16
    stored = [key for file in (tmp_path / "out").glob("*.safetensors") for key in load_file(file)]
    assert len(stored) == len(set(stored))
    assert ("lm_head.weight" in stored) is not tied
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (file_bytes < 2**31)
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (base(name), tmp_path / "out")]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()


def test_a_checkpoint_that_was_split_and_stored_in_float32(base, tmp_path):
    folder = tmp_path / "split"
    shutil.copytree(base("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = {f"{part}.safetensors": sorted(tensors)[part::2] for part in (0, 1)}
    for file, keys in halves.items():
        save_file({key: tensors[key].float() for key in keys}, folder / file)
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for source in ("split", "whole"):
        assert quantize(folder if source == "split" else base("llama"), tmp_path / source / "out") == 0
    one, other = (load_file(tmp_path / source / "out" / "model.safetensors") for source in ("split", "whole"))
    assert one.keys() == other.keys()
    # As bytes: packed weights that are read as bfloat16 may be no numbers.
    assert all(torch.equal(*(t[key].flatten().view(torch.uint8) for t in (one, other))) for key in one)


def test_what_cannot_be_quantised(base, tmp_path, capsys):
    out = tmp_path / "out"
    assert quantize(base("llama"), out) == 0
    assert "exists already" in refusal(base("llama"), out, capsys)
    assert "quantised already, by bitsandbytes NF4" in refusal(out, tmp_path / "twice", capsys)
    assert "no local model folder" in refusal("Qwen/Qwen3-8B", tmp_path / "twice", capsys)
    for change, message in (({"model_type": "bert"}, "no decoder"), ({"model_type": "nonesuch"}, "cannot be loaded")):
        other = tmp_path / message
        shutil.copytree(base("llama"), other)
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | change))
        assert message in refusal(other, tmp_path / "twice", capsys)
    short = tmp_path / "short"
    shutil.copytree(base("llama"), short)
    tensors = load_file(short / "model.safetensors")
    head = tensors.pop("lm_head.weight")
    save_file(tensors, short / "model.safetensors")
    assert quantize(short, tmp_path / "headless") == 0, "no command calls the head"
    assert "lm_head.weight" not in load_file(tmp_path / "headless" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors | {"lm_head.weight": head}, short / "model.safetensors")
    assert "first model.norm.weight" in refusal(short, tmp_path / "twice", capsys)
    assert sorted(path.name for path in tmp_path.glob("*twice*")) == []


def test_a_full_disk_is_told_before_anything_is_written(base, tmp_path, capsys, monkeypatch):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10_000_000 if folder == tmp_path else 0))
    monkeypatch.setattr(module, "_STATE_BYTES", 2_000_000)
    line = refusal(base("llama"), tmp_path / "deep" / "out", capsys)
    assert "needs 0.03 GB" in line  # 14 layers of 2 MB
    assert "0.01 GB are free" in line
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_of_a_run_that_fails(base, tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "No space left on device" in refusal(base("llama"), tmp_path / "out", capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_type_that_the_library_makes_another_of_once_it_is_quantised(tiny_llm, tmp_path):
    """Llama 4's fused experts become layers of their own in whatever loads such a folder."""
    write_any(tmp_path / "llm", "llama4_text", tiny_llm)
    with pytest.raises(UserError, match=r"loads Llama4TextExperts \(model.layers.0.feed_forward.experts\)"):
        module.quantize_base(tmp_path / "llm", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
