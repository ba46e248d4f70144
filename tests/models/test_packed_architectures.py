"""The packed step is the padded one in every architecture with a mask recipe, windows and soft caps included.

The oracle is always the library's own eager attention on padded rows: one row per branch, masks made by the library.
"""

from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from tiny_architectures import ARCHITECTURES, CASES, WIDTH, WINDOW, WINDOWED, tiny_config, write_backbone
from transformers import AutoModelForCausalLM

from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import (
    ACTIVATION_CHECKPOINTING,
    BackboneOptions,
    checkpoint_activations,
    embedding_rms,
    load_backbone,
    mean_embeddings,
)
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.model.prompt import build_prompt
from aullm_dist.model.reasoner import Reasoner
from aullm_dist.packing import attention as prefix_attention
from aullm_dist.packing import forward, masks
from aullm_dist.packing.forward import decoder_of, packed_hidden, padded_hidden
from aullm_dist.packing.support import check_packable

QUANTIZATIONS = ("none", "nf4")
BRANCHES = torch.tensor([[0, 0], [1, 1], [2, 2], [0, 3], [1, 4], [0, 4], [2, 2]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("architectures")
    words = build_tiny_backbone(root / "words", hidden=WIDTH, layers=1, heads=2)
    return {name: write_backbone(root / name, name, words) for name in ARCHITECTURES}


def make_reasoner(folder, *, packing=True, **loading):
    backbone = load_backbone(folder, BackboneOptions(lora_rank=4, packing=packing, **loading))
    torch.manual_seed(3)
    reasoner = Reasoner(backbone, build_prompt((1, 2, 4, 12), backbone.tokenizer, readout="per_au"), packing=packing)
    generator = torch.Generator().manual_seed(4)
    # LoRA's B starts at zero, which would hide every gradient of A.
    for name, parameter in reasoner.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return reasoner.train()


def answer(reasoner):
    """Return hidden states and the gradient of every trainable tensor and of the soft tokens for a fixed loss."""
    generator = torch.Generator().manual_seed(0)
    scale = embedding_rms(reasoner.llm)
    content, instruction = ((torch.randn(n, WIDTH, generator=generator) * scale).requires_grad_() for n in (3, 5))
    prefix, suffix = reasoner._embeds(content, instruction, BRANCHES)
    assert len(prefix) > 2 * WINDOW, "the windows must matter"
    assert suffix.shape[1] > WINDOW
    run = packed_hidden if reasoner.packing else padded_hidden
    hidden = run(reasoner.llm, prefix, suffix, range(suffix.shape[1]))
    weights = torch.randn(hidden.shape, generator=generator)
    (hidden * weights + hidden.square()).sum().backward()
    trained = {name: p.grad for name, p in reasoner.named_parameters() if p.grad is not None}
    assert sum(".lora_" in name for name in trained) == 2 * 2 * 7
    return {"hidden": hidden.detach(), "content": content.grad, "instruction": instruction.grad, **trained}


def deviations(got, expected):
    assert got.keys() == expected.keys()
    assert all(value.norm() > 0 for value in expected.values())
    return {name: ((got[name] - value).norm() / value.norm()).item() for name, value in expected.items()}


@pytest.fixture(scope="module")
def expected(folders):
    options = {"packing": False, "attention": "eager"}
    return {
        (name, quantization): answer(make_reasoner(folder, quantization=quantization, **options))
        for name, folder in folders.items()
        for quantization in QUANTIZATIONS
    }


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(("name", "attention"), CASES)
def test_packed_equals_padded(folders, expected, name, attention, quantization):
    reasoner = make_reasoner(folders[name], attention=attention, quantization=quantization)
    # One model for all kinds of checkpointing: loading takes longer than a step.
    for checkpointing in ACTIVATION_CHECKPOINTING:
        if checkpointing != "none":
            checkpoint_activations(reasoner.llm.get_base_model(), reentrant=checkpointing == "reentrant")
        reasoner.zero_grad()
        found = deviations(answer(reasoner), expected[name, quantization])
        assert max(found.values()) <= 2e-5, (checkpointing, found)
    assert reasoner.self_check() < 1e-5
    assert decoder_of(reasoner.llm).config._attn_implementation.endswith(attention), "the self-check puts it back"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_four_bits_are_felt(expected, name):
    assert deviations(expected[name, "nf4"], expected[name, "none"])["hidden"] > 1e-2


@pytest.mark.parametrize(
    ("name", "attention", "quantization"),
    [(*case, "none") for case in CASES] + [(name, "prefix", "nf4") for name in ARCHITECTURES],
)
def test_bfloat16_passes_the_self_check(folders, name, attention, quantization):
    reasoner = make_reasoner(folders[name], attention=attention, dtype=torch.bfloat16, quantization=quantization)
    assert reasoner.self_check() < 5e-2


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3_window", "gemma2"])
def test_one_suffix_that_all_see_is_noticed_in_bfloat16(folders, monkeypatch, name, quantization):
    """The least of the leaks: the others see one suffix of three."""
    reasoner = make_reasoner(folders[name], attention="eager", dtype=torch.bfloat16, quantization=quantization)
    split = masks.positions_and_segments

    def first_suffix_seen_by_all(*sizes):
        positions, segments = split(*sizes)
        return positions, segments.where(segments != 0, -1)

    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), monkeypatch.context() as patch:
            masks._masks.clear()
            reasoner.self_check()
            patch.setattr(masks, "positions_and_segments", first_suffix_seen_by_all)
            masks._masks.clear()
            with pytest.raises(UserError, match="other hidden states packed than padded"):
                reasoner.self_check()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_prefix_attention_runs_padded_rows(folders, expected, name):
    found = deviations(answer(make_reasoner(folders[name], packing=False, attention="prefix")), expected[name, "none"])
    assert max(found.values()) <= 2e-5, found


@pytest.mark.parametrize(("name", "attention"), [case for case in CASES if case[0] in WINDOWED])
def test_an_ignored_window_is_noticed(folders, expected, monkeypatch, name, attention):
    reasoner = make_reasoner(folders[name], attention=attention)
    windows, attend = masks.layer_windows, prefix_attention._suffixes
    monkeypatch.setattr(masks, "layer_windows", lambda config: dict.fromkeys(windows(config)))
    monkeypatch.setattr(prefix_attention, "_suffixes", lambda *a: attend(*a[:-1], replace(a[-1], window=None)))
    assert deviations(answer(reasoner), expected[name, "none"])["hidden"] > 1e-2
    with pytest.raises(UserError, match="other hidden states packed than padded"):
        reasoner.self_check()


@pytest.mark.parametrize(("name", "attention"), [c for c in CASES if c[0] in WINDOWED and c[1] != "prefix"])
def test_a_window_counted_by_index_is_noticed(folders, monkeypatch, name, attention):
    reasoner = make_reasoner(folders[name], attention=attention)
    split = masks.positions_and_segments

    def by_index(*sizes):
        positions, segments = split(*sizes)
        return torch.arange(len(positions)), segments

    for module in (masks, forward):
        monkeypatch.setattr(module, "positions_and_segments", by_index)
    with pytest.raises(UserError, match="other hidden states packed than padded"):
        reasoner.self_check()


def test_an_ignored_soft_cap_is_noticed(folders, monkeypatch):
    reasoner = make_reasoner(folders["gemma2"])
    attend = prefix_attention._suffixes
    monkeypatch.setattr(prefix_attention, "_suffixes", lambda *a: attend(*a[:-1], replace(a[-1], softcap=None)))
    with pytest.raises(UserError, match="other hidden states packed than padded"):
        reasoner.self_check()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_embeddings_are_what_the_first_layer_sees_of_words(folders, name):
    backbone = load_backbone(folders[name], BackboneOptions(packing=False))
    decoder = decoder_of(backbone.model).eval()
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    seen = []
    decoder.layers[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    with torch.no_grad():
        embeds = backbone.model.get_input_embeddings()(ids)
        by_ids = decoder(input_ids=ids).last_hidden_state
        by_embeds = decoder(inputs_embeds=embeds).last_hidden_state
        every_word = torch.arange(1, backbone.config.vocab_size)[None]
        decoder(input_ids=every_word)
    assert torch.equal(by_embeds, by_ids)
    assert torch.equal(seen[1], seen[0])
    # Random weights: only <pad>, id 0, is a row of zeros.
    assert embedding_rms(backbone.model) == pytest.approx(seen[2].square().mean().sqrt().item(), rel=1e-5)
    means = mean_embeddings(backbone.model, [ids[0, :3].tolist(), ids[1].tolist()])
    torch.testing.assert_close(means, torch.stack([seen[0][0, :3].mean(dim=0), seen[0][1].mean(dim=0)]))
    assert backbone.config.model_type[:5] != "gemma" or embedding_rms(backbone.model) > 4 * WIDTH**-0.5


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["mistral", "gemma2", "gemma3"])
def test_adapter_loads_with_stock_peft(folders, tmp_path, name):
    reasoner = make_reasoner(folders[name])
    reasoner.llm.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(folders[name], attn_implementation="eager")
    stock = PeftModel.from_pretrained(plain, tmp_path).eval()
    ids = torch.randint(3, 300, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = reasoner.llm.eval()(input_ids=ids).logits
        torch.testing.assert_close(stock(input_ids=ids).logits, logits, rtol=0, atol=1e-5)
        with stock.disable_adapter():
            assert (stock(input_ids=ids).logits - logits).abs().max() > 1e-2


def test_what_auto_chooses_and_why(folders):
    def reason(name, **options):
        return load_backbone(folders[name], BackboneOptions(lora_rank=0, **options)).reasons["attention"]

    assert reason("qwen2") == "prefix (auto: knows the layout of packed branches)"
    assert reason("mistral").endswith("branches), window of 6 tokens on 2 of 2 layers")
    assert reason("gemma2").endswith("branches), window of 6 tokens on 1 of 2 layers")
    assert reason("gemma2", packing=False).startswith("eager (auto: gemma2 has no sdpa)")
    assert reason("gemma3", packing=False).startswith("sdpa (auto: ")
    assert reason("gemma3", attention="eager").startswith("eager (as set)")
    with pytest.raises(UserError, match=r"gemma2 has no sdpa attention .* allowed: prefix, eager"):
        load_backbone(folders["gemma2"], BackboneOptions(attention="sdpa"))
    with pytest.raises(UserError, match="gemma2: has no sdpa attention; set model.attention to auto or eager"):
        load_backbone(folders["gemma2"], BackboneOptions(attention="sdpa", packing=False))


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("qwen3", {"layer_types": ["full_attention", "linear_attention"]}, "layers of type linear_attention; allowed"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention"]}, "layers of type chunked_attention; "),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "has sliding_window=None"),
        ("llama", {"layer_types": ["full_attention", "sliding_attention"]}, "type sliding_attention; allowed: full_at"),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "full_attention; allowed: sliding_atte"),
        ("mistral", {"sliding_window": 0}, "has sliding_window=0"),
        ("llama", {"attention_chunk_size": 8}, "has attention_chunk_size=8"),
        ("llama", {"is_causal": False}, "has is_causal=False"),
        ("gemma3", {"use_bidirectional_attention": True}, "has use_bidirectional_attention=True"),
    ],
)
@pytest.mark.parametrize("attention", ["prefix", "eager"])
def test_layers_without_a_recipe_are_refused(name, changes, match, attention):
    config = tiny_config(name)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(UserError, match=match) as caught:
        check_packable(config, attention)
    assert "\n" not in str(caught.value)
    assert "or set model.packing=false" in str(caught.value)
