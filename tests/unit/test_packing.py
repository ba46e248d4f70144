"""The packed step is the padded one: logits, every gradient, no leak between branches, no vocabulary logits."""

import pytest
import torch

from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import ACTIVATION_CHECKPOINTING, BackboneOptions, embedding_rms, load_backbone
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.model import reasoner as reasoner_module
from aullm_dist.model.prompt import build_prompt
from aullm_dist.model.reasoner import Reasoner
from aullm_dist.packing import masks
from aullm_dist.packing.forward import decoder_of, packed_hidden, padded_hidden, per_branch_hidden
from aullm_dist.packing.support import check_packable

AUS = (1, 2, 4, 12)
WIDTH = 32
# Three clips and five instruction tokens; clips are shared by branches, the last instruction token is used twice.
BRANCHES = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 3], [1, 4], [0, 4], [2, 2]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tiny")
    return {
        name: build_tiny_backbone(root / name, architecture=name, hidden=WIDTH, layers=2, heads=2)
        for name in ("llama", "qwen3")
    }


def make_reasoner(folder, *, readout="last", use_structure=True, **options):
    loading = {key: options.pop(key) for key in ("attention", "activation_checkpointing", "dtype") if key in options}
    backbone = load_backbone(folder, BackboneOptions(lora_rank=4, **loading))
    prompt = build_prompt(AUS, backbone.tokenizer, readout=readout, use_structure=use_structure)
    torch.manual_seed(3)
    reasoner = Reasoner(backbone, prompt, **options)
    # LoRA's B starts at zero, which would hide every gradient of A.
    for name, parameter in reasoner.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return reasoner.train()


def soft_tokens(reasoner, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = embedding_rms(reasoner.llm)
    return [(torch.randn(n, WIDTH, generator=generator) * scale).requires_grad_() for n in (3, 5)]


def answer(reasoner, packing, suffixes_per_row=0):
    """Return logits and the gradient of every trainable tensor and of the soft tokens for a fixed loss."""
    reasoner.packing, reasoner.suffixes_per_row = packing, suffixes_per_row
    reasoner.zero_grad()
    content, instruction = soft_tokens(reasoner)
    logits = reasoner(content, instruction if reasoner.prompt.use_structure else None, BRANCHES)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(9))
    (logits * weights + logits.square()).sum().backward()
    gradients = {name: p.grad.clone() for name, p in reasoner.named_parameters() if p.requires_grad}
    gradients["content"] = content.grad
    if reasoner.prompt.use_structure:
        gradients["instruction"] = instruction.grad
    return logits.detach(), gradients


def assert_same(got, expected, tolerance=2e-5):
    assert got[0].shape == expected[0].shape == (len(BRANCHES), len(AUS))
    assert (got[0] - expected[0]).abs().max() <= tolerance * expected[0].abs().max()
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, f"{name} has no gradient"
        deviation = ((got[1][name] - gradient).norm() / gradient.norm()).item()
        assert deviation <= tolerance, f"gradient of {name} deviates by {deviation:.2g}"


@pytest.mark.parametrize("checkpointing", ["none", "reentrant"])
@pytest.mark.parametrize("attention", ["prefix", "sdpa", "eager"])
@pytest.mark.parametrize("readout", ["last", "per_au"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_packed_equals_padded(folders, architecture, readout, attention, checkpointing):
    reasoner = make_reasoner(
        folders[architecture], readout=readout, attention=attention, activation_checkpointing=checkpointing
    )
    expected = answer(reasoner, packing=False)
    assert_same(answer(reasoner, packing=True), expected)
    assert_same(answer(reasoner, packing=True, suffixes_per_row=3), expected)


def test_packed_equals_padded_without_structure_token(folders):
    reasoner = make_reasoner(folders["llama"], use_structure=False)
    assert_same(answer(reasoner, packing=True), answer(reasoner, packing=False))


def test_checkpointing_changes_nothing(folders):
    plain, *others = (
        make_reasoner(folders["llama"], activation_checkpointing=kind) for kind in ACTIVATION_CHECKPOINTING
    )
    assert len(others) == 2
    for checkpointed in others:
        assert_same(answer(checkpointed, packing=True), answer(plain, packing=True))


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_hidden_states_of_all_paths_agree(folders, rows):
    llm = load_backbone(folders["qwen3"]).model.eval()
    generator = torch.Generator().manual_seed(0)
    prefix, suffix = (torch.randn(*shape, WIDTH, generator=generator) for shape in ((11,), (6, 5)))
    with torch.no_grad():
        packed = packed_hidden(llm, prefix, suffix, [1, 4], rows=rows)
        padded = padded_hidden(llm, prefix, suffix, [1, 4])
        branches = per_branch_hidden(llm, prefix, suffix, [1, 4], clips=3)
    assert packed.shape == (6, 2, WIDTH)
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
    torch.testing.assert_close(branches, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["prefix", "sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_suffix_changes_only_its_own_output(folders, attention, dtype):
    llm = load_backbone(folders["llama"], BackboneOptions(attention=attention, dtype=dtype)).model.eval()
    prefix = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    suffix = torch.randn(5, 4, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    changed = suffix.clone()
    changed[2] += 1
    with torch.no_grad():
        before = packed_hidden(llm, prefix, suffix, range(4))
        after = packed_hidden(llm, prefix, changed, range(4))
    assert (before[2] != after[2]).any(dim=-1).all()
    others = [0, 1, 3, 4]
    assert torch.equal(before[others], after[others])


def test_no_vocabulary_logits_are_computed(folders):
    reasoner = make_reasoner(folders["llama"])
    calls = []
    reasoner.llm.get_base_model().lm_head.register_forward_hook(lambda *args: calls.append(args))
    answer(reasoner, packing=True)
    answer(reasoner, packing=False)
    assert calls == []


def test_trainable_names_and_readout_parameters(folders):
    last = make_reasoner(folders["llama"])
    per_au = make_reasoner(folders["llama"], readout="per_au")
    outside = {name for name, p in per_au.named_parameters() if p.requires_grad and not name.startswith("llm.")}
    assert outside == {"au_markers", "au_head.weight", "au_bias"}
    assert {name for name in last.state_dict() if not name.startswith("llm.")} == {"au_head.weight", "au_head.bias"}
    embeddings = per_au.llm.get_input_embeddings().weight
    first_name = embeddings[list(per_au.prompt.name_ids[0])].mean(dim=0)
    torch.testing.assert_close(per_au.au_markers[0].detach(), first_name)


def test_hidden_states_on_request_and_token_count(folders):
    reasoner = make_reasoner(folders["llama"], readout="per_au", suffixes_per_row=3)
    content, instruction = soft_tokens(reasoner)
    logits, hidden = reasoner(content, instruction, BRANCHES, return_hidden=True)
    assert logits.shape == (7, 4)
    assert hidden.shape == (7, WIDTH)
    prefix, suffix = reasoner.prompt.prefix_tokens, reasoner.prompt.suffix_tokens
    assert reasoner.num_tokens(7) == 3 * prefix + 9 * suffix
    reasoner.suffixes_per_row = 0
    assert reasoner.num_tokens(7) == prefix + 7 * suffix
    reasoner.packing = False
    assert reasoner.num_tokens(7) == 7 * (prefix + suffix)


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_bfloat16_gives_float32_logits_and_finite_gradients(folders, autocast):
    reasoner = make_reasoner(folders["llama"], dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits, gradients = answer(reasoner, packing=True)
    assert logits.dtype == torch.float32
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    assert reasoner.self_check() < 5e-2


def test_self_check_passes_on_a_good_mask_and_raises_on_a_leak(folders, monkeypatch):
    reasoner = make_reasoner(folders["llama"], attention="sdpa")
    drawn = torch.get_rng_state()
    assert reasoner.self_check() < 1e-5
    assert torch.equal(torch.get_rng_state(), drawn), "a check draws from a generator of its own"
    assert reasoner.training
    causal = masks.create_causal_mask
    monkeypatch.setattr(masks, "create_causal_mask", lambda and_mask_function, **given: causal(**given))
    masks._masks.clear()
    with pytest.raises(UserError, match="other hidden states packed than padded"):
        reasoner.self_check()


def test_the_self_check_shows_the_llm_the_ids_that_training_shows(folders, monkeypatch):
    reasoner, seen = make_reasoner(folders["llama"]), []
    check = reasoner_module.self_check
    monkeypatch.setattr(reasoner_module, "self_check", lambda *a, ids, **k: seen.append(ids) or check(*a, ids=ids, **k))
    reasoner.self_check()
    assert len(seen) == 1
    assert seen[0] is reasoner.row_ids


def test_hidden_states_that_overflow_are_not_blamed_on_packing(folders):
    """Every weight is a finite number, and what they give is none."""
    reasoner = make_reasoner(folders["llama"], attention="sdpa")
    with torch.no_grad():
        decoder_of(reasoner.llm).layers[0].mlp.down_proj.weight.fill_(1e38)
    with pytest.raises(UserError, match="llama gives hidden states that are not finite for the prompt, packed or not"):
        reasoner.self_check()


def test_check_packable_names_what_it_refuses(folders):
    config = load_backbone(folders["llama"]).config
    check_packable(config, "sdpa")
    with pytest.raises(UserError, match="flash attention ignores custom masks"):
        check_packable(config, "flash_attention_2")
    config.model_type = "qwen3_next"
    with pytest.raises(
        UserError, match=r"'qwen3_next' has no mask recipe for attention 'sdpa'; allowed: model.attention"
    ):
        check_packable(config, "sdpa")
    config.model_type, config.layer_types = "qwen3", ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="layers of type linear_attention"):
        check_packable(config, "sdpa")
