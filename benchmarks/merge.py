"""Speed, memory and exactness of `aullm-dist merge`, beside PEFT's merge_and_unload and a plain copy of the files.

    python benchmarks/merge.py [--gib 2.0] [--rank 16] [--repeats 1] [--scratch DIR] [--json FILE]

The LLM is a random Llama with the layers of Llama 3.1 8B in one file of bf16 (of width 1024 for the probe), the adapter
a random LoRA on every linear layer. Each way runs in a process of its own, the files in the page cache; time is counted
from the first read until everything is on disk, imports left out. Memory is RssAnon + RssShmem above what the libraries
took; of repeats the largest is told, of seconds the median. Exits with 1 if a bar that is printed was missed.
"""

import argparse
import json
import math
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path

import torch
from common import GIB, MIB, commit, cores, cpu_name, markdown_table, median, versions, write_json
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import LlamaConfig

from aullm_dist.checkpoint.base_identity import base_identity
from aullm_dist.checkpoint.entries import ManifestFacts
from aullm_dist.checkpoint.manifest import write_manifest
from aullm_dist.llm.stored.weight_files import WeightFiles
from aullm_dist.llm.tiny import build_tiny_backbone, tiny_parts
from aullm_dist.signed import json_bytes

WORKER = Path(__file__).with_name("merge_worker.py")
WIDTH, MLP, HEADS, KEY_VALUE_HEADS, VOCABULARY = 4096, 14336, 32, 8, 32000
BUDGETS = (512 * MIB, GIB, 4 * GIB)
PROBED_WIDTH, PROBED_LAYERS = 1024, 6
FASTER, EXACT = 3.0, 1.2
BASES = ("bf16", "nf4-exact")
PEFT_OF = {"copy": "peft", "peft": "peft", "bf16": "peft", "peft-nf4": "peft-nf4", "nf4-exact": "peft-nf4"}
"""PEFT's own merge onto the same base, beside which each way stands."""
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "safetensors")
COMPARED_WEIGHTS = 2**24


def main() -> int:
    """Measure every way, print the table, and return 1 if a bar was missed."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="aullm-merge-", dir=options.scratch) as name:
        folder = Path(name)
        base, shapes = write_base(folder / "base", options.gib)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        plain, nf4 = (
            write_checkpoint(folder / kind, base, shapes, options.rank, kind == "nf4") for kind in ("bf16", "nf4")
        )
        rows = [row for _ in range(options.repeats) for row in measure_all(folder, base, plain, nf4)]
        small = build_tiny_backbone(folder / "small", hidden=PROBED_WIDTH, layers=PROBED_LAYERS)
        linear = {n.removesuffix(".weight"): t.shape for n, t in WeightFiles(small).tensors.items() if "_proj" in n}
        trained = write_checkpoint(folder / "trained", small, linear, options.rank, nf4=True)
        rows.append(measure("probe", small, trained, folder / "probed", BUDGETS[0]))
        report = {
            "benchmark": "merge", "command": shlex.join(["python", *sys.argv]), "bytes": size, "rows": rows,
            "different_tensors": different(folder / "peft", folder / "bf16-merged"),
            "date": datetime.now(UTC).date().isoformat(), "machine": machine(),
        }  # fmt: skip
    report["missed"] = missed(report)
    print("\n".join(describe(report)))
    if options.json:
        write_json(options.json, report)
    for line in report["missed"]:
        print(f"MISSED {line}", file=sys.stderr)
    return int(bool(report["missed"]))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--gib", type=float, default=2.0, help="size of the random LLM in bf16 (2.0)")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank (16)")
    parser.add_argument("--repeats", type=int, default=1, help="times that each way is measured; medians are told (1)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the temporary folder goes; takes 4 x --gib")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def write_base(folder: Path, gib: float) -> tuple[Path, dict[str, tuple[int, int]]]:
    """Write a random Llama in one file, tensor by tensor; return its folder and the shapes of its linear layers."""
    folder.mkdir()
    kv = WIDTH * KEY_VALUE_HEADS // HEADS
    linear = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (kv, WIDTH), "self_attn.v_proj": (kv, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH),
        "mlp.down_proj": (WIDTH, MLP),
    }  # fmt: skip
    layer_bytes = 2 * sum(math.prod(shape) for shape in linear.values())
    layers = max(1, round((gib * GIB - 4 * VOCABULARY * WIDTH) / layer_bytes))
    projections = {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in linear.items()}
    norms = [
        f"model.layers.{n}.{name}" for n in range(layers) for name in ("input_layernorm", "post_attention_layernorm")
    ]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (VOCABULARY, WIDTH), **projections}
    shapes |= dict.fromkeys([*norms, "model.norm"], (WIDTH,)) | {"lm_head": (VOCABULARY, WIDTH)}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[f"{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            values = torch.ones(shape)
            if len(shape) > 1:
                values.normal_(0, 0.02, generator=generator)
            file.write(values.bfloat16().view(torch.uint8).numpy())
    LlamaConfig(
        hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS, vocab_size=VOCABULARY, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    tiny_parts()[1].save_pretrained(folder)
    return folder, projections


def write_checkpoint(root: Path, base: Path, shapes: Mapping[str, tuple[int, int]], rank: int, nf4: bool) -> Path:
    """Write what a merge reads of a checkpoint: a random adapter, and the manifest."""
    folder = root / "step-00000001"
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        name = f"base_model.model.{module}.lora"
        tensors[f"{name}_A.weight"] = torch.empty(rank, columns).uniform_(-1, 1, generator=generator) / columns**0.5
        tensors[f"{name}_B.weight"] = torch.empty(rows, rank).normal_(0, 0.01, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM", inference_mode=True)
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in lora.to_dict().items()}
    (folder / "adapter_config.json").write_bytes(json_bytes(config))
    facts = ManifestFacts(
        quantized_modules=tuple(sorted(shapes)) if nf4 else (),
        base=base_identity(str(base), LlamaConfig.from_pretrained(base).to_dict(), base),
        config={"training": {"precision": "bf16"}},
    )
    write_manifest(folder, step=1, world_size=1, facts=facts)
    return folder


def measure_all(folder: Path, base: Path, plain: Path, nf4: Path) -> Iterator[dict]:
    """Yield a row for each way; PEFT's result and our own of the same kind stay there."""
    yield measure("copy", base, plain, folder / "copy", 0)
    shutil.rmtree(folder / "copy")
    yield measure("peft", base, plain, renewed(folder / "peft"), 0)
    for budget in BUDGETS:
        yield measure("bf16", base, plain, renewed(folder / "bf16-merged"), budget)
    yield measure("peft-nf4", base, nf4, folder / "peft-nf4", 0)
    shutil.rmtree(folder / "peft-nf4")
    exact = folder / "nf4-merged"
    for budget in BUDGETS:
        yield measure("nf4-exact", base, nf4, renewed(exact), budget)
    shutil.rmtree(exact)


def renewed(folder: Path) -> Path:
    """Remove a folder, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)
    return folder


def measure(mode: str, base: Path, checkpoint: Path, out: Path, budget: int) -> dict:
    """Run one way in a process of its own and return its row."""
    result = out.with_suffix(".json")
    command = [sys.executable, str(WORKER), mode, str(base), str(checkpoint), str(out), str(budget), str(result)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{mode}: failed\n" + "\n".join(done.stderr.splitlines()[-12:]))
    row = json.loads(result.read_text())
    print(f"{mode}: {row['on_disk']:.1f} s", file=sys.stderr)
    return row


def different(one: Path, other: Path) -> list[str]:
    """Return the names of tensors that are not equal byte by byte, or are in one of two folders alone."""
    files = [WeightFiles(folder) for folder in (one, other)]
    names = sorted(files[0].tensors.keys() ^ files[1].tensors.keys())
    for name in files[0].tensors.keys() & files[1].tensors.keys():
        stored = files[0][name]
        steps = range(0, stored.numel, COMPARED_WEIGHTS)
        parts = ([f.read(name, a, min(a + COMPARED_WEIGHTS, stored.numel)) for f in files] for a in steps)
        if stored.dtype != files[1][name].dtype or not all(torch.equal(*pair) for pair in parts):
            names.append(name)
    for each in files:
        each.close()
    return names


def speed(report: Mapping, mode: str, budget: int = 0, key: str = "on_disk") -> float:
    """Return the median MB/s of a way."""
    chosen = [row[key] for row in report["rows"] if row["mode"] == mode and budget in (0, row["max_ram_bytes"])]
    return report["bytes"] / 1e6 / median(chosen)


def of_peft(report: Mapping, mode: str, budget: int = 0) -> float:
    """Return a way's MB/s as a multiple of those of PEFT's merge onto the same base."""
    return speed(report, mode, budget) / speed(report, PEFT_OF[mode])


def exactness(report: Mapping) -> float:
    """Return the error of nf4-exact as a multiple of the trained model's own in the arithmetic of the run."""
    return max(error["nf4-exact"] / error["live"] for error in errors(report))


def errors(report: Mapping) -> list[dict[str, float]]:
    """Return the relative logit errors of each probe."""
    rows = [row for row in report["rows"] if row["mode"] == "probe"]
    return [row["receipt"]["probe"]["relative_logit_error"] for row in rows]


def missed(report: Mapping) -> list[str]:
    """Return a line for each bar that was missed."""
    lines = []
    for base in BASES:
        ratio = of_peft(report, base)
        if ratio < FASTER:
            lines.append(f"{base}: {ratio:.2f} times PEFT's MB/s, bar {FASTER}")
    for row in report["rows"]:
        if row["max_ram_bytes"] and row["peak_bytes"] > row["max_ram_bytes"]:
            found, bar = row["peak_bytes"] / MIB, row["max_ram_bytes"] / MIB
            lines.append(f"{row['mode']}: peak {found:.0f} MiB, bar {bar:.0f}, {found - bar:.0f} MiB too much")
    if exactness(report) > EXACT:
        lines.append(f"nf4-exact: {exactness(report):.2f} times the trained model's own error, bar {EXACT}")
    if report["different_tensors"]:
        lines.append(
            f"bf16: {len(report['different_tensors'])} tensors are not PEFT's, first {report['different_tensors'][0]}"
        )
    return lines


def describe(report: Mapping) -> list[str]:
    """Return what was measured, and with what."""
    made = report["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    head = ("way", "--max-ram MiB", "peak MiB", "s", "s on disk", "MB/s", "of PEFT", "CPU s")
    ways = dict.fromkeys((row["mode"], row["max_ram_bytes"]) for row in report["rows"] if row["mode"] != "probe")
    rows = []
    for mode, budget in ways:
        same = [row for row in report["rows"] if (row["mode"], row["max_ram_bytes"]) == (mode, budget)]
        seconds = (median([row[key] for row in same]) for key in ("returned", "on_disk"))
        rows.append((
            mode, f"{budget / MIB:.0f}" if budget else "", f"{max(row['peak_bytes'] for row in same) / MIB:.0f}",
            *(f"{value:.1f}" for value in seconds), f"{speed(report, mode, budget):.0f}",
            f"{of_peft(report, mode, budget):.2f}", f"{median([row['cpu_seconds'] for row in same]):.1f}",
        ))  # fmt: skip
    return [
        f"{report['bytes'] / 1e9:.2f} GB of bf16 in one file; {made['cpu']}, {made['cores']} cores, Python "
        f"{sys.version.split()[0]}, {packages}, commit {made['commit']}",
        "",
        *markdown_table(head, rows),
        "",
        *(f"{base}: at least {FASTER} times PEFT's MB/s, found {of_peft(report, base):.2f}" for base in BASES),
        f"bf16: every tensor PEFT's byte by byte, found {len(report['different_tensors'])} that are not",
        "every merge: peak at most --max-ram",
        f"nf4-exact, LLM of width {PROBED_WIDTH}: at most {EXACT} times the trained model's own error, found "
        f"{exactness(report):.2f}: " + ", ".join(f"{name} {error:.4f}" for name, error in errors(report)[0].items()),
    ]


def machine() -> dict[str, object]:
    """Return where and with what the numbers are measured."""
    return {"cpu": cpu_name() or "unknown CPU", "cores": cores(), "versions": versions(PACKAGES), "commit": commit()}


if __name__ == "__main__":
    sys.exit(main())
