"""The tiny backbones: deterministic files that load like any other, every architecture that packs, its windows."""

from typing import get_args, get_type_hints

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from aullm_dist.config.schema import ModelConfig
from aullm_dist.data.corpora import CORPORA
from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.llm.tiny import ARCHITECTURES, WINDOW, build_tiny_backbone
from aullm_dist.model.prompt import build_prompt
from aullm_dist.packing.forward import decoder_of
from aullm_dist.packing.masks import MASK_RECIPES

SIZES = {"hidden": 32, "layers": 2, "heads": 2}
SLIDING = {"mistral": [True, True], "gemma2": [True, False], "gemma3": [True, False]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {name: build_tiny_backbone(root / name, architecture=name, **SIZES) for name in ARCHITECTURES}


def hidden_states(folder, **changes):
    """Run the library's own eager model, with changed settings, on 3 windows of random input."""
    config = AutoConfig.from_pretrained(folder)
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager").eval()
    embeds = torch.randn(1, 3 * WINDOW, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.model(inputs_embeds=embeds).last_hidden_state[0]


def test_every_architecture_that_packs_can_be_asked_for(folders):
    asked = get_args(get_type_hints(ModelConfig)["llm_architecture"])
    assert asked == ARCHITECTURES
    assert {AutoConfig.from_pretrained(folder).model_type for folder in folders.values()} == set(MASK_RECIPES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_deterministic_and_reused(folders, tmp_path, architecture):
    one, two = folders[architecture], build_tiny_backbone(tmp_path / "two", architecture=architecture, **SIZES)
    names = sorted(file.name for file in one.iterdir())
    assert names == sorted(file.name for file in two.iterdir())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    written = (two / "model.safetensors").stat().st_mtime_ns
    assert build_tiny_backbone(two, architecture=architecture, **SIZES) == two
    assert (two / "model.safetensors").stat().st_mtime_ns == written
    build_tiny_backbone(two, architecture=architecture, seed=1, **SIZES)
    assert (one / "model.safetensors").read_bytes() != (two / "model.safetensors").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["two"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_like_any_other_backbone(folders, architecture):
    backbone = load_backbone(folders[architecture], BackboneOptions(lora_rank=2))
    assert decoder_of(backbone.model).config.hidden_size == 32
    tokenizer = AutoTokenizer.from_pretrained(folders[architecture])
    begins_with_bos = tokenizer("AU1").input_ids[0] == tokenizer.convert_tokens_to_ids("<s>")
    assert begins_with_bos == (architecture not in ("qwen2", "qwen3"))
    # Otherwise the windows would have nothing to hide.
    assert build_prompt(CORPORA["casme2"].aus, tokenizer).prefix_tokens > 2 * WINDOW


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_windows_matter_where_the_released_model_has_them(folders, architecture):
    config = AutoConfig.from_pretrained(folders[architecture])
    # Mistral has no layer types: all slide if there is a window.
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or [("sliding" if window else "full") + "_attention"] * 2
    assert [name == "sliding_attention" for name in types] == SLIDING.get(architecture, [False, False])
    if architecture not in SLIDING:
        return
    moved = hidden_states(folders[architecture]) - hidden_states(folders[architecture], sliding_window=4 * WINDOW)
    assert moved[:WINDOW].abs().max() < 1e-5
    assert moved[WINDOW:].abs().amax(-1).min() > 1e-3


def test_gemma3_slides_in_all_layers_but_every_sixth_and_the_last(tmp_path):
    for layers, full in ((1, []), (4, [3]), (8, [5, 7]), (12, [5, 11])):
        sizes = SIZES | {"layers": layers}
        config = AutoConfig.from_pretrained(build_tiny_backbone(tmp_path, architecture="gemma3", **sizes))
        assert [layer for layer, name in enumerate(config.layer_types) if name == "full_attention"] == full


def test_the_soft_cap_of_gemma2_and_the_biases_of_qwen2_are_felt(folders):
    moved = hidden_states(folders["gemma2"]) - hidden_states(folders["gemma2"], attn_logit_softcapping=50.0)
    assert moved.abs().max() > 1e-2
    model = AutoModelForCausalLM.from_pretrained(folders["qwen2"])
    biases = [value for name, value in model.named_parameters() if name.endswith(".bias")]
    assert len(biases) == 6
    assert all(bias.abs().max() > 0.01 for bias in biases)


def test_keeps_its_hands_off_other_folders(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        build_tiny_backbone(tmp_path)
    with pytest.raises(
        UserError, match="architecture is 'gpt2'; allowed: llama, qwen2, qwen3, mistral, gemma2, gemma3"
    ):
        build_tiny_backbone(tmp_path / "new", architecture="gpt2")
    with pytest.raises(UserError, match=r"hidden a multiple of 2 \* heads"):
        build_tiny_backbone(tmp_path / "new", hidden=30)
