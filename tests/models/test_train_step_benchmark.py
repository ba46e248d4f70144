"""The benchmark of the whole step: shapes, arithmetic, random weights in place, and its verdicts."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from benchmark_scripts import benchmark

from aullm_dist.llm.pieces import loading
from aullm_dist.llm.pieces.skeleton import model_without_storage
from aullm_dist.packing.forward import decoder_of

# As their publishers count them, embeddings and vocabulary head included.
PARAMETERS = {"8b-nf4": 8_030_261_248, "32b-nf4": 32_762_123_264, "70b-nf4": 70_553_706_496}
OPTIONS = SimpleNamespace(
    checkpointing=None, attention="auto", compile="none", suffix_multiple=1, nondeterministic=False, workers=0,
    threads=None, steps=1, warm_up=1, profile=None,
)  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    with benchmark("train_step") as module:
        yield module


@pytest.fixture(scope="module")
def parts():
    with benchmark("train_step_model") as module:
        yield module


@pytest.mark.parametrize("preset", ["8b-nf4", "32b-nf4", "70b-nf4"])
def test_the_presets_have_the_published_shapes(parts, preset):
    config = parts.PRESETS[preset].config()
    model = model_without_storage(config, torch.bfloat16, None, keep_head=True)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[preset]
    layers = decoder_of(model).layers
    linear = sum(m.weight.numel() for m in layers.modules() if isinstance(m, torch.nn.Linear))
    assert parts.linear_weights(config) == linear


def test_the_floor_is_four_or_six_times_weights_and_tokens_and_the_bytes_of_unpacking(parts):
    floor = parts.floor_of(7_000_000_000, 2048, recomputed=False, packed=True)
    assert floor.flops == 4 * 7e9 * 2048
    # Each of two passes reads half a byte and 1/64 and writes 2 bytes per weight.
    assert floor.unpacked_bytes == pytest.approx(2 * 7e9 * (0.5 + 1 / 64 + 2))
    assert floor.seconds(1e15, 1e12) == pytest.approx(floor.flops / 1e15 + floor.unpacked_bytes / 1e12)
    again = parts.floor_of(7_000_000_000, 2048, recomputed=True, packed=False)
    assert (again.flops, again.unpacked_bytes) == (6 * 7e9 * 2048, 0.0)


def small(parts, quantization):
    return parts.Preset("small", lambda: parts._llama(128, 192, 2, 2, 1, 1024), quantization, precision="fp32")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_random_weights_go_into_place_piece_by_piece(parts, tmp_path, monkeypatch, quantization):
    pieces = []
    read = parts.RandomFiles.read

    def noted(files, name, first, last):
        pieces.append(last - first)
        return read(files, name, first, last)

    monkeypatch.setattr(parts.RandomFiles, "read", noted)
    monkeypatch.setattr(loading, "WEIGHTS_AT_ONCE", 4096)
    preset, case = small(parts, quantization), parts.Case(clips=2)
    built = parts.build(preset, tmp_path / "llm", Accelerator(cpu=True), parts.config_of(preset, case, OPTIONS))
    decoder = decoder_of(built.model.reasoner.llm)
    assert not any(p.is_meta for p in built.model.parameters())
    assert len(built.quantized_modules) == (14 if quantization == "nf4" else 0)
    layer = decoder.layers[1].mlp.up_proj.base_layer
    assert (layer.weight.element_size() * layer.weight.numel() == 192 * 128 // 2) == (quantization == "nf4")
    if quantization == "nf4":
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert weight.shape == (192, 128)
        assert weight.float().std().item() == pytest.approx(0.02, rel=0.05)
        # Linear weights come 4096 at a time; whole at once come embeddings and norms alone.
        assert sorted(set(pieces)) == [128, 4096, 1024 * 128]
    assert torch.equal(decoder.norm.weight, torch.ones(128))
    assert all(p.any() for name, p in built.model.named_parameters() if "lora_" in name)


@pytest.mark.parametrize(("branches", "kinds"), [(1, 1), (2, 2), (3, 3), (6, 6)])
def test_a_case_has_the_branches_it_says(bench, parts, tmp_path, branches, kinds):
    preset, case = small(parts, "none"), bench.Case(clips=3, branches=branches)
    config = parts.config_of(preset, case, OPTIONS)
    built = parts.build(preset, tmp_path / "llm", Accelerator(cpu=True), config)
    bench_of = bench.Bench(preset, OPTIONS, Accelerator(cpu=True), built, None, None, (1.0, 1.0))
    bench_of.optimizer = bench.build_optimizer(built.model, config.training)
    _, loader = bench.step_of(bench_of, case)
    batch = next(iter(loader))
    assert len(batch.branches) == 3 * branches
    assert len(batch.rows) == kinds


def test_every_path_of_a_case_is_measured_after_they_agree(bench, parts, tmp_path, monkeypatch):
    preset, case = small(parts, "none"), bench.Case(clips=2, prefix_tokens=24, suffix_tokens=12)
    config = parts.config_of(preset, case, OPTIONS)
    accelerator = Accelerator(cpu=True)
    built = parts.build(preset, tmp_path / "llm", accelerator, config)
    optimizer = bench.build_optimizer(built.model.train(), config.training)
    prompt = built.model.reasoner.prompt
    held = bench.Bench(preset, OPTIONS, accelerator, built, optimizer, prompt, (1e12, 1e10))
    rows = {row["path"]: row for row in bench.run_case(held, case)}
    assert {path: row["tokens"] for path, row in rows.items()} == {
        "packed": 24 + 4 * 12, "padded": 4 * 36, "per_branch": 4 * 36,
    }  # fmt: skip
    assert rows["packed"]["host_waits"] == 0
    assert sum(rows["packed"]["shares"].values()) == pytest.approx(1.0)
    assert rows["packed"]["shares"]["LLM forward"] > 0
    assert rows["per_branch"]["times_per_branch"] == 1.0
    weights = parts.linear_weights(preset.config())
    assert rows["packed"]["flops"] == 4 * weights * rows["packed"]["tokens"]
    # A packing that computes something else is not reported.
    monkeypatch.setattr(bench, "TOLERANCES", {"fp32": -1.0})
    with pytest.raises(bench.PathsDisagree, match="relative difference"):
        bench.run_case(held, case)


def test_the_targets_say_pass_or_miss(bench):
    shape = {"clips": 16, "branches": 2, "prefix_tokens": 96, "suffix_tokens": 16, "path": "packed"}
    rows = [
        {**shape, "tokens": 608, "times_per_branch": 4.2, "times_floor": 3.0, "peak_bytes": 80e9},
        {**shape, "clips": 64, "tokens": 2144, "times_floor": 1.7, "peak_bytes": 60e9},
    ]
    held = SimpleNamespace(device=torch.device("cuda"), recomputed=False)
    found = {target["bar"]: target["met"] for target in bench.targets_of("8b-nf4", rows, held)}
    assert found == {4.0: True, 1.6: False}
    (peak,) = bench.targets_of("70b-nf4", rows, held)
    assert (peak["found"], peak["met"]) == (80.0, False)
    assert bench.targets_of("8b-nf4", [], held)[0] | {"name": ""} == {
        "name": "", "found": None, "bar": 4.0, "at_least": True, "met": False,
    }  # fmt: skip
    assert bench.targets_of("8b-nf4", rows, SimpleNamespace(device=torch.device("cpu"), recomputed=False)) == []
