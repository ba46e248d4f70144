"""Layers that the files hold as rows of larger tensors, or in several: merged where they stand, or refused in time."""

import json

import pytest
import torch
from merge_samples import checkpoint_of, peft_merged
from safetensors.torch import load_file, save_file
from tiny_architectures import write_backbone
from tiny_backbones import write_any
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Chunk, Concatenate, Transpose, WeightConverter

from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.llm.pieces.placement import Alone
from aullm_dist.llm.stored import conversion
from aullm_dist.merge.merge import merge_llm

FUSED = ("gate_up_proj.weight", "gqkv_proj.weight")
"""What HRM's files hold, of which the library makes two and four layers."""


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_rows_of_a_fused_tensor_become_what_was_trained(tiny_llm, tmp_path, quantization):
    folder = tmp_path / "llm"
    write_any(folder, "hrm_text", tiny_llm, intermediate_size=128)
    options = BackboneOptions(lora_rank=2, quantization=quantization, packing=False, attention="eager")
    backbone = load_backbone(folder, options)
    checkpoint = checkpoint_of(tmp_path / "run", backbone, folder)
    receipt = merge_llm(checkpoint, tmp_path / "merged", dtype=torch.float32, probe=["Action units"])
    before, after = (load_file(place / "model.safetensors") for place in (folder, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert sum(name.endswith(FUSED) for name in changed) == sum(name.endswith(FUSED) for name in before) > 0
    assert receipt.merged == len(changed)
    assert receipt.tensors == len(before)
    trained = "nf4-exact" if quantization == "nf4" else "bf16"
    assert receipt.probe["relative_logit_error"][trained] < 1e-5
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32, attn_implementation="eager")
    ids = torch.randint(3, 90, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        live, found = (model.eval()(input_ids=ids, use_cache=False).logits for model in (backbone.model, merged))
    assert ((found - live).norm() / live.norm()).item() < 1e-5


CONVERTERS = {
    "several": lambda: WeightConverter(
        ["q_upper.weight", "q_lower.weight"], "q_proj.weight", [Concatenate(dim=0)]
    ),
    "rows": lambda: WeightConverter(
        "qkv.weight", ["q_proj.weight", "k_proj.weight", "v_proj.weight"], [Chunk(dim=0)]
    ),
    "columns": lambda: WeightConverter(["q_left.weight", "q_right.weight"], "q_proj.weight", [Concatenate(dim=1)]),
    "turned": lambda: WeightConverter("q_turned.weight", "q_proj.weight", [Transpose(0, 1)]),
}  # fmt: skip


def stored_as(kind: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a plain folder as one that needs a converter holds them."""
    found = {}
    for name, tensor in tensors.items():
        start = name.removesuffix("q_proj.weight")
        if kind == "rows" and name.endswith(("k_proj.weight", "v_proj.weight")):
            continue
        if not name.endswith("q_proj.weight"):
            found[name] = tensor
        elif kind == "turned":
            found[f"{start}q_turned.weight"] = tensor.T.contiguous()
        elif kind == "rows":
            found[f"{start}qkv.weight"] = torch.cat([tensors[f"{start}{each}_proj.weight"] for each in "qkv"])
        else:
            names, dim = (("q_upper", "q_lower"), 0) if kind == "several" else (("q_left", "q_right"), 1)
            parts = tensor.chunk(2, dim=dim)
            found |= {f"{start}{each}.weight": part.contiguous() for each, part in zip(names, parts, strict=True)}
    return found


@pytest.fixture
def bases(tiny_llm, tmp_path, monkeypatch):
    """Return a function that writes one LLM twice: under the library's names, and as a converter's kind has it."""

    def give(kind: str):
        plain, other = write_backbone(tmp_path / "plain", "llama", tiny_llm), tmp_path / kind
        config = json.loads((plain / "config.json").read_text())
        if kind == "rows":
            # As many keys as queries: three equal parts.
            config["num_key_value_heads"] = config["num_attention_heads"]
            (plain / "config.json").write_text(json.dumps(config))
            tensors = load_file(plain / "model.safetensors")
            halves = [name for name in tensors if name.endswith(("k_proj.weight", "v_proj.weight"))]
            tensors |= {name: torch.cat([tensors[name], tensors[name] + 1]) for name in halves}
            save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
        other.mkdir()
        for path in plain.iterdir():
            if path.suffix == ".json":
                (other / path.name).write_bytes(path.read_bytes())
        tensors = stored_as(kind, load_file(plain / "model.safetensors"))
        save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
        monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model: [CONVERTERS[kind]()])
        return plain, other

    return give


@pytest.mark.parametrize("kind", ["several", "rows"])
def test_whatever_rows_a_layer_is_made_of_are_merged_as_peft_merges_the_layer(bases, tmp_path, kind):
    plain, other = bases(kind)
    backbone = load_backbone(other, BackboneOptions(lora_rank=3, lora_alpha=5.0), placement=Alone())
    checkpoint = checkpoint_of(tmp_path / "run", backbone, other)
    merge_llm(checkpoint, tmp_path / "merged", dtype=torch.float32)
    expected = stored_as(kind, peft_merged(checkpoint, plain, torch.float32))
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("kind", ["columns", "turned"])
def test_what_no_merge_could_write_is_refused_before_it_is_trained(bases, kind):
    _, other = bases(kind)
    with pytest.raises(UserError, match=r"LoRA on model.layers.0.self_attn.q_proj could not be merged: its weight is"):
        load_backbone(other, BackboneOptions(lora_rank=2), placement=Alone())
    targets = BackboneOptions(lora_rank=2, lora_targets=("up_proj",))
    assert load_backbone(other, targets, placement=Alone()).model is not None
