"""The benchmark of loading: its random LLM is what its sizes say, and its bars refuse what they should."""

import pytest
import torch
from benchmark_scripts import benchmark
from transformers import AutoModelForCausalLM

from aullm_dist.llm.quantization import nf4_config
from aullm_dist.llm.stored.weight_files import WeightFiles


@pytest.fixture(scope="module")
def bench():
    with benchmark("load_memory") as module:
        yield module


def test_the_sizes_are_those_of_the_loaded_model(bench, tmp_path, monkeypatch):
    for name, value in {"WIDTH": 256, "MLP": 512, "HEADS": 4, "KEY_VALUE_HEADS": 2, "VOCABULARY": 512}.items():
        monkeypatch.setattr(bench, name, value)
    base = bench.write_base(tmp_path / "base", 0.004)
    written = sum(tensor.nbytes for tensor in WeightFiles(base).tensors.values())
    assert abs(written / 2**30 / 0.004 - 1) < 0.2
    sizes = bench.sizes_of(base)
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.bfloat16, quantization_config=nf4_config(torch.bfloat16)
    ).model
    states = [p.quant_state for p in model.parameters() if hasattr(p, "quant_state")]
    constants = sum(state.absmax.nbytes + state.state2.absmax.nbytes for state in states)
    held = sum(p.nbytes for p in model.parameters()) + constants
    assert sizes.constants == pytest.approx(constants, rel=0.01)
    assert sizes.base == pytest.approx(held, rel=0.001)
    layer = model.layers[0]
    assert sizes.layer == sum(p.nbytes for p in layer.parameters() if hasattr(p, "quant_state"))
    assert sizes.layers == len(model.layers) > 2


def test_a_missed_bar_says_which_and_by_how_much(bench):
    bar = {"load": 100.0, "step": 200.0, "read": 1.1}
    row = {"rank": 1, "baseline": (300.0, 0.0), "peak_load": (390.0, 0.0), "peak_step": (499.0, 0.0)}
    assert bench.missed("pieces", [row | {"read_share": 0.5}] * 2, bar) == []
    worse = row | {"peak_load": (425.0, 0.0), "peak_step": (510.0, 0.0), "read_share": 0.6}
    assert bench.missed("pieces", [worse], bar) == [
        "pieces, rank 1: peak of load 125 MiB, bar 100, 25 MiB too much",
        "pieces, rank 1: peak of step 210 MiB, bar 200, 10 MiB too much",
    ]
    assert bench.missed("prepared", [row | {"read_share": 0.6}] * 2, bar) == [
        "prepared: 1.200 of the files are read, bar 1.1, 0.100 too much"
    ]


def test_a_rank_that_holds_the_whole_base_misses_the_bars(bench):
    """Of a base large enough to tell: the bars are no larger than what they are to catch."""
    sizes = bench.Sizes(
        base=4 * 2**30, constants=100 * 2**20, embedding=2**27, layer=22 * 2**20, largest_weight=11_534_336,
        layers=170, width=2048, mlp=5632,
    )  # fmt: skip
    for ranks in (2, 4):
        for mode, bar in bench.bars_of(sizes, ranks).items():
            assert bar["load"] < 0.75 * 4096, mode
            assert bar["step"] < 0.80 * 4096, mode
