"""Loading in pieces: bit for bit what the library loads, each byte read once, damaged files named first."""

import json
import shutil
import threading
from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_architectures import ARCHITECTURES, write_backbone
from tiny_backbones import write_any
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import Chunk, Transpose, WeightConverter

from aullm_dist.errors import UserError
from aullm_dist.llm.pieces import loading
from aullm_dist.llm.pieces.loading import load_in_pieces
from aullm_dist.llm.pieces.placement import Alone, piece_of
from aullm_dist.llm.pieces.skeleton import NeverCalled, model_without_storage
from aullm_dist.llm.quantization import nf4_config
from aullm_dist.llm.stored import conversion
from aullm_dist.llm.stored.weight_files import WeightFiles


class Threads:
    """Processes played by threads: they meet at barriers and see each other's tensors."""

    def __init__(self, rank: int, world_size: int, shared: dict) -> None:
        self.rank, self.world_size, self.device = rank, world_size, torch.device("cpu")
        self._shared = shared
        self.pieces: list[tuple[nn.Parameter, Tensor]] = []

    def _exchange(self, value: object) -> list:
        slots, barrier = self._shared["slots"], self._shared["barrier"]
        slots[self.rank] = value
        barrier.wait()
        seen = list(slots)
        barrier.wait()
        return seen

    def together(self, work: Callable):
        # from_config sets torch's default dtype for a while, for all threads: nobody goes on before all are through.
        self._shared["barrier"].wait()
        return work()

    def largest(self, values: Tensor) -> Tensor:
        return values.copy_(torch.stack(self._exchange(values.clone())).amax(0))

    def complete(self, flat: Tensor, size: int) -> None:
        own = flat[self.rank * size : (self.rank + 1) * size].clone()
        flat.copy_(torch.cat(self._exchange(own)))

    def settle(self, parameter: nn.Parameter) -> None:
        whole = torch.empty(0, dtype=parameter.dtype).set_(parameter.detach().untyped_storage())
        self.complete(whole, len(whole) // self.world_size)


@pytest.fixture(autouse=True)
def one_thread_at_a_time_builds_a_model(monkeypatch):
    lock, build = threading.Lock(), AutoModelForCausalLM.from_config

    def locked(*args, **kwargs):
        with lock:
            return build(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", locked)


def load(folder, world_size: int, dtype=torch.float32, quantization=None, stored=False) -> list:
    """Return the model that each of `world_size` processes ends with, and the bytes that all of them read."""
    shared = {"slots": [None] * world_size, "barrier": threading.Barrier(world_size)}
    models: list = [None] * world_size
    config = AutoConfig.from_pretrained(folder)

    def work(rank: int) -> None:
        placement = Threads(rank, world_size, shared)
        models[rank] = load_in_pieces(str(folder), config, dtype, placement, quantization, stored)

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(model is not None for model in models)
    return models


def assert_same(expected: nn.Module, found: nn.Module) -> None:
    """Every parameter, buffer and quantisation constant of the decoder, bit for bit."""
    for kind in ("named_parameters", "named_buffers"):
        tensors, others = (
            {k: v for k, v in getattr(model, kind)() if not k.startswith("lm_head.")} for model in (expected, found)
        )
        assert others.keys() == tensors.keys()
        for name, tensor in tensors.items():
            other = others[name]
            assert (tensor.dtype, tensor.shape) == (other.dtype, other.shape), name
            assert torch.equal(*(t.detach().reshape(-1).view(torch.uint8) for t in (tensor, other))), name
            state = getattr(tensor, "quant_state", None)
            if state is not None:
                for key, value in state.as_dict(packed=True).items():
                    assert torch.equal(value, other.quant_state.as_dict(packed=True)[key]), (name, key)


@pytest.fixture(scope="module")
def folders(tiny_llm, tmp_path_factory):
    """Return a function that gives the folder of an architecture, unquantised or stored in NF4."""
    root = tmp_path_factory.mktemp("pieces")

    def give(name: str, stored: bool = False):
        plain, packed = root / name, root / f"{name}-nf4"
        if not plain.exists():
            write_backbone(plain, name, tiny_llm)
        if stored and not packed.exists():
            model = AutoModelForCausalLM.from_pretrained(
                plain, dtype=torch.bfloat16, quantization_config=nf4_config(torch.bfloat16)
            )
            model.save_pretrained(packed)
        return packed if stored else plain

    return give


@pytest.mark.parametrize(("name", "world_size"), [*((name, 3) for name in ARCHITECTURES), ("llama", 1)])
def test_unquantised_weights_are_the_librarys(folders, name, world_size):
    expected = AutoModelForCausalLM.from_pretrained(folders(name), dtype=torch.bfloat16)
    for model in load(folders(name), world_size, torch.bfloat16):
        assert_same(expected, model)


@pytest.mark.parametrize(
    ("name", "world_size", "dtype"),
    [
        ("llama", 1, torch.float32),
        ("llama", 2, torch.bfloat16),
        ("qwen2", 3, torch.bfloat16),
        ("gemma3", 3, torch.float32),
    ],
    ids=str,
)
def test_weights_packed_in_pieces_are_bitsandbytes_own(folders, name, world_size, dtype):
    expected = AutoModelForCausalLM.from_pretrained(folders(name), dtype=dtype, quantization_config=nf4_config(dtype))
    for model in load(folders(name), world_size, dtype, nf4_config(dtype)):
        assert_same(expected, model)


@pytest.mark.parametrize("world_size", [1, 3])
def test_stored_nf4_is_taken_as_it_is(folders, world_size):
    folder = folders("llama", stored=True)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for model in load(folder, world_size, torch.bfloat16, nf4_config(torch.bfloat16), stored=True):
        assert_same(expected, model)


def test_layers_that_a_publisher_left_unpacked_stay_so(folders, tmp_path):
    config = nf4_config(torch.bfloat16)
    config.llm_int8_skip_modules = ["model.layers.0.mlp.down_proj", "lm_head"]
    source = AutoModelForCausalLM.from_pretrained(folders("llama"), dtype=torch.bfloat16, quantization_config=config)
    source.save_pretrained(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    (model,) = load(tmp_path, 1, torch.bfloat16, nf4_config(torch.bfloat16), stored=True)
    assert not hasattr(model.model.layers[0].mlp.down_proj.weight, "quant_state")
    assert_same(expected, model)


# Experts by themselves in the files under two kinds of names, fused in the files, buffers in float32, layers with names
# of their own, weights that stay in float32, buffers that are filled from outside.
RENAMED = ("qwen3_moe", "mixtral", "gpt_oss", "glm4_moe", "deepseek_v3", "granitemoehybrid", "olmo_hybrid", "falcon_h1")


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """Return a function that gives the folder of a type whose files the library converts."""
    root = tmp_path_factory.mktemp("renamed")

    def give(name: str):
        if not (root / name).exists():
            write_any(root / name, name)
        return root / name

    return give


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", RENAMED)
def test_what_the_library_converts_is_converted_in_pieces(renamed, name, quantized):
    """Bit for bit, dtypes that are a weight's own included; bfloat16, as float32 would hide those."""
    packing = nf4_config(torch.bfloat16) if quantized else None
    options = {"quantization_config": packing} if quantized else {}
    expected = AutoModelForCausalLM.from_pretrained(renamed(name), dtype=torch.bfloat16, **options)
    for model in load(renamed(name), 2, torch.bfloat16, packing):
        assert_same(expected, model)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("kind", ["chunk", "transpose"])
def test_other_conversions_are_followed_or_left_to_the_library(folders, tmp_path, monkeypatch, kind, dim):
    """No type that packs has them today: one weight that becomes three, and one that is turned."""
    names = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkv"]
    tensors = load_file(folders("qwen3") / "model.safetensors")
    expected = {name: tensors[name] for name in names}
    if kind == "chunk":
        even = {name: tensors[names[0]] + number for number, name in enumerate(names)}
        expected = even
        stored = {"model.layers.0.self_attn.qkv.weight": torch.cat(list(even.values()), dim=dim)}
        converter = lambda: WeightConverter(  # noqa: E731 - made anew for each load
            "self_attn.qkv.weight", [f"self_attn.{n}_proj.weight" for n in "qkv"], [Chunk(dim=dim)]
        )
    else:
        stored = {"model.layers.0.self_attn.turned": tensors[names[0]].T.contiguous()}
        expected = {names[0]: tensors[names[0]]}
        converter = lambda: WeightConverter("self_attn.turned", "self_attn.q_proj.weight", [Transpose(0, 1)])  # noqa: E731
    save_file({k: v for k, v in tensors.items() if k not in expected} | stored, tmp_path / "model.safetensors")
    monkeypatch.setattr(conversion, "get_model_conversion_mapping", lambda model: [converter()])
    model = model_without_storage(AutoConfig.from_pretrained(folders("qwen3")), torch.float32, None)
    files = WeightFiles(tmp_path)
    found = conversion.find_values(model, files)
    for name, tensor in expected.items():
        assert (found[name].make is None) == (kind == "chunk")
        for first, last in ((0, tensor.numel()), (5, 6), (17, tensor.numel() - 3)):
            assert torch.equal(found[name].read(files, first, last), tensor.reshape(-1)[first:last]), (name, first)


def test_the_processes_read_each_byte_once(folders, monkeypatch):
    readers = []
    monkeypatch.setattr(WeightFiles, "close", lambda self: readers.append(self))
    for stored in (False, True):
        readers.clear()
        folder = folders("llama", stored)
        load(folder, 2, torch.bfloat16, nf4_config(torch.bfloat16), stored)
        needed = sum(t.nbytes for name, t in WeightFiles(folder).tensors.items() if not name.startswith("lm_head"))
        read = [files.bytes_read for files in readers]
        assert sum(read) == needed
        assert max(read) < 0.51 * needed


def test_the_head_is_not_loaded(folders):
    (model,) = load(folders("llama"), 1)
    assert isinstance(model.get_output_embeddings(), NeverCalled)
    with pytest.raises(AssertionError, match="not loaded"):
        model(torch.tensor([[1, 2]]))


@pytest.mark.parametrize("name", ["modernbert-decoder", "rwkv", "opt", "gpt_neox"])
def test_heads_and_embeddings_of_other_names(tmp_path, name):
    """Types whose library functions look at the head, or that call it something else."""
    write_any(tmp_path, name)
    (model,) = load(tmp_path, 1)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path)
    whole.set_output_embeddings(NeverCalled())
    assert_same(whole, model)


def test_pieces_cover_everything_once():
    for numel in (0, 1, 7, 64, 100):
        for world_size in (1, 2, 3, 8):
            pieces = [piece_of(numel, rank, world_size) for rank in range(world_size)]
            assert [i for first, last in pieces for i in range(first, last)] == list(range(numel))


def test_tied_embeddings_and_a_checkpoint_of_the_decoder_alone(folders, tmp_path):
    folder = tmp_path / "decoder"
    shutil.copytree(folders("gemma2"), folder)
    tensors = load_file(folder / "model.safetensors")
    renamed = {key.removeprefix("model."): value for key, value in tensors.items()}
    assert "embed_tokens.weight" in renamed
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    expected = AutoModelForCausalLM.from_pretrained(folders("gemma2"), dtype=torch.float32)
    assert_same(expected, load(folder, 1)[0])


def _sharded(folder, source) -> None:
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    halves = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / file)
    weight_map = {key: file for file, keys in halves.items() for key in keys}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_through_the_index(folders, tmp_path):
    _sharded(tmp_path / "sharded", folders("llama"))
    expected = AutoModelForCausalLM.from_pretrained(folders("llama"), dtype=torch.float32)
    assert_same(expected, load(tmp_path / "sharded", 1)[0])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "b.safetensors").unlink(), "b.safetensors is missing"),
        (lambda f: (f / "b.safetensors").write_bytes((f / "b.safetensors").read_bytes()[:-9]), "is truncated"),
        (lambda f: (f / "b.safetensors").write_bytes(b"12345"), "is truncated or no safetensors file"),
        (lambda f: (f / "b.safetensors").write_bytes(b"\x08" + bytes(7) + b"12345678" * 9), "damaged header"),
        (lambda f: (f / "b.safetensors").write_bytes(b"\x08" + bytes(7) + b'{"a":{}}'), "damaged header"),
        (lambda f: shutil.copy(f / "a.safetensors", f / "b.safetensors"), "does not hold"),
        (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "is no index"),
    ],
)
def test_damaged_files_are_named_before_anything_is_read(folders, tmp_path, damage, message):
    folder = tmp_path / "damaged"
    _sharded(folder, folders("llama"))
    damage(folder)
    with pytest.raises(UserError, match=message) as refusal:
        WeightFiles(folder)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)


@pytest.mark.parametrize("quantization", [None, nf4_config(torch.float32)], ids=["plain", "nf4"])
@pytest.mark.parametrize("place", [0, -1])
def test_a_value_that_is_not_finite_is_found_by_whoever_reads_it(folders, tmp_path, monkeypatch, place, quantization):
    found: list = []
    monkeypatch.setattr(loading, "refuse_not_finite", lambda source, names: found.append(list(names)))
    folder = tmp_path / "damaged"
    shutil.copytree(folders("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name].view(-1)[place] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    load(folder, 3, torch.float32, quantization)
    # A plain weight has its value on one process; NF4's constants are put together on all.
    assert sorted(found) == ([[], [], [name]] if quantization is None else [[name]] * 3)


@pytest.mark.parametrize(("change", "message"), [("drop", "are missing in"), ("cut", "are of another shape in")])
def test_weights_that_do_not_fit_the_model(folders, tmp_path, change, message):
    folder = tmp_path / "other"
    shutil.copytree(folders("llama"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].clone()
    if change == "drop":
        del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(UserError, match=f"1 weights {message}.*first {name}"):
        load_in_pieces(str(folder), config, torch.float32, Threads(0, 1, {"barrier": threading.Barrier(1)}))


EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
"""One of those that the library makes one parameter of."""
EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
UNEQUAL = rf"1 weights are of another shape in its files, first {EXPERTS} \(cannot be put together: "


@pytest.mark.parametrize("pack_experts", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda values: values[:-1].clone(),
            UNEQUAL,
        ),
        (
            lambda values: values.T.contiguous(),
            UNEQUAL,
        ),
        (lambda values: (9 * values).to(torch.int8), f"1 weights are whole numbers in its files, first {EXPERTS}"),
        (lambda values: values.masked_fill(values == values.max(), torch.inf), f"{EXPERTS} holds values that are inf"),
        (lambda values: None, UNEQUAL),
    ],
    ids=["cut", "turned", "whole numbers", "infinite", "missing"],
)
def test_one_bad_expert_among_those_that_become_one_parameter(renamed, tmp_path, change, message, pack_experts):
    folder = tmp_path / "damaged"
    shutil.copytree(renamed("qwen3_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(EXPERT))
    save_file(tensors | ({} if changed is None else {EXPERT: changed}), folder / "model.safetensors")
    config = AutoConfig.from_pretrained(folder)
    with pytest.raises(UserError, match=message):
        load_in_pieces(
            str(folder), config, torch.float32, Alone(), nf4_config(torch.float32), pack_experts=pack_experts
        )
