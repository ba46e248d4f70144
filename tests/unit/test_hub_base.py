"""A base LLM that was given by its name on the Hub: which commit and which weights it was."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from aullm_dist.checkpoint.base_identity import base_differences, base_identity
from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import load_backbone
from aullm_dist.llm.files import local_folder, present_folder
from aullm_dist.llm.identity import BaseIdentity

NAME, OLD, NEW = "lab/tiny", "0" * 40, "1" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The Hub's cache, empty, without a way to the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "models--lab--tiny"


def publish(cache, llm, commit: str):
    folder = cache / "snapshots" / commit
    shutil.copytree(llm, folder)
    (cache / "refs").mkdir(exist_ok=True)
    (cache / "refs" / "main").write_text(commit)
    return folder


def identity() -> BaseIdentity:
    return base_identity(NAME, {}, present_folder(NAME))


def test_what_is_not_here_is_not_fetched(cache):
    assert present_folder(NAME) is None
    assert (identity().revision, identity().files) == (None, {})
    with pytest.raises(UserError, match="lab/tiny: cannot be loaded"):
        local_folder(NAME)


def test_a_new_commit_of_the_same_weights_is_the_same_base(cache, tiny_llm):
    assert present_folder(tiny_llm) == tiny_llm
    folder = publish(cache, tiny_llm, OLD)
    before = identity()
    assert present_folder(NAME) == local_folder(NAME) == folder
    assert before.revision == OLD
    assert before.files == base_identity(str(tiny_llm), {}, tiny_llm).files
    publish(cache, tiny_llm, NEW)
    assert identity().revision == NEW
    assert base_differences(before, identity()) == []


def test_a_commit_with_other_weights_is_another_base(cache, tiny_llm):
    publish(cache, tiny_llm, OLD)
    before = identity()
    file = publish(cache, tiny_llm, NEW) / "model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values())).mul_(1.01)
    save_file(tensors, file, metadata={"format": "pt"})
    assert "their model.safetensors differ" in base_differences(before, identity())[0]


def test_weights_of_other_tools_do_not_count(cache, tiny_llm):
    folder = publish(cache, tiny_llm, OLD)
    before = identity()
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert identity() == before


def test_weights_that_are_pickles_alone_are_refused(cache, tiny_llm):
    """The library would load them, and nothing else here would: not even the fingerprint."""
    folder = publish(cache, tiny_llm, OLD)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    assert load_backbone(NAME).hidden_size == 32, "beside safetensors files they are nothing"
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"backbone lab/tiny: holds its weights in pytorch_model.bin alone, a pickle"):
        load_backbone(NAME)
