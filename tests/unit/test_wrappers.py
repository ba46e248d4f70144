"""Text decoders inside multimodal checkpoints: the wrapper's own function, and the same files as the decoder alone."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from merge_samples import checkpoint_of
from safetensors.torch import load_file
from tiny_wrappers import WRAPPERS, write_wrapper
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from aullm_dist.checkpoint.base_identity import base_identity
from aullm_dist.cli import main
from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.llm.files import load_config
from aullm_dist.llm.stored.quantize import quantize_base
from aullm_dist.llm.stored.weight_files import WeightFiles
from aullm_dist.llm.stored.wrappers import decoder_names, wrapper_type
from aullm_dist.merge.merge import merge_llm

COMMON = {"trust_remote_code": False, "local_files_only": True}
OPTIONS = BackboneOptions(lora_rank=2)
IDS = torch.arange(3, 20)[None]


@dataclass(frozen=True)
class Case:
    name: str
    folder: Path
    """Of the wrapper."""
    alone: Path
    """Of its text decoder, extracted."""
    model: PreTrainedModel


@pytest.fixture(scope="module", params=WRAPPERS)
def case(request, tiny_llm, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    model = write_wrapper(root / "wrapper", request.param, tiny_llm)
    assert main(["backbone", "extract", str(root / "wrapper"), "--out", str(root / "alone")]) == 0
    return Case(request.param, root / "wrapper", root / "alone", model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_tensors(found: Path, expected: Path) -> None:
    these, those = tensors_of(found), tensors_of(expected)
    assert these.keys() == those.keys()
    # As bytes: packed weights hold bit patterns that are no numbers.
    differing = [
        name for name in these if not torch.equal(*(t[name].view(-1).view(torch.uint8) for t in (these, those)))
    ]
    assert differing == []


def test_the_wrappers_own_logits(case):
    """Bit for bit, from the wrapper's files and from those of the extracted decoder, which stock transformers loads."""
    expected = logits(case.model)
    assert torch.equal(logits(load_backbone(case.folder, OPTIONS).model), expected)
    stock = AutoModelForCausalLM.from_pretrained(case.alone, dtype=torch.float32)
    assert stock.config.model_type == WRAPPERS[case.name][2]
    assert torch.equal(logits(stock), expected)
    assert not any("vision" in name or "visual" in name for name in WeightFiles(case.alone).tensors)


def test_nothing_is_reported_of_the_towers(case, capsys, caplog):
    backbone = load_backbone(case.folder, OPTIONS)
    assert f"{WRAPPERS[case.name][2]} inside {case.name} from" in backbone.reasons["backbone"]
    heard = "".join(capsys.readouterr()) + caplog.text
    assert "vision" not in heard
    assert "UNEXPECTED" not in heard


def test_quantised_as_the_decoder_alone(case, tmp_path):
    quantize_base(case.folder, tmp_path / "inside")
    quantize_base(case.alone, tmp_path / "alone")
    assert_same_tensors(tmp_path / "inside", tmp_path / "alone")
    config = AutoConfig.from_pretrained(tmp_path / "inside")
    assert config.model_type == WRAPPERS[case.name][2]
    load_backbone(tmp_path / "inside", BackboneOptions(lora_rank=2, quantization="nf4"))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_merged_into_a_decoder_that_stock_transformers_loads(case, tmp_path, quantization):
    options = BackboneOptions(lora_rank=2, quantization=quantization)
    for which in ("wrapper", "alone"):
        folder = case.folder if which == "wrapper" else case.alone
        backbone = load_backbone(folder, options)
        checkpoint = checkpoint_of(tmp_path / f"run-{which}", backbone, folder)
        receipt = merge_llm(checkpoint, tmp_path / which, dtype=torch.float32)
        assert receipt.merged > 0
    assert_same_tensors(tmp_path / "wrapper", tmp_path / "alone")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "wrapper", dtype=torch.float32)
    assert merged.config.model_type == WRAPPERS[case.name][2]
    expected = logits(backbone.model)
    assert ((logits(merged) - expected).norm() / expected.norm()).item() < 1e-5


def test_the_fingerprint_names_the_wrapper(case):
    config = load_config(str(case.folder), COMMON)
    found = base_identity(str(case.folder), config.to_dict(), case.folder)
    assert found.wrapper == case.name
    assert type(found).from_json(found.to_json()) == found
    alone = base_identity(str(case.alone), config.to_dict(), case.alone)
    assert alone.wrapper is None
    assert "wrapper" not in alone.to_json()


def test_what_is_no_decoder_inside_is_refused(case, tmp_path, capsys):
    assert main(["backbone", "extract", str(case.alone), "--out", str(tmp_path / "out")]) == 2
    assert "is a text decoder by itself" in capsys.readouterr().err
    assert main(["backbone", "extract", str(case.folder), "--out", str(case.alone)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["backbone", "extract", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "no config.json" in capsys.readouterr().err


def test_a_text_model_that_is_no_causal_lm_is_refused(tmp_path):
    """GLM-V's decoder has a class of its own that no stock causal LM loads."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm4v"}))
    with pytest.raises(UserError, match="'glm4v_text' is no causal language model of transformers by itself") as caught:
        load_config(str(tmp_path), COMMON)
    assert "\n" not in str(caught.value)


def test_a_wrapper_without_its_decoder_is_refused(case, tmp_path):
    config = load_config(str(case.folder), COMMON)
    with pytest.raises(UserError, match="holds no text decoder of type"):
        decoder_names(["model.visual.patch_embed.weight"], config, "x")
    assert wrapper_type(tmp_path) is None


def test_the_whole_wrapper_is_what_was_saved(case):
    """The tests' own wrapper: its files hold towers besides the decoder."""
    again = AutoModelForImageTextToText.from_pretrained(case.folder, dtype=torch.float32)
    assert torch.equal(logits(again), logits(case.model))
    assert any("vision" in name or "visual" in name for name in WeightFiles(case.folder).tensors)
