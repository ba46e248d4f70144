"""The probe: what an architecture is refused for, by what it computes instead of by its name."""

import pytest
import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aullm_dist.errors import UserError
from aullm_dist.packing import attention, hybrids, probe
from aullm_dist.packing.forward import _check_length
from aullm_dist.packing.probe import probe_packed, probe_padded
from aullm_dist.packing.shrink import VOCAB, WINDOW, KeyedConfig, key_of, shrink
from aullm_dist.packing.support import check_packable, is_decoder


def released(name: str, **settings: object) -> PretrainedConfig:
    return CONFIG_MAPPING[name](**settings)


def test_sizes_are_cut_and_flags_are_kept():
    config = released(
        "qwen3",
        hidden_size=5120,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        num_hidden_layers=64,
        use_sliding_window=True,
        sliding_window=4096,
        max_window_layers=40,
        attention_bias=True,
    )
    small = shrink(config)
    assert (small.vocab_size, small.sliding_window, small.attention_bias) == (VOCAB, WINDOW, True)
    assert small.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    assert small.num_hidden_layers == 3
    assert small.num_key_value_heads < small.num_attention_heads
    assert config.hidden_size == 5120, "the given config stays as it is"


def test_one_architecture_of_two_sizes_is_probed_once():
    big = released("llama", hidden_size=8192, num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80)
    small = released("llama", hidden_size=2048, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=16)
    assert key_of(shrink(big)) == key_of(shrink(small))
    other = released("llama", num_attention_heads=32, num_key_value_heads=32, attention_bias=True)
    assert key_of(shrink(big)) != key_of(shrink(other))
    probe_packed(big)
    before = probe._packed.cache_info().misses
    assert probe_packed(small).refusal is None
    assert probe._packed.cache_info().misses == before


def test_layers_that_hide_their_layout_are_refused():
    with pytest.raises(UserError, match=r"'stablelm' gives other hidden states .*set model.packing=false") as caught:
        check_packable(released("stablelm"), "prefix")
    assert "\n" not in str(caught.value)
    assert probe_padded(released("stablelm")).refusal is None


def test_attention_in_both_directions_is_refused():
    with pytest.raises(UserError, match="'bert' cannot run packed"):
        check_packable(released("bert", is_decoder=False), "prefix")


@pytest.mark.parametrize(("name", "decodes"), [("gpt_neox", True), ("bert", False), ("roformer", False)])
def test_whether_a_type_is_a_decoder_is_tried_and_not_read(name, decodes):
    """BERT's first norm takes any constant off an embedding: what looks ahead has to be seen through it."""
    config = released(name)
    assert config.is_decoder is False
    assert is_decoder(config) is decodes
    assert (probe_padded(config).refusal is None) is decodes
    config.is_decoder = True
    assert is_decoder(config)


def test_a_config_of_several_models_says_so():
    finding = probe_padded(released("blt"))
    assert not finding.proven
    assert "its config holds patcher_config" in finding.refusal


@pytest.mark.parametrize("broken", ["window", "sinks", "softcap"])
def test_an_attention_that_forgets_something_is_noticed(monkeypatch, broken):
    """The probe's texts are long enough for the window and its weights large enough for the rest."""
    name = {"window": "gpt_oss", "sinks": "gpt_oss", "softcap": "gemma2"}[broken]
    settings = {"attn_logit_softcapping": 1.0} if broken == "softcap" else {}
    make = attention._Form

    def forgetful(scaling, dropout, window, softcap, sinks):
        kept = {"window": window, "softcap": softcap, "sinks": sinks} | {broken: None}
        return make(scaling, dropout, **kept)

    monkeypatch.setattr(attention, "_Form", forgetful)
    small = shrink(released(name, **settings))
    # Without its sinks a layer gives those no gradient either, which is found first.
    words = "cannot run packed" if broken == "sinks" else "packed than padded"
    assert words in probe._packed.__wrapped__(KeyedConfig(small), "").refusal


def test_a_hybrid_whose_state_is_not_carried_is_refused(monkeypatch):
    monkeypatch.setattr(hybrids, "carry_states", lambda decoder: None)
    monkeypatch.setattr("aullm_dist.packing.forward.carry_states", lambda decoder: None)
    small = shrink(released("qwen3_5_text"))
    assert "packed than padded" in probe._packed.__wrapped__(KeyedConfig(small), "").refusal


def test_texts_longer_than_a_chunk_are_refused():
    config = released("llama4_text", attention_chunk_size=64)
    _check_length(config, 64)
    with pytest.raises(UserError, match="65 tokens, llama4_text attends within chunks of 64"):
        _check_length(config, 65)


def test_the_generator_stays_as_it_was():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    probe._packed.__wrapped__(KeyedConfig(shrink(released("llama"))), "")
    assert torch.equal(torch.random.get_rng_state(), before)
