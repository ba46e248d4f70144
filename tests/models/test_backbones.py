"""Backbones of late 2026, packed: the same function as padded rows through the library's eager attention.

The oracle is never ours: one row per branch, the library's masks, its eager attention and its own recurrent layers.
"""

from pathlib import Path

import pytest
import torch
from tiny_backbones import HYBRIDS, SETTINGS, full_config, small_config
from transformers import AutoModelForCausalLM

from aullm_dist.llm.backbone import ACTIVATION_CHECKPOINTING, BackboneOptions, load_backbone
from aullm_dist.llm.layers import checkpoint_activations
from aullm_dist.llm.lora import add_lora, lora_targets_of
from aullm_dist.packing import attention, hybrids
from aullm_dist.packing.forward import SOFT, decoder_of, packed_hidden, padded_hidden
from aullm_dist.packing.probe import probe_packed, probe_padded
from aullm_dist.packing.self_check import self_check
from aullm_dist.packing.shrink import VOCAB

PREFIX, SUFFIX, COUNT = 11, 6, 5
IDS = torch.tensor([*range(3, 3 + PREFIX), SOFT, 40, 41, SOFT, 42, SOFT])
# Of these float32 tells no more: their norms of small sums magnify rounding, and by how much depends on the processor's
# instructions (qwen3_5_text in NF4: 0.5e-5 to 2.2e-5). A step that is wrong is off by 1e-2 and more.
BOUNDS = {"gemma3n_text": 1e-4, "gemma4_text": 1e-4} | dict.fromkeys(
    ["granite_swa", "qwen3_5_text", "qwen3_next"], 5e-5
)
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "seed": 0}


def model_of(name, **changes):
    torch.manual_seed(0)
    config = small_config(name)
    config.update(changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def felt(model):
    """Let every small part of a model change its answers: norms, sinks, gates, and LoRA's B, which starts at zero."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and parameter.is_floating_point():
            parameter.data = torch.nan_to_num(parameter.data) + 0.1 * torch.randn(parameter.shape, generator=generator)
        elif "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model.train()


def answer(model, run, **layout):
    """Return hidden states and the gradients of inputs and LoRA for a fixed loss."""
    model.zero_grad()
    generator = torch.Generator().manual_seed(2)
    embed = model.get_input_embeddings()
    prefix = embed(IDS[:PREFIX]).detach().requires_grad_()
    scale = embed.weight.float().std() * prefix.detach().std() / embed(IDS[:PREFIX]).detach().std()
    suffixes = (torch.randn(COUNT, SUFFIX, prefix.shape[1], generator=generator) * scale).requires_grad_()
    hidden = run(model, prefix, suffixes, range(SUFFIX), ids=IDS, **layout)
    weights = torch.randn(hidden.shape, generator=generator)
    (hidden * weights + hidden.square()).sum().backward()
    trained = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    return {"hidden": hidden.detach(), "prefix": prefix.grad, "suffixes": suffixes.grad} | trained


def deviations(found, expected):
    assert found.keys() == expected.keys()
    norms = {name: value.norm() for name, value in expected.items()}
    assert norms["hidden"] > 0
    assert norms["prefix"] > 0
    return {
        name: ((found[name] - value).norm() / max(norms[name], 1e-3 * norms["prefix"])).item()
        for name, value in expected.items()
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_packed_equals_padded_with_lora(name):
    model = model_of(name).requires_grad_(False)
    targets = lora_targets_of(model, "all-linear")
    wrapped = felt(add_lora(model, targets, **LORA))
    expected = answer(wrapped, padded_hidden)
    # Layers that take their keys from others leave their own projections unused (Gemma 3n and 4).
    assert sum("lora_" in key for key in expected) >= 1.8 * len(targets)
    decoder_of(model).config._attn_implementation = attention.NAME
    found = deviations(answer(wrapped, packed_hidden, rows=2, multiple=3), expected)
    assert found["hidden"] <= 1e-5
    assert max(found.values()) <= BOUNDS.get(name, 1e-5), found
    if name in HYBRIDS:
        for kind in ACTIVATION_CHECKPOINTING[1:]:
            checkpoint_activations(model, reentrant=kind == "reentrant")
            found = deviations(answer(wrapped, packed_hidden), expected)
            assert max(found.values()) <= BOUNDS.get(name, 1e-5), (kind, found)
        wrapped.eval()
        with torch.no_grad():
            embeds = model.get_input_embeddings()(IDS.clamp(min=0))
            assert self_check(wrapped, embeds[:PREFIX], embeds[PREFIX:].expand(3, -1, -1), [SUFFIX - 1]) < 1e-5


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "gemma4_text", *HYBRIDS])
def test_packed_equals_padded_in_nf4(tiny_llm, tmp_path, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    tokenizer.save_pretrained(tmp_path)
    felt(model_of(name, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    options = {"quantization": "nf4", "lora_rank": 2}
    padded = load_backbone(tmp_path, BackboneOptions(packing=False, attention="eager", **options))
    packed = load_backbone(tmp_path, BackboneOptions(**options))
    assert packed.quantized_modules
    expected = answer(_with_lora(padded.model), padded_hidden)
    found = deviations(answer(_with_lora(packed.model), packed_hidden), expected)
    assert max(found.values()) <= 2 * BOUNDS.get(name, 1e-5), found


def _with_lora(model):
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model.train()


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("suffix_tokens", [1, 2])
def test_short_suffixes_and_prefixes_shorter_than_the_convolution(name, suffix_tokens):
    model = felt(model_of(name)).eval()
    embeds = torch.randn(2 + 4 * suffix_tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    prefix, suffixes = embeds[:2], embeds[2:].view(4, suffix_tokens, -1)
    with torch.no_grad():
        expected = padded_hidden(model, prefix, suffixes, range(suffix_tokens))
        decoder_of(model).config._attn_implementation = attention.NAME
        found = packed_hidden(model, prefix, suffixes, range(suffix_tokens))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1", "lfm2"])
def test_a_state_that_is_not_carried_is_noticed(monkeypatch, name):
    monkeypatch.setattr(hybrids.PrefixState, "spread", lambda state, count: hybrids.PrefixState())
    model = felt(model_of(name)).eval()
    embeds = torch.randn(PREFIX + SUFFIX, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    given = embeds[:PREFIX], embeds[PREFIX:].expand(3, -1, -1), range(SUFFIX)
    with torch.no_grad():
        expected = padded_hidden(model, *given)
        decoder_of(model).config._attn_implementation = attention.NAME
        found = packed_hidden(model, *given)
    assert (found - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4_text"])
def test_embeddings_per_layer_are_those_of_the_ids(name):
    model = felt(model_of(name)).eval()
    ids = IDS.clamp(min=5)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        by_ids = decoder_of(model)(input_ids=ids[None]).last_hidden_state[:, PREFIX:]
        found, without = (
            padded_hidden(model, embeds[:PREFIX], embeds[PREFIX:][None], range(SUFFIX), ids=given)
            for given in (ids, None)
        )
    torch.testing.assert_close(found, by_ids, rtol=1e-4, atol=1e-5)
    assert (without - by_ids).norm() > 1e-2 * by_ids.norm()


@pytest.mark.parametrize("name", ["gpt_oss", "qwen3_5_text", "gemma4_text"])
def test_the_probe_takes_the_released_sizes(name):
    config = full_config(name)
    assert probe_padded(config).refusal is None
    assert probe_packed(config).refusal is None
    assert small_config(name).vocab_size == VOCAB


def test_no_type_of_the_page_fails():
    """Every cell of docs/backbones.md is yes, or a refusal with its reason."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "backbones.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.partition("## ")[0].splitlines() if line.startswith("| `")]
    assert len(rows) > 180
    for name, *cells in rows:
        assert len(cells) == 6, name
        assert all(cell.startswith(("yes", "refused: ", "its text decoder, `")) or cell == "-" for cell in cells), name
        assert cells[0] != "-", name
        # Whatever trains in 4 bits or not has a word on its merge.
        assert all(merge != "-" for trained, merge in (cells[2:4], cells[4:6]) if trained.startswith("yes")), name
