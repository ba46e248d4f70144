"""`aullm-dist merge`: the bytes that PEFT makes, the weights that training saw, and nothing half."""

import dataclasses
import json
import re
import shutil
from collections import namedtuple

import pytest
import torch
from merge_samples import differing, live_model, peft_merged, write_checkpoint
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_architectures import write_backbone
from transformers import AutoModelForCausalLM, AutoTokenizer

from aullm_dist.checkpoint.base_identity import base_identity
from aullm_dist.checkpoint.entries import Manifest
from aullm_dist.checkpoint.manifest import read_manifest, write_manifest
from aullm_dist.cli import main
from aullm_dist.errors import UserError
from aullm_dist.llm.stored.quantize import quantize_base
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.merge import logit_errors as merge_probe
from aullm_dist.merge import plan as merge_plan
from aullm_dist.merge.journal import Journal
from aullm_dist.merge.merge import merge_llm

GIB = 2**30
PATTERNS = {"r": 5, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"layers.1.mlp.up_proj": 7}}


@pytest.fixture(scope="module", autouse=True)
def small_units():
    """Several units, pieces and chunks per weight: real ones are larger than these whole LLMs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_plan, "UNIT_WEIGHTS", 512)
        patch.setattr(merge_plan, "LARGEST_PIECE", 1024)
        patch.setattr("aullm_dist.merge.compute.CHUNK", 5 * 64)
        yield


@pytest.fixture(scope="module")
def base(tiny_llm, tmp_path_factory):
    """Return a function that gives the folder of an architecture."""
    root = tmp_path_factory.mktemp("bases")

    def give(name: str = "llama"):
        return root / name if (root / name).exists() else write_backbone(root / name, name, tiny_llm)

    return give


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """An LLM whose rows are whole blocks of NF4."""
    return build_tiny_backbone(tmp_path_factory.mktemp("wide") / "llm", hidden=64, layers=2, heads=2)


@pytest.fixture(scope="module")
def plain(base, tmp_path_factory):
    """A checkpoint on an LLM that was not quantised."""
    return write_checkpoint(tmp_path_factory.mktemp("plain"), base())


@pytest.fixture(scope="module")
def nf4(wide, tmp_path_factory):
    """A checkpoint on an LLM in NF4."""
    return write_checkpoint(tmp_path_factory.mktemp("nf4"), wide, nf4=True)


def split(folder, target):
    """Write a model folder as three files with an index."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    places = {}
    for part in range(3):
        keys, file = sorted(tensors)[part::3], f"model-{part + 1:05d}-of-00003.safetensors"
        save_file({key: tensors[key] for key in keys}, target / file, metadata={"format": "pt"})
        places |= dict.fromkeys(keys, file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return target


def state_of(folder) -> dict[str, torch.Tensor]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.state_dict()


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", {}),
        ("llama", {"r": 16, "lora_alpha": 11}),
        ("llama", {"use_rslora": True, "r": 6}),
        ("llama", {"use_dora": True}),
        ("llama", PATTERNS),
        ("qwen2", {"target_modules": ["q_proj", "down_proj"]}),
        ("gemma2", {}),
    ],
    ids=["plain", "odd_scaling", "rslora", "dora", "patterns", "biases", "tied"],
)
def test_byte_for_byte_what_peft_merges(base, tmp_path, name, lora):
    checkpoint = write_checkpoint(tmp_path, base(name), **lora)
    receipt = merge_llm(checkpoint, tmp_path / "out", max_ram=GIB)
    assert differing(state_of(tmp_path / "out"), peft_merged(checkpoint, base(name))) == []
    assert receipt.base == "bf16"
    assert receipt.adapter_tensors == len(load_file(checkpoint / "adapter_model.safetensors"))
    assert receipt.merged == len(lora.get("target_modules", range(7))) * 2


def test_several_files_keep_their_layout(base, tmp_path):
    folder = split(base(), tmp_path / "llm")
    checkpoint = write_checkpoint(tmp_path / "run", folder)
    out = tmp_path / "out"
    receipt = merge_llm(checkpoint, out, max_ram=GIB)
    assert differing(state_of(out), peft_merged(checkpoint, folder)) == []
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in receipt.files for t in load_file(out / f).values())
    kept = [path.name for path in folder.iterdir()]
    assert sorted(path.name for path in out.iterdir()) == sorted(kept)
    assert AutoTokenizer.from_pretrained(out).get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("source", ["original", "prepared"])
def test_nf4_exact_is_what_training_saw(wide, tmp_path, precision, source):
    llm = wide
    if source == "prepared":
        quantize_base(llm, tmp_path / "packed")
        llm = tmp_path / "packed"
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    checkpoint = write_checkpoint(tmp_path / "run", llm, precision, nf4=True)
    receipt = merge_llm(checkpoint, tmp_path / "out", dtype=torch.float32, max_ram=GIB)
    assert receipt.base == "nf4-exact"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    live = live_model(checkpoint, llm, dtype)
    expected = unpacked(live)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    if source == "original":  # a prepared one computes in bf16 wherever stock transformers loads it
        ids = torch.arange(3, 40)[None]
        wanted, found = live(ids).logits.float(), merged(ids).logits
        assert (found - wanted).norm() / wanted.norm() < {"bf16": 5e-2, "fp32": 1e-5}[precision]


def unpacked(live) -> dict[str, torch.Tensor]:
    """What the live model's weights add up to, in float32: the library's own unpacking, and PEFT's own deltas."""
    from bitsandbytes.functional import dequantize_4bit

    expected = {}
    causal_lm = live.get_base_model()
    for name, module in causal_lm.named_modules():
        if hasattr(module, "lora_A"):
            weight = module.base_layer.weight
            values = dequantize_4bit(weight.data, weight.quant_state).float()
            expected[f"{name}.weight"] = values + module.get_delta_weight("default")
    for name, parameter in causal_lm.named_parameters():
        if "lora_" not in name and "base_layer" not in name:
            expected[name] = parameter.float()
    return expected


def test_on_the_original_weights_when_asked(wide, nf4, tmp_path):
    receipt = merge_llm(nf4, tmp_path / "out", base="bf16", max_ram=GIB)
    assert differing(state_of(tmp_path / "out"), peft_merged(nf4, wide)) == []
    assert "not those of the model that was trained" in receipt.note


def test_only_layers_that_the_manifest_lists_are_rounded(wide, nf4, tmp_path):
    merge_llm(nf4, tmp_path / "out", max_ram=GIB)
    found, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", wide))
    same = [name for name in before if torch.equal(found[name], before[name].bfloat16())]
    assert sorted(same) == sorted(name for name in before if "proj" not in name)


def test_no_byte_depends_on_the_memory(nf4, tmp_path, monkeypatch):
    receipts = []
    for number, piece in enumerate((512, 2**20)):
        monkeypatch.setattr(merge_plan, "LARGEST_PIECE", piece)
        receipts.append(merge_llm(nf4, tmp_path / f"out{number}", max_ram=GIB))
    assert receipts[0].files == receipts[1].files


def test_machines_with_many_cores_need_no_more_memory(nf4, tmp_path, monkeypatch):
    least = []
    for number, workers in enumerate((1, 64)):
        monkeypatch.setattr("aullm_dist.merge.merge.num_workers", lambda workers=workers: workers)
        with pytest.raises(UserError, match="needs at least") as refused:
            merge_llm(nf4, tmp_path / f"out{number}", max_ram=1)
        least.append(int(re.search(r"at least (\d+) MiB", str(refused.value))[1]))
    assert least[0] == least[1]
    merge_llm(nf4, tmp_path / "out", max_ram=least[1] * 2**20)


def refusal(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert main(["merge", "--format", "llm", *map(str, arguments)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("Loading weights")]
    return line


def test_the_command(nf4, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["merge", str(nf4.parent), "--format", "llm", "--out", str(out), "--max-ram", "1GiB"]) == 0
    assert "14 of 21 tensors merged in bf16, base nf4-exact" in capsys.readouterr().out
    assert "exists and is not empty" in refusal(capsys, nf4, "--out", out)
    assert "needs at least" in refusal(capsys, nf4, "--out", tmp_path / "b", "--max-ram", "1MiB")
    for option in ("--scores", "--author"):
        assert "no card and no citation" in refusal(capsys, nf4, "--out", tmp_path / "b", option, str(tmp_path))
    assert "holds no valid checkpoint" in refusal(capsys, tmp_path, "--out", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_another_base_is_refused(plain, nf4, base, wide, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "their configs differ" in refusal(capsys, plain, *out, "--llm", base("qwen2"))
    other = tmp_path / "other"
    shutil.copytree(base(), other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert "their model.safetensors differ" in refusal(capsys, plain, *out, "--llm", other)
    quantize_base(wide, tmp_path / "packed")
    assert "differ" in refusal(capsys, nf4, *out, "--llm", tmp_path / "packed")
    assert "held no layer in NF4; allowed: bf16" in refusal(capsys, plain, *out, "--base", "nf4-exact")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "packed"]


def test_a_prepared_base_has_no_original_weights(wide, tmp_path, capsys):
    quantize_base(wide, tmp_path / "packed")
    checkpoint = write_checkpoint(tmp_path / "run", tmp_path / "packed", nf4=True)
    assert "NF4 alone; allowed: nf4-exact" in refusal(capsys, checkpoint, "--out", tmp_path / "out", "--base", "bf16")


def test_rows_that_devices_unpack_differently(base, tmp_path, capsys):
    checkpoint = write_checkpoint(tmp_path / "run", base(), nf4=True)
    line = refusal(capsys, checkpoint, "--out", tmp_path / "out")
    assert "gate_proj has rows of 32 weights" in line
    assert main(["merge", str(checkpoint), "--format", "llm", "--out", str(tmp_path / "out"), "--base", "bf16"]) == 0


def damaged(base, tmp_path, plain, change) -> tuple:
    """Return a checkpoint and a base of the same hashes, as far as samples of them can tell, that `change` damaged."""
    folder = tmp_path / "llm"
    split(base(), folder)
    change(folder)
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(plain, checkpoint)
    manifest = read_manifest(checkpoint)
    identity = base_identity(str(folder), {}, folder)
    base = dataclasses.replace(manifest.base, name=str(folder), files=identity.files)
    (checkpoint / "MANIFEST.json").unlink()
    write_manifest(checkpoint, step=1, world_size=1, facts=dataclasses.replace(manifest, base=base))
    return checkpoint, "--out", tmp_path / "out"


def cut(folder) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lose(folder) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def spoil(folder) -> None:
    file = folder / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "mlp" in name)
    tensors[name][1, 1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [(cut, "truncated"), (lose, "model-00002-of-00003.safetensors is missing"), (spoil, "not finite")],
    ids=["cut", "missing", "nan"],
)
def test_a_damaged_base(base, plain, tmp_path, capsys, change, message):
    arguments = damaged(base, tmp_path, plain, change)
    assert message in refusal(capsys, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "llm"]


@pytest.mark.parametrize(
    ("key", "new"),
    [
        ("layers.0.mlp.up_proj.lora_A.weight", None),
        ("layers.1.mlp.up_proj.lora_B.weight", None),
        ("layers.1.mlp.up_proj.lora_B.weight", "embed_tokens.lora_embedding_B"),
    ],
)
def test_every_tensor_of_the_adapter_is_used_once(plain, tmp_path, capsys, key, new):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(plain, checkpoint)
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    value = tensors.pop(f"base_model.model.model.{key}")
    if new:
        tensors[f"base_model.model.model.{new}"] = value
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    again(checkpoint)
    assert (new or key) in refusal(capsys, checkpoint, "--out", tmp_path / "out")


def test_layers_that_the_base_does_not_have(plain, tmp_path, capsys):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(plain, checkpoint)
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    tensors = {key.replace("layers.1.mlp.up_proj", "layers.7.mlp.up_proj"): value for key, value in tensors.items()}
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    again(checkpoint)
    line = refusal(capsys, checkpoint, "--out", tmp_path / "out")
    assert "layers.7.mlp.up_proj.lora_A.weight belongs to a layer of shape (64, 32)" in line
    assert "has no such linear layer" in line


def again(checkpoint) -> None:
    """Write the manifest of a changed checkpoint anew."""
    manifest = Manifest.from_json(json.loads((checkpoint / "MANIFEST.json").read_text()))
    (checkpoint / "MANIFEST.json").unlink()
    write_manifest(checkpoint, step=1, world_size=1, facts=manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "changes the base"),
        ({"r": 8}, "rank 8"),
        ({"peft_type": "LOHA"}, "peft_type"),
    ],
)
def test_adapters_that_are_more_than_lora(plain, tmp_path, capsys, change, message):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(plain, checkpoint)
    config = json.loads((checkpoint / "adapter_config.json").read_text())
    (checkpoint / "adapter_config.json").write_text(json.dumps(config | change))
    again(checkpoint)
    assert message in refusal(capsys, checkpoint, "--out", tmp_path / "out")


def test_a_full_disk_is_told_before_anything_is_written(plain, tmp_path, capsys, monkeypatch):
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr("aullm_dist.llm.stored.weight_files.shutil.disk_usage", lambda folder: usage(1000))
    assert "0.00 GB are free" in refusal(capsys, plain, "--out", tmp_path / "deep" / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_keeps_what_is_there(plain, tmp_path, capsys, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("aullm_dist.merge.merge.shutil.copyfile", full)
        assert "No space left on device" in refusal(capsys, plain, "--out", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]
    receipt = merge_llm(plain, tmp_path / "out", max_ram=GIB)
    assert receipt.resumed_bytes == receipt.bytes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


class Killed(RuntimeError):
    """Stands for the end of the process."""


def killed(monkeypatch, what: str, checkpoint, out, instead=None) -> None:
    """Merge until `what`, a name in the module, is called."""

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(f"aullm_dist.merge.{what}", instead or die)
        with pytest.raises(Killed):
            merge_llm(checkpoint, out, max_ram=GIB)


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    """A checkpoint on an LLM in several files, the merge that nobody killed, and its receipt."""
    folder = tmp_path_factory.mktemp("undisturbed")
    checkpoint = write_checkpoint(folder / "run", split(base(), folder / "llm"))
    return checkpoint, folder / "whole", merge_llm(checkpoint, folder / "whole", max_ram=GIB)


@pytest.mark.parametrize("after", [1, 2, 5, 9])
def test_a_killed_merge_goes_on_where_it_was(undisturbed, tmp_path, monkeypatch, after):
    checkpoint, whole, expected = undisturbed
    monkeypatch.setattr("aullm_dist.merge.pipeline._FLUSH_BYTES", 1000)
    note, count = Journal.note, iter(range(100))

    def note_and_die(*arguments: object) -> None:
        if next(count) == after:
            raise Killed
        note(*arguments)

    killed(monkeypatch, "journal.Journal.note", checkpoint, tmp_path / "out", note_and_die)
    partial = tmp_path / "out.partial"
    with (partial / "journal.jsonl").open("a") as journal:
        journal.write('{"file": "model-0000')
    receipt = merge_llm(checkpoint, tmp_path / "out", max_ram=GIB)
    assert receipt.files == expected.files
    assert 0 < receipt.resumed_bytes < receipt.bytes
    assert contents(tmp_path / "out") == contents(whole)
    assert not partial.exists()


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_unfinished_work_that_is_not_ours_or_not_what_it_was(plain, tmp_path, monkeypatch):
    expected = merge_llm(plain, tmp_path / "whole", max_ram=GIB)
    killed(monkeypatch, "merge._write_beside", plain, tmp_path / "out")
    with pytest.raises(UserError, match="another unfinished merge .dtype differs"):
        merge_llm(plain, tmp_path / "out", dtype=torch.float32, max_ram=GIB)
    file = tmp_path / "out.partial" / "files" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    receipt = merge_llm(plain, tmp_path / "out", max_ram=GIB)
    assert receipt.files == expected.files
    assert receipt.resumed_bytes == 0
    strange = tmp_path / "new.partial"
    strange.mkdir()
    (strange / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds something else"):
        merge_llm(plain, tmp_path / "new", max_ram=GIB)


def test_a_merge_that_was_killed_among_its_leftovers_is_finished(plain, tmp_path, monkeypatch):
    killed(monkeypatch, "journal.Journal.remove", plain, tmp_path / "out")
    before = contents(tmp_path / "out")
    receipt = merge_llm(plain, tmp_path / "out", max_ram=GIB)
    assert receipt.merged == 14
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen2"])
def test_the_probe_computes_what_the_models_compute(base, wide, tmp_path, monkeypatch, name):
    seen = {}
    logits = merge_probe._logits

    def keep(*given, **options):
        return seen.setdefault(len(seen), logits(*given, **options))

    monkeypatch.setattr(merge_probe, "_logits", keep)
    monkeypatch.setattr(merge_probe, "_WEIGHTS_AT_ONCE", 64 * 64)
    llm, nf4 = (wide, True) if name == "llama" else (base(name), False)
    checkpoint = write_checkpoint(tmp_path / "run", llm, nf4=nf4)
    prompts = ["Action units under test: lip corner puller.", "Evidence:"]
    receipt = merge_llm(checkpoint, tmp_path / "out", probe=prompts, max_ram=GIB)
    errors = receipt.probe["relative_logit_error"]
    assert list(errors) == (["live", "nf4-exact", "bf16"] if nf4 else ["live", "bf16"])
    tokenizer = AutoTokenizer.from_pretrained(llm)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    live = live_model(checkpoint, llm, torch.bfloat16) if nf4 else live_plain(checkpoint, llm)
    for model, found in ((live, seen[1]), (merged, seen[2])):
        for prompt, row in zip(prompts, found, strict=True):
            expected = model(torch.tensor([tokenizer(prompt).input_ids])).logits.float()[0, -len(row) :]
            assert (row - expected).norm() / expected.norm() < 0.02, prompt
    assert errors["bf16"] > 10 * errors["nf4-exact"] if nf4 else errors["bf16"] < 0.1


def live_plain(checkpoint, llm):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm, dtype=torch.bfloat16), checkpoint).eval()


def test_the_probe_of_the_command(nf4, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("Evidence: movement.\n\nStructure: none.\n")
    options = ("--format", "llm", "--out", str(tmp_path / "out"), "--base", "bf16", "--probe")
    assert main(["merge", str(nf4), *options, str(tmp_path / "prompts.txt")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "error of" in line]
    assert [line.rpartition(":")[0].rpartition(" ")[2] for line in lines] == ["arithmetic", "nf4-exact", "bf16"]
    assert "prompt per line" in refusal(capsys, nf4, "--out", tmp_path / "b", "--probe", tmp_path / "none.txt")


def test_a_merge_that_rounds_says_so(base, tmp_path):
    checkpoint = write_checkpoint(tmp_path / "run", base(), "fp32")
    rounded = merge_llm(checkpoint, tmp_path / "rounded", max_ram=GIB)
    assert "rounded to bf16" in rounded.note
    assert "--dtype fp32" in rounded.note
    exact = merge_llm(checkpoint, tmp_path / "exact", dtype=torch.float32, max_ram=GIB)
    assert "rounded" not in exact.note
