"""Damaged and odd bases: every command that reads one refuses it in one line, or all of them see the same function."""

import json
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from merge_samples import write_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import aullm_dist.merge.merge as merge
from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.llm.stored.quantize import quantize_base
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.packing.forward import decoder_of
from aullm_dist.packing.shrink import shrink
from aullm_dist.planning import backbone_check

SECONDS = 20
"""A command that has not answered by then hangs."""
LOADS = None
UP = "model.layers.0.mlp.up_proj.weight"
WEIGHTS = "model.safetensors"


class Alone:
    """The placement of one process that loads in pieces."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def together(self, work: Callable) -> Any:
        return work()

    def largest(self, values: Tensor) -> Tensor:
        return values

    def complete(self, flat: Tensor, size: int) -> None:
        """Nobody else has a piece."""

    def settle(self, parameter: nn.Parameter) -> None:
        """It stays where it is."""


Damage = Callable[[Path], object]


def config(**changes: Any) -> Damage:
    return lambda folder: edit(folder / "config.json", changes)


def edit(path: Path, changes: dict[str, Any]) -> None:
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({name: value for name, value in (values | changes).items() if value is not ...}))


def text(file: str, content: str | bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())


def tokenizer(**changes: Any) -> Damage:
    return lambda folder: edit(folder / "tokenizer.json", changes)


def tokenizer_model(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        values = json.loads((folder / "tokenizer.json").read_text())
        values["model"] = {**values["model"], **changes}
        (folder / "tokenizer.json").write_text(json.dumps(values))

    return damage


def tokenizer_config(**changes: Any) -> Damage:
    return lambda folder: edit(folder / "tokenizer_config.json", changes)


def gone(file: str) -> Damage:
    return lambda folder: (folder / file).unlink()


def weights(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        changed = change(load_file(folder / WEIGHTS))
        save_file({name: value.contiguous() for name, value in changed.items()}, folder / WEIGHTS, {"format": "pt"})

    return damage


def with_value(name: str, value: float) -> Damage:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors[name].view(-1)[-1] = value
        return tensors

    return weights(change)


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Change the header of the weights and leave the values."""

    def damage(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        entries = json.loads(data[8 : 8 + length])
        change(entries)
        new = json.dumps(entries).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return damage


def sharded(change: Callable[[Path, dict[str, str]], object] = lambda folder, places: None) -> Damage:
    """Divide the weights into two files, and change folder or index then."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
        for file in set(places.values()):
            chosen = {name: tensors[name] for name, place in places.items() if place == file}
            save_file(chosen, folder / file, {"format": "pt"})
        change(folder, places)
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))

    return damage


def moved_into(folders: bool) -> Damage:
    """Give both shards one name in two folders, or let one lie above the base."""

    def change(folder: Path, places: dict[str, str]) -> None:
        for number, file in enumerate(sorted(set(places.values()))):
            target = Path("ab"[number]) / "w.safetensors" if folders else Path("..") / f"{folder.name}-{file}"
            (folder / target).parent.mkdir(exist_ok=True)
            (folder / file).rename(folder / target)
            places.update({name: str(target) for name, place in places.items() if place == file})

    return sharded(change)


def duplicated(folder: Path, places: dict[str, str]) -> None:
    one, two = sorted(set(places.values()))
    tensors = load_file(folder / two)
    extra = next(name for name, place in places.items() if place == one)
    save_file(tensors | {extra: load_file(folder / one)[extra] + 1}, folder / two, {"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def with_adapter(folder: Path) -> None:
    edit(folder / "adapter_config.json", {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]})


def tied(folder: Path) -> None:
    """Tie the embeddings, and store them under the head's name alone."""
    edit(folder / "config.json", {"tie_word_embeddings": True})
    weights(lambda t: {("lm_head.weight" if "embed" in k else k): v for k, v in t.items() if "lm_head" not in k})(
        folder
    )


def beyond_vocabulary(folder: Path) -> None:
    """A tokenizer of another model: its last word has an id that the embeddings lack."""
    values = json.loads((folder / "tokenizer.json").read_text())
    vocab = values["model"]["vocab"]
    vocab[max(vocab, key=vocab.get)] += 1000
    (folder / "tokenizer.json").write_text(json.dumps(values))


def begins_beyond_vocabulary(folder: Path) -> None:
    values = json.loads((folder / "tokenizer.json").read_text())
    values["post_processor"]["special_tokens"]["<s>"]["ids"] = [100_000]
    (folder / "tokenizer.json").write_text(json.dumps(values))


def added_token(folder: Path) -> None:
    """A token that no prompt has may lie beyond the embeddings: released models have such."""
    values = json.loads((folder / "tokenizer.json").read_text())
    token = dict(values["added_tokens"][0], id=max(values["model"]["vocab"].values()) + 1, content="<|never|>")
    values["added_tokens"].append(token)
    (folder / "tokenizer.json").write_text(json.dumps(values))


def swap_offsets(entries: dict[str, Any]) -> None:
    """Let a tensor have the place of another of its size."""
    entries[UP]["data_offsets"] = entries[UP.replace("up", "gate")]["data_offsets"]


ROPE = {"rope_type": "default", "rope_theta": 1e4}

# name: damage, what the refusal says (a part), or LOADS
BASES: dict[str, tuple[Damage, str | None]] = {
    "nothing": (lambda folder: None, LOADS),
    # config.json
    "config: no JSON": (text("config.json", "{"), "config.json cannot be read"),
    "config: empty": (text("config.json", ""), "config.json cannot be read"),
    "config: no UTF-8": (text("config.json", b"\xff\xfe{}"), "config.json cannot be read"),
    "config: a list": (text("config.json", "[]"), "config.json holds a list"),
    "config: nested for ever": (text("config.json", "[" * 100_000), "config.json cannot be read"),
    "config: no model type": (config(model_type=...), "cannot be loaded"),
    "config: model type a number": (config(model_type=5), "model_type is 5"),
    "config: model type a list": (config(model_type=["llama"]), "model_type is"),
    "config: unknown type": (config(model_type="llama99"), "llama99"),
    "config: encoder": (config(model_type="bert"), "is no decoder"),
    "config: vocabulary as text": (config(vocab_size="578"), "vocab_size"),
    "config: vocabulary null": (config(vocab_size=None), "vocab_size"),
    "config: width null": (config(hidden_size=None), "hidden_size"),
    "config: width 0": (config(hidden_size=0), "hidden_size is 0"),
    "config: width negative": (config(hidden_size=-32), "hidden_size is -32"),
    "config: width odd": (config(hidden_size=33), "hidden_size is 33"),
    "config: width infinite": (text("config.json", '{"model_type": "llama", "hidden_size": Infinity}'), "hidden_size"),
    "config: other width": (config(hidden_size=128), "of another shape"),
    "config: other vocabulary": (config(vocab_size=700), "of another shape"),
    "config: smaller vocabulary": (config(vocab_size=100), "tokenizer gives the prompt the id"),
    "config: heads that do not divide": (config(num_attention_heads=3, head_dim=...), "num_attention_heads"),
    "config: more heads": (config(num_attention_heads=4), "q_proj.weight"),
    "config: no heads": (config(num_attention_heads=0), "num_attention_heads is 0"),
    "config: more key-value heads": (config(num_key_value_heads=2), "k_proj.weight"),
    "config: odd heads": (config(head_dim=15), "head_dim is 15"),
    "config: a layer more": (config(num_hidden_layers=3), "are missing in its files"),
    "config: a layer less": (config(num_hidden_layers=1), LOADS),
    "config: no layer": (config(num_hidden_layers=0), "num_hidden_layers is 0"),
    "config: 10^9 layers": (config(num_hidden_layers=10**9), "num_hidden_layers"),
    "config: 900 layers": (config(num_hidden_layers=900), "num_hidden_layers"),
    "config: layers as a fraction": (config(num_hidden_layers=1.5), "num_hidden_layers"),
    "config: unknown activation": (config(hidden_act="new"), "hidden_act"),
    "config: activation a list": (config(hidden_act=["silu"]), "hidden_act"),
    "config: norm epsilon as text": (config(rms_norm_eps="1e-6"), "rms_norm_eps"),
    "config: pad beyond the vocabulary": (config(pad_token_id=99_999), "pad_token_id"),
    "config: pad negative": (config(pad_token_id=-1), LOADS),
    "config: dtype unknown": (config(dtype="float8_e4m3"), "dtype"),
    "config: dtype a number": (config(dtype=16), LOADS),
    "config: dtype another": (config(dtype="float16"), LOADS),
    "config: rope unknown": (config(rope_parameters={**ROPE, "rope_type": "new"}), "rope_parameters.rope_type"),
    "config: yarn without factor": (config(rope_parameters={**ROPE, "rope_type": "yarn"}), "rope_parameters"),
    "config: rope a list": (config(rope_parameters=[1]), "rope_parameters"),
    "config: rope base as text": (config(rope_parameters={**ROPE, "rope_theta": "big"}), "rope_theta"),
    "config: rope base 0": (config(rope_parameters={**ROPE, "rope_theta": 0}), "rope_parameters.rope_theta is 0"),
    "config: rope base negative": (
        config(rope_parameters={**ROPE, "rope_theta": -5.0}),
        "rope_parameters.rope_theta is -5.0",
    ),
    "config: llama3 rope incomplete": (config(rope_parameters={**ROPE, "rope_type": "llama3", "factor": 8.0}), "rope"),
    "config: linear rope": (config(rope_parameters={**ROPE, "rope_type": "linear", "factor": 2.0}), LOADS),
    "config: initial range negative": (config(initializer_range=-1.0), "initializer_range"),
    "config: initial range NaN": (config(initializer_range=float("nan")), "initializer_range is not a number"),
    "config: encoder and decoder": (config(is_encoder_decoder=True), "is no decoder"),
    "config: not causal": (config(is_causal=False), "is_causal"),
    "config: norm epsilon infinite": (config(rms_norm_eps=float("inf")), "rms_norm_eps is Infinity"),
    "config: hidden states as text": (config(output_hidden_states="x"), 'output_hidden_states is "x"'),
    "config: attentions as text": (config(output_attentions="x"), LOADS),
    "config: heads too wide for any memory": (config(head_dim=2**40), "of another shape"),
    "config: biases": (config(attention_bias=True), "are missing in its files"),
    "config: unknown keys": (config(nonsense={"a": 1}, _private=2), LOADS),
    "config: code of its own": (config(auto_map={"AutoModelForCausalLM": "modeling.Model"}), LOADS),
    "config: quantised by nobody": (config(quantization_config={}), "its files are quantised"),
    "config: quantisation a list": (config(quantization_config=[4]), "quantization_config"),
    "config: quantised by another": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "gptq"),
    "config: weights elsewhere": (config(transformers_weights="other.safetensors"), "transformers_weights"),
    # the tokenizer's files
    "tokenizer: no files": (
        lambda folder: [(folder / f"tokenizer{end}.json").unlink() for end in ("", "_config")],
        "no usable tokenizer",
    ),
    "tokenizer: file alone": (gone("tokenizer_config.json"), LOADS),
    "tokenizer: config alone": (gone("tokenizer.json"), "tokenizer.json is missing"),
    "tokenizer: no JSON": (text("tokenizer.json", '{"model"'), "tokenizer.json cannot be read"),
    "tokenizer: empty object": (text("tokenizer.json", "{}"), "tokenizer.json cannot be used"),
    "tokenizer: unknown model": (tokenizer_model(type="BPE2"), "tokenizer.json cannot be used"),
    "tokenizer: vocabulary a list": (tokenizer_model(vocab=[]), "tokenizer.json cannot be used"),
    "tokenizer: id negative": (tokenizer_model(vocab={"a": -1}), "tokenizer.json cannot be used"),
    "tokenizer: no vocabulary": (tokenizer_model(vocab={}, merges=[]), "ids for the"),
    "tokenizer: merge of no words": (tokenizer_model(merges=["zzz qqq"]), "tokenizer.json cannot be used"),
    "tokenizer: unknown normaliser": (tokenizer(normalizer={"type": "New"}), "normalizer"),
    "tokenizer: unknown pre-tokenizer": (tokenizer(pre_tokenizer={"type": "New"}), "pre_tokenizer"),
    "tokenizer: bad pattern": (
        tokenizer(pre_tokenizer={"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": False}),
        "pre_tokenizer",
    ),
    "tokenizer: post-processor incomplete": (
        tokenizer(post_processor={"type": "TemplateProcessing"}),
        "post_processor",
    ),
    "tokenizer: added tokens a text": (tokenizer(added_tokens="x"), "added_tokens"),
    "tokenizer: ids beyond the rows": (beyond_vocabulary, "rows"),
    "tokenizer: first id beyond the rows": (begins_beyond_vocabulary, "the id 100000"),
    "tokenizer: an unused token beyond the rows": (added_token, LOADS),
    "tokenizer config: a list": (text("tokenizer_config.json", "[]"), "tokenizer_config.json holds a list"),
    "tokenizer config: no JSON": (text("tokenizer_config.json", "nope"), "tokenizer_config.json cannot be read"),
    "tokenizer config: reserved name": (tokenizer_config(add_special_tokens=True), "add_special_tokens"),
    "tokenizer config: length a text": (tokenizer_config(model_max_length="long"), "model_max_length"),
    "tokenizer config: unknown class": (tokenizer_config(tokenizer_class="NewTokenizer"), LOADS),
    "tokenizer config: class a number": (tokenizer_config(tokenizer_class=7), "tokenizer_class"),
    "tokenizer config: bos a number": (tokenizer_config(bos_token=3), "bos_token"),
    "tokenizer config: added tokens wrong": (tokenizer_config(added_tokens_decoder={"x": 1}), "added_tokens_decoder"),
    "special tokens: a list": (text("special_tokens_map.json", "[]"), "special_tokens_map.json holds a list"),
    # what nobody asks
    "generation config: no JSON": (text("generation_config.json", "{"), LOADS),
    "generation config: a list": (text("generation_config.json", "[]"), LOADS),
    "generation config: nonsense": (text("generation_config.json", '{"max_new_tokens": "x", "num_beams": -1}'), LOADS),
    "chat template: broken": (text("chat_template.jinja", "{% if %}"), LOADS),
    # adapters and other weights
    "adapter beside the weights": (with_adapter, "adapter_config.json"),
    "adapter weights without config": (text("adapter_model.safetensors", b"x"), LOADS),
    "pickled weights": (pickled, "pytorch_model.bin alone, a pickle"),
    "pickle beside the weights": (text("pytorch_model.bin", b"x"), LOADS),
    "distributed checkpoint": (text("shard-00001-model-00001-of-00002.safetensors", b"x"), "distributed checkpoint"),
    # weights
    "no weights": (gone(WEIGHTS), "model.safetensors is missing"),
    "weights: empty": (text(WEIGHTS, b""), "truncated"),
    "weights: cut": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-5]), "truncated"),
    "weights: too long": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"more"),
        "more than its header says",
    ),
    "weights: a Git LFS pointer": (text(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"), "truncated"),
    "header: overlap": (header(swap_offsets), "overlaps"),
    "header: unknown dtype": (header(lambda h: h[UP].update(dtype="F8_E4M3")), "F8_E4M3"),
    "header: other dtype": (header(lambda h: h[UP].update(dtype="I32")), "whole numbers"),
    "header: negative shape": (header(lambda h: h[UP].update(shape=[-1, -2])), "damaged header"),
    "header: shape a text": (header(lambda h: h[UP].update(shape="wide")), "damaged header"),
    "header: no offsets": (header(lambda h: h[UP].pop("data_offsets")), "damaged header"),
    "header: metadata no text": (header(lambda h: h.update(__metadata__={"format": 1})), "damaged header"),
    "header: another library's": (header(lambda h: h.update(__metadata__={"format": "np"})), LOADS),
    "header: no metadata": (header(lambda h: h.pop("__metadata__")), LOADS),
    "weights: one missing": (weights(lambda t: {k: v for k, v in t.items() if k != UP}), f"first {UP}"),
    "weights: no head": (weights(lambda t: {k: v for k, v in t.items() if "lm_head" not in k}), LOADS),
    "weights: one more": (weights(lambda t: t | {"other.weight": torch.ones(2)}), LOADS),
    "weights: other shape": (weights(lambda t: t | {UP: t[UP][:-1]}), "of another shape"),
    "weights: transposed": (weights(lambda t: t | {UP: t[UP].T}), "of another shape"),
    "weights: flat": (weights(lambda t: t | {UP: t[UP].flatten()}), "of another shape"),
    "weights: empty tensor": (weights(lambda t: t | {UP: t[UP][:0]}), "of another shape"),
    "weights: half precision": (weights(lambda t: t | {UP: t[UP].half()}), LOADS),
    "weights: double precision": (weights(lambda t: t | {UP: t[UP].double()}), LOADS),
    "weights: whole numbers": (weights(lambda t: t | {UP: (9 * t[UP]).to(torch.int8)}), "whole numbers"),
    "weights: without prefix": (weights(lambda t: {k.removeprefix("model."): v for k, v in t.items()}), LOADS),
    "weights: other prefix": (weights(lambda t: {f"module.{k}": v for k, v in t.items()}), "are missing in its files"),
    "weights: NaN": (with_value(UP, float("nan")), f"{UP} holds values that are infinite"),
    "weights: infinite": (with_value("model.norm.weight", float("-inf")), "model.norm.weight holds values"),
    "weights: NaN in the head": (with_value("lm_head.weight", float("nan")), LOADS),
    "weights: tied under the head's name": (tied, LOADS),
    # shards
    "shards": (sharded(), LOADS),
    "shards: one missing": (sharded(lambda f, p: (f / p[UP]).unlink()), "is missing"),
    "shards: one cut": (sharded(lambda f, p: (f / p[UP]).write_bytes((f / p[UP]).read_bytes()[:-3])), "truncated"),
    "shards: index of another": (sharded(lambda f, p: p.update({"other.weight": p[UP]})), "does not hold other.weight"),
    "shards: index lacks a weight": (sharded(lambda f, p: p.pop(UP)), LOADS),
    "shards: index names no weights": (sharded(lambda f, p: p.clear()), "its files hold 0 tensors"),
    "shards: a tensor twice": (sharded(duplicated), "stands in both"),
    "shards: in folders": (moved_into(folders=True), "without folders"),
    "shards: above the folder": (moved_into(folders=False), "without folders"),
    "shards: a pickle": (sharded(lambda f, p: p.update({UP: "pytorch_model.bin"})), "allowed: safetensors files"),
    "index: no JSON": (lambda f: (sharded()(f), (f / f"{WEIGHTS}.index.json").write_text("{")), "is no index"),
    "index: a list": (lambda f: (sharded()(f), (f / f"{WEIGHTS}.index.json").write_text("[1]")), "is no index"),
    "index beside one file": (text(f"{WEIGHTS}.index.json", "{"), LOADS),
}


ONLY_IN_A_RUN = {"tokenizer: no files", "no weights", "weights: NaN", "weights: infinite"}
"""What `backbone check` does not ask for: it takes a config alone, and reads no weight."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build_tiny_backbone(tmp_path_factory.mktemp("sound") / "llama", hidden=64, layers=2, heads=2)
    (folder / "tiny_backbone.json").unlink()
    return folder


@pytest.fixture(scope="module")
def checkpoint(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Of layers that every base below has: what it is merged into is another matter.
    return write_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), sound, "fp32", target_modules=["q_proj"], layers_to_transform=[0]
    )


@pytest.fixture(autouse=True)
def no_command_hangs() -> Iterator[None]:
    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def answer(folder: Path, placement: Alone | None, quantization: str) -> Tensor:
    model = load_backbone(folder, BackboneOptions(lora_rank=0, quantization=quantization), placement=placement).model
    with torch.no_grad():
        words = model.get_input_embeddings()(torch.arange(3, 24).view(1, -1))
        return decoder_of(model)(inputs_embeds=words, prefix_tokens=9, suffix_tokens=12, use_cache=False)[0]


def outcome(work: Callable[[], Any]) -> Any:
    """Return what `work` gives, or the refusal; every other exception is a traceback that a user would see."""
    try:
        return work()
    except UserError as refusal:
        return str(refusal)


def checked(folder: Path) -> str | None:
    """Return what `aullm-dist backbone check` refuses of a base."""
    return "; ".join(backbone_check.check_backbone(str(folder), []).refused) or None


@pytest.mark.parametrize("name", BASES)
def test_commands_agree_on_a_base(name, sound, checkpoint, tmp_path, monkeypatch):
    damage, expected = BASES[name]
    folder = tmp_path / "base"
    folder.mkdir()
    for path in sound.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    damage(folder)
    # The checkpoint is of the sound base, which this one stands for.
    monkeypatch.setattr(merge, "base_differences", lambda *_: [])
    monkeypatch.setattr(backbone_check, "_CASES", ())  # how much memory it takes is another matter
    outcomes = {
        "one process": outcome(lambda: answer(folder, None, "none")),
        "pieces": outcome(lambda: answer(folder, Alone(), "none")),
        "one process, NF4": outcome(lambda: answer(folder, None, "nf4")),
        "pieces, NF4": outcome(lambda: answer(folder, Alone(), "nf4")),
        "quantize": outcome(lambda: quantize_base(folder, tmp_path / "nf4")),
        "check": outcome(lambda: checked(folder)),
        "merge": outcome(lambda: merge.merge_llm(checkpoint, tmp_path / "merged", llm=folder, dtype=torch.float32)),
    }
    refusals = {command: found for command, found in outcomes.items() if isinstance(found, str)}
    for command, message in refusals.items():
        assert "\n" not in message, (command, message)
        assert len(message) < 700, (command, message)
        assert str(folder) in message or "llama" in message, (command, message)
    if expected is LOADS:
        assert refusals == {}
    else:
        unseen = {"quantize", "merge", *(["check"] if name in ONLY_IN_A_RUN else [])}
        assert set(outcomes) - unseen <= set(refusals), "accepted"
        others = [message for command, message in refusals.items() if command not in ("quantize", "merge")]
        assert [message for message in others if expected not in message] == []
    if not refusals:
        for quantised in ("", ", NF4"):
            one, pieces = outcomes[f"one process{quantised}"], outcomes[f"pieces{quantised}"]
            assert one.isfinite().all()
            assert torch.equal(one, pieces), "another function in pieces"


def test_modelling_code_that_goes_another_way_in_nf4_does_so_in_pieces_too(sound, tmp_path):
    """Falcon Mamba multiplies with a weight past its layer, unless its config says that the layer is quantised."""
    small = shrink(AutoConfig.for_model("falcon_mamba"))
    words = AutoTokenizer.from_pretrained(sound)
    words.save_pretrained(tmp_path)
    small.update({"vocab_size": len(words)})
    AutoModelForCausalLM.from_config(small, dtype=torch.float32).save_pretrained(tmp_path)
    options = BackboneOptions(lora_rank=0, quantization="nf4", packing=False)
    one, pieces = (load_backbone(tmp_path, options, placement=placement).model for placement in (None, Alone()))
    with torch.no_grad():
        embeds = one.get_input_embeddings()(torch.arange(3, 24).view(1, -1))
        hidden = [decoder_of(model)(inputs_embeds=embeds, use_cache=False)[0] for model in (one, pieces)]
    assert torch.equal(*hidden)
