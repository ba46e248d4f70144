"""Fused experts in NF4: the function of their unpacked values, one expert unpacked at a time, and what is refused."""

import threading

import pytest
import torch
from merge_samples import checkpoint_of
from safetensors.torch import load_file
from test_pieces import Threads
from tiny_backbones import write_any
from torch import nn
from transformers import AutoModelForCausalLM

from aullm_dist.errors import UserError
from aullm_dist.llm import experts as experts_module
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.llm.experts import packed_experts
from aullm_dist.llm.quantization import constants_of, constants_of_blocks
from aullm_dist.merge.merge import merge_llm
from aullm_dist.packing import attention
from aullm_dist.packing.forward import decoder_of, packed_hidden

# Experts by themselves in the files under two kinds of names, fused and transposed with biases, beside dense layers.
TYPES = ("qwen3_moe", "mixtral", "gpt_oss", "glm4_moe")
# Rows of whole NF4 blocks, as merging onto NF4 needs them.
WIDE = {"moe_intermediate_size": 64, "intermediate_size": 128}
NF4 = BackboneOptions(lora_rank=2, quantization="nf4_experts")


@pytest.fixture(scope="module")
def folders(tiny_llm, tmp_path_factory):
    root = tmp_path_factory.mktemp("experts")
    for name in (*TYPES, "llama"):
        write_any(root / name, name, tiny_llm, **WIDE)
    return root


def hidden_and_gradient(model: nn.Module, width: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(11, width, generator=generator)
    suffixes = torch.randn(3, 5, width, generator=generator).requires_grad_()
    hidden = packed_hidden(model.eval(), prefix, suffixes, range(5))
    # Not of its norm: the last layer makes that a constant.
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    return [hidden.detach(), suffixes.grad]


def assert_close(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert ((one - other).norm() / other.norm()).item() < 1e-5


@pytest.mark.parametrize("name", TYPES)
def test_merged_it_is_what_was_trained_beside(folders, tmp_path, name):
    """Hidden states and gradients of packed experts are those of the dense LLM that stock transformers then loads."""
    backbone = load_backbone(folders / name, NF4)
    held = dict(packed_experts(backbone.model.get_base_model()))
    assert len(held) >= 4
    assert set(held) <= set(backbone.quantized_modules)
    assert all(experts.packed.numel() * 4 == experts.shape.numel() for experts in held.values()), "4 bits each"
    assert f"{len(held)} parameters of fused experts packed" in backbone.reasons["quantization"]
    checkpoint = checkpoint_of(tmp_path / "run", backbone, folders / name)
    receipt = merge_llm(checkpoint, tmp_path / "merged", dtype=torch.float32, probe=["Action units"])
    assert receipt.base == "nf4-exact"
    assert receipt.probe["relative_logit_error"]["nf4-exact"] < 1e-5 < receipt.probe["relative_logit_error"]["bf16"]
    found = hidden_and_gradient(backbone.model, backbone.hidden_size)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    decoder_of(merged).config._attn_implementation = attention.NAME
    assert_close(found, hidden_and_gradient(merged, backbone.hidden_size))
    before, after = (load_file(folder / "model.safetensors") for folder in (folders / name, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = [
        key for key in before if ".experts." in key and "bias" not in key and not torch.equal(before[key], after[key])
    ]
    assert len(changed) == sum(".experts." in key and "bias" not in key for key in before)


@pytest.mark.parametrize("checkpointing", ["non_reentrant", "reentrant"])
def test_checkpointing_computes_the_same(folders, checkpointing):
    plain = load_backbone(folders / "qwen3_moe", NF4)
    again = load_backbone(
        folders / "qwen3_moe",
        BackboneOptions(lora_rank=2, quantization="nf4_experts", activation_checkpointing=checkpointing),
    )
    expected = hidden_and_gradient(plain.model, plain.hidden_size)
    generator = torch.Generator().manual_seed(0)
    prefix = torch.randn(11, again.hidden_size, generator=generator)
    suffixes = torch.randn(3, 5, again.hidden_size, generator=generator).requires_grad_()
    hidden = packed_hidden(again.model.train(), prefix, suffixes, range(5))
    (hidden * torch.randn(hidden.shape, generator=generator)).sum().backward()
    assert_close([hidden.detach(), suffixes.grad], expected)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_nothing_unpacked_is_kept_for_the_backward_pass(folders, name):
    backbone = load_backbone(folders / name, NF4)
    shapes = {tuple(experts.shape) for _, experts in packed_experts(backbone.model.get_base_model())}
    shapes |= {shape[1:] for shape in shapes} | {shape[:0:-1] for shape in shapes}
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        hidden_and_gradient(backbone.model, backbone.hidden_size)
    assert kept
    assert not shapes & set(kept)


def test_two_processes_pack_what_one_packs(folders):
    shared = {"slots": [None] * 2, "barrier": threading.Barrier(2)}
    found: list = [None, None]
    lock = threading.Lock()

    def work(rank: int) -> None:
        placement = Threads(rank, 2, shared)
        found[rank] = load_backbone(folders / "qwen3_moe", BackboneOptions(lora_rank=0, quantization="nf4_experts"),
                                    placement=placement).model  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        build = AutoModelForCausalLM.from_config

        def locked(*args, **kwargs):
            with lock:
                return build(*args, **kwargs)

        patch.setattr(AutoModelForCausalLM, "from_config", locked)
        workers = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    expected = dict(packed_experts(load_backbone(folders / "qwen3_moe", NF4).model.get_base_model()))
    for model in found:
        for name, experts in packed_experts(model):
            assert torch.equal(experts.unpacked(), expected[name].unpacked())


def test_one_expert_is_a_slice_of_all(folders):
    model = load_backbone(folders / "qwen3_moe", NF4).model.get_base_model()
    for _, experts in packed_experts(model):
        whole = experts.unpacked()
        assert whole.shape == experts.shape
        for number in range(len(experts)):
            assert torch.equal(experts[torch.tensor(number)].unpacked(), whole[number])
        assert torch.equal(experts[1:3], whole[1:3])
        assert torch.equal(experts.transpose(1, 2), whole.transpose(1, 2))
        assert torch.equal(torch.sum(experts, 0), whole.sum(0))
        constants = constants_of(experts.packed.quant_state)
        assert torch.equal(constants_of_blocks(experts.packed.quant_state, 3, 17), constants[3:17])


def test_what_cannot_be_is_refused_before_anything_is_trained(folders):
    with pytest.raises(UserError, match="has no fused experts that NF4 could quantise; set model.quantization=nf4"):
        load_backbone(folders / "llama", NF4)
    options = BackboneOptions(lora_rank=2, lora_targets=["q_proj", "experts.down_proj"])
    with pytest.raises(UserError, match="'experts.down_proj': holds all experts of a layer in one parameter"):
        load_backbone(folders / "qwen3_moe", options)
    left = load_backbone(folders / "qwen3_moe", BackboneOptions(lora_rank=2, quantization="nf4"))
    assert "which model.quantization=nf4_experts packs as well" in left.reasons["quantization"]
    assert experts_module.packed_shape(left.model, "x") is None
