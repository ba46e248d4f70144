import argparse
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from aullm_dist.checkpoint import manifest as manifest_module
from aullm_dist.checkpoint.entries import FileEntry, ManifestFacts, ParameterEntry, TensorEntry
from aullm_dist.checkpoint.manifest import (
    extra_files,
    read_manifest,
    tensor_table,
    verify_checkpoint,
    write_manifest,
    write_signed,
)
from aullm_dist.commands.checkpoint import add_arguments, run
from aullm_dist.errors import UserError
from aullm_dist.llm.identity import BaseIdentity, WeightFile

TENSORS = {"b.weight": np.zeros((2, 3), np.float32), "a": np.arange(5, dtype=np.int64), "s": np.ones((), np.float16)}


def make_checkpoint(root, step=120, config=None):
    folder = root / f"step-{step:08d}"
    folder.mkdir(parents=True)
    save_file(TENSORS, folder / "aullm_modules.safetensors")
    (folder / "trainer_state.json").write_text('{"step": 120}')
    write_manifest(folder, step=step, world_size=2, facts=ManifestFacts(config=config or {}))
    return folder


def test_manifest_describes_files_and_tensors(tmp_path):
    folder = make_checkpoint(tmp_path, config={"seed": 1})
    manifest = read_manifest(folder)
    assert manifest.format_version == 1
    assert (manifest.step, manifest.world_size, manifest.config) == (120, 2, {"seed": 1})
    assert manifest.tensors == {
        "aullm_modules.safetensors": {
            "a": TensorEntry("I64", (5,)),
            "b.weight": TensorEntry("F32", (2, 3)),
            "s": TensorEntry("F16", ()),
        }
    }
    assert manifest.files.keys() == {"aullm_modules.safetensors", "trainer_state.json"}
    assert manifest.files["trainer_state.json"] == FileEntry(
        13, "886213fa78e374e38b1705f610776df6b9ad01cc6468068373479d972044af94"
    )
    assert manifest.versions["python"].startswith("3.")
    assert verify_checkpoint(folder) == verify_checkpoint(folder, "size") == []


def test_a_manifest_is_written_as_it_was_read(tmp_path):
    """The keys and their order as version 1 of the format has them; a file of an older run comes back byte for byte."""
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    save_file(TENSORS, folder / "aullm_modules.safetensors")
    weights = {"a.safetensors": WeightFile(7, "5a" * 32), "b.safetensors": WeightFile(8, "5b" * 32, sha256="b0" * 32)}
    facts = ManifestFacts(
        parameters={"b": ParameterEntry(file="f", key="k", trainable=True, optimizer=("exp_avg", "master"))},
        quantized_modules=("layers.0.q_proj",),
        base=BaseIdentity(name="org/llm", revision="c0ffee", config_sha256="cf" * 32, files=weights),
        config={"training": {"seed": 0}},
    )
    write_manifest(folder, step=3, world_size=2, facts=facts)
    content = json.loads((folder / "MANIFEST.json").read_bytes())
    assert list(content) == [
        *("format", "format_version", "step", "world_size", "versions", "files", "tensors", "parameters"),
        *("quantized_modules", "base", "config", "manifest_sha256"),
    ]
    assert content["parameters"] == {
        "b": {"file": "f", "key": "k", "trainable": True, "optimizer": ["exp_avg", "master"]}
    }
    assert content["quantized_modules"] == ["layers.0.q_proj"]
    assert content["base"] == {
        "name": "org/llm",
        "revision": "c0ffee",
        "config_sha256": "cf" * 32,
        "files": {
            "a.safetensors": {"size": 7, "sample_sha256": "5a" * 32},
            "b.safetensors": {"size": 8, "sample_sha256": "5b" * 32, "sha256": "b0" * 32},
        },
    }
    assert content["tensors"]["aullm_modules.safetensors"]["b.weight"] == {"dtype": "F32", "shape": [2, 3]}
    manifest = read_manifest(folder)
    write_signed(tmp_path / "again.json", manifest.to_json())
    assert (tmp_path / "again.json").read_bytes() == (folder / "MANIFEST.json").read_bytes()
    assert manifest.manifest_sha256 == content["manifest_sha256"]


def test_a_signed_manifest_that_lacks_an_entry_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path)
    content = read_manifest(folder).to_json()
    del content["parameters"]
    write_signed(folder / "MANIFEST.json", content)
    with pytest.raises(UserError, match="lacks the entry 'parameters'"):
        read_manifest(folder)


def test_every_flipped_bit_of_the_manifest_shows(tmp_path):
    # A config that imitates the signature, and a number with two spellings (1e-05, 1E-05).
    folder = make_checkpoint(tmp_path, config={"manifest_sha256": "0" * 64, "lr": 1e-05})
    path = folder / "MANIFEST.json"
    content = path.read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        path.write_bytes(flipped)
        with pytest.raises(UserError, match=r"MANIFEST\.json: (altered|truncated)"):
            read_manifest(folder)
    path.write_bytes(content.replace(b"1e-05", b"1E-05"))
    assert "altered" in verify_checkpoint(folder)[0]


def test_every_truncation_of_the_manifest_shows(tmp_path):
    folder = make_checkpoint(tmp_path)
    path = folder / "MANIFEST.json"
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert "truncated" in verify_checkpoint(folder)[0]


def test_all_problems_are_listed(tmp_path):
    folder = make_checkpoint(tmp_path)
    (folder / "trainer_state.json").unlink()
    weights = folder / "aullm_modules.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert verify_checkpoint(folder) == [
        f"{weights}: truncated ({weights.stat().st_size} bytes, the manifest says {weights.stat().st_size + 1})",
        f"{folder / 'trainer_state.json'}: missing",
    ]


def test_size_mode_reads_headers_but_not_data(tmp_path):
    folder = make_checkpoint(tmp_path)
    path = folder / "aullm_modules.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert verify_checkpoint(folder, "size") == []
    assert "SHA-256" in verify_checkpoint(folder, "hash")[0]
    path.write_bytes(content.replace(b"b.weight", b"c.weight"))
    assert "its tensors differ" in verify_checkpoint(folder, "size")[0]
    path.write_bytes(b"\xff" * len(content))
    assert "header cannot be read" in verify_checkpoint(folder, "size")[0]
    path.write_bytes(content[:8] + b"[" + content[9:])
    assert "header cannot be read" in verify_checkpoint(folder, "size")[0]


def test_file_replaced_by_a_folder_is_missing(tmp_path):
    folder = make_checkpoint(tmp_path)
    (folder / "trainer_state.json").unlink()
    (folder / "trainer_state.json").mkdir()
    assert verify_checkpoint(folder) == [f"{folder / 'trainer_state.json'}: missing"]


def test_renamed_copy_does_not_pass_for_a_newer_step(tmp_path):
    folder = make_checkpoint(tmp_path)
    copy = shutil.copytree(folder, tmp_path / "step-00000130")
    assert verify_checkpoint(copy) == [f"{copy}: the folder's name says step 130, its manifest 120"]
    assert verify_checkpoint(shutil.copytree(folder, tmp_path / "best")) == []


def test_other_formats_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest_module, "FORMAT_VERSION", 2)
    newer = make_checkpoint(tmp_path / "newer")
    monkeypatch.setattr(manifest_module, "FORMAT_NAME", "something else")
    foreign = make_checkpoint(tmp_path / "foreign")
    monkeypatch.undo()
    assert "format_version is 2, written by a newer aullm-dist; this one reads up to 1" in verify_checkpoint(newer)[0]
    assert "format is 'something else'" in verify_checkpoint(foreign)[0]


def test_tensor_table_of_something_else(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not a safetensors file"):
        tensor_table(path)


def test_extra_files_are_named_but_do_no_harm(tmp_path):
    folder = make_checkpoint(tmp_path)
    (folder / "notes.txt").write_text("good run")
    (folder / ".nfs0001").write_text("")
    assert verify_checkpoint(folder) == []
    assert extra_files(folder) == ["notes.txt"]


def _verify(*words):
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(parser.parse_args(["verify", *map(str, words)]))


def test_command_on_one_checkpoint(tmp_path, capsys):
    folder = make_checkpoint(tmp_path)
    (folder / "notes.txt").write_text("")
    assert _verify(folder) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"valid   {folder}  step 120, 3 tensors")
    assert "notes.txt is not part of the checkpoint" in out
    (folder / "trainer_state.json").write_text('{"step": 121}')
    assert _verify(folder, "--mode", "size") == 0
    capsys.readouterr()
    assert _verify(folder) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"DAMAGED {folder}",
        f"  {folder / 'trainer_state.json'}: altered (its SHA-256 differs from the manifest's)",
    ]
    (folder / "MANIFEST.json").unlink()
    assert _verify(folder) == 1
    assert "MANIFEST.json: missing" in capsys.readouterr().out


@pytest.mark.parametrize("level", ["", "fold-00", "fold-00/checkpoints"])
def test_command_on_a_run(tmp_path, capsys, level):
    make_checkpoint(tmp_path / "fold-00" / "checkpoints", 1)
    bad = make_checkpoint(tmp_path / "fold-00" / "checkpoints", 2)
    (bad / "trainer_state.json").unlink()
    assert _verify(tmp_path / level) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["valid", "DAMAGED"]


def test_command_where_there_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        _verify(tmp_path / "typo")
    with pytest.raises(UserError, match="holds no checkpoint"):
        _verify(tmp_path)


def test_verifying_needs_no_torch():
    code = "import sys, aullm_dist.commands.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_manifest_is_plain_json(tmp_path):
    folder = make_checkpoint(tmp_path)
    content = json.loads((folder / "MANIFEST.json").read_text())
    assert list(content)[-1] == "manifest_sha256"
