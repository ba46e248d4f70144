"""Static lengths and compiled blocks: the same function, with fewer shapes."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from aullm_dist.commands.train import baseline_config
from aullm_dist.config import load
from aullm_dist.config.checks import check
from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.llm.compiled import compile_blocks
from aullm_dist.model.prompt import build_prompt
from aullm_dist.model.reasoner import Reasoner
from aullm_dist.packing import masks
from aullm_dist.packing.forward import decoder_of, packed_hidden
from aullm_dist.packing.layout import rows_of
from aullm_dist.packing.support import check_packable

AUS = (1, 2, 4)
PREFIX, SUFFIX, WIDTH = 10, 4, 32


def soft(num_suffixes):
    generator = torch.Generator().manual_seed(num_suffixes)
    prefix = torch.randn(PREFIX, WIDTH, generator=generator)
    return prefix, torch.randn(num_suffixes, SUFFIX, WIDTH, generator=generator).requires_grad_()


def trained(llm, **options):
    """Return a backbone in training mode whose LoRA changes the answers."""
    model = load_backbone(llm, BackboneOptions(lora_rank=4, **options)).model.train()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model


def answer(model, num_suffixes, **layout):
    """Return hidden states and every gradient for a fixed loss."""
    model.zero_grad()
    prefix, suffix = soft(num_suffixes)
    hidden = packed_hidden(model, prefix, suffix, (1, 3), **layout)
    (hidden * torch.linspace(-1, 1, WIDTH)).sum().backward()
    return [hidden.detach(), suffix.grad, *(p.grad.clone() for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("attention", ["prefix", "sdpa", "eager"])
@pytest.mark.parametrize(("suffixes", "rows", "multiple"), [(5, 1, 4), (3, 1, 8), (7, 2, 3), (8, 2, 4), (9, 4, 2)])
def test_filled_up_rows_give_the_same_answers_and_gradients(tiny_llm, attention, suffixes, rows, multiple):
    model = trained(tiny_llm, attention=attention)
    lengths = []
    decoder_of(model).layers[0].register_forward_pre_hook(lambda layer, given: lengths.append(given[0].shape[:2]))
    expected = answer(model, suffixes, rows=rows)
    found = answer(model, suffixes, rows=rows, multiple=multiple)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    count, per_row = rows_of(suffixes, rows, multiple)
    assert per_row % multiple == 0
    assert lengths[1] == (count, PREFIX + per_row * SUFFIX)


def test_fillers_count_as_tokens(tiny_llm):
    backbone = load_backbone(tiny_llm, BackboneOptions(lora_rank=4))
    prompt = build_prompt(AUS, backbone.tokenizer)
    reasoner = Reasoner(backbone, prompt, suffix_multiple=16, scale=1.0)
    decoder, seen = decoder_of(reasoner.llm), []
    decoder.layers[0].register_forward_pre_hook(lambda layer, given: seen.append(given[0].shape[0] * given[0].shape[1]))
    for branches in (1, 16, 17, 40):
        index = torch.zeros(branches, 2, dtype=torch.int64)
        reasoner(torch.randn(1, WIDTH), torch.randn(1, WIDTH), index)
        assert reasoner.num_tokens(branches) == seen[-1]
    assert len(set(seen)) == 3
    reasoner.suffixes_per_row = 16
    assert reasoner.num_tokens(17) == 2 * (prompt.prefix_tokens + 16 * prompt.suffix_tokens)
    assert reasoner.self_check() < 1e-4


def test_masks_are_made_once_for_each_layout(tiny_llm, monkeypatch):
    model = trained(tiny_llm, attention="sdpa")
    made = []
    build = masks.dense_masks
    monkeypatch.setattr(masks, "dense_masks", lambda *given: made.append(given) or build(*given))
    for suffixes in (3, 4, 3, 4, 5):
        packed_hidden(model, *soft(suffixes), (3,))
    assert len(made) == 3
    for suffixes in range(6, 20):
        packed_hidden(model, *soft(suffixes), (3,))
    assert len(masks._masks[decoder_of(model).config]) == masks._MASKS_KEPT


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_the_block_mask_of_flex_attention_is_the_dense_mask(tmp_path, architecture):
    from aullm_dist.llm.tiny import build_tiny_backbone

    folder = build_tiny_backbone(tmp_path / architecture, architecture=architecture, hidden=32, layers=1, heads=2)
    config = decoder_of(load_backbone(folder, BackboneOptions(attention="sdpa")).model).config
    prefix, suffix, count = 40, 9, 7
    length = prefix + suffix * count
    places = masks.positions_and_segments(prefix, suffix, count, torch.device("cpu"))
    sequence = torch.zeros(1, length, 32)
    dense = masks.dense_masks(config, sequence, *places)
    config._attn_implementation = "flex_attention"
    block = masks.dense_masks(config, sequence, *places)
    assert isinstance(block, BlockMask)
    index = torch.arange(length)
    visible = block.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index[None, :])
    assert torch.equal(visible, dense[0, 0])
    check_packable(config, "flex_attention")


def test_flex_attention_is_refused_on_a_cpu(tiny_llm):
    with pytest.raises(UserError, match="attention is 'flex', which has no backward pass on CPUs; allowed here: auto,"):
        load_backbone(tiny_llm, BackboneOptions(attention="flex"))


@pytest.mark.parametrize(
    "options",
    [{}, {"activation_checkpointing": "non_reentrant"}, {"quantization": "nf4"}],
    ids=["plain", "checkpointed", "nf4"],
)
def test_compiled_blocks_are_whole_graphs_and_the_same_function(tiny_llm, options):
    plain, compiled = trained(tiny_llm, **options), trained(tiny_llm, **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    said = compile_blocks(compiled, static_lengths=True, backend="aot_eager")
    assert said == "2 decoder layers (aot_eager, each length for itself)"
    for suffixes in (3, 5, 8, 3):
        expected, found = (answer(model, suffixes, multiple=8) for model in (plain, compiled))
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    # One length, and the layers share its graph.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        (["model.llm=none", "model.compile=blocks"], "model.compile is 'blocks' with model.llm: none"),
        (["model.suffixes_per_row=12", "model.suffix_multiple=8"], "allowed: a multiple of model.suffix_multiple = 8"),
        (["model.packing=false", "model.suffix_multiple=8"], "with model.packing: false; allowed: 1"),
        (["model.suffix_multiple=0"], "model.suffix_multiple is 0; allowed: a finite number above 0"),
    ],
)
def test_combinations_that_cannot_work_are_refused(settings, match):
    with pytest.raises(UserError, match=match):
        load(None, settings)


def test_compiled_blocks_are_refused_under_zero3(monkeypatch):
    from aullm_dist.training import run as run_module

    monkeypatch.setattr(run_module.workspace, "check_run_folder", lambda *given: pytest.fail("refused too late"))
    config = load(None, ["model.compile=blocks", "training.strategy=zero3"])
    with pytest.raises(UserError, match="allowed with ZeRO-3: none"):
        run_module.run(None, config, "new", None)


def test_the_baseline_of_a_compiled_run_is_a_valid_run(tmp_path):
    settings = ["model.compile=blocks", "model.suffix_multiple=8", "training.baseline=true", "data.train=[somewhere]"]
    baseline = baseline_config(load(None, settings), tmp_path, "led_cnn")
    assert (baseline.model.llm, baseline.model.compile) == ("none", "none")
    check(baseline)
