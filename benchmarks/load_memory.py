"""Memory of several processes that load an LLM whole, in pieces, or in pieces from NF4 files, and then train two steps.

    python benchmarks/load_memory.py --ranks N [--gib 2.0 | --base DIR] [--json FILE]

Each way of loading is started anew with `accelerate launch` under ZeRO-3. The LLM is a random Llama unless --base names
one. Memory is RssAnon + RssShmem of each process, sampled every 20 ms, above what it held when all libraries were
imported and the process group stood. Exits with 1 if loading in pieces takes more than the bars that are printed.
"""

import argparse
import json
import math
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from common import MIB, ROOT, commit, cores, cpu_name, launch_line, markdown_table, versions, write_json
from safetensors.torch import save_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig

from aullm_dist.llm.pieces.loading import WEIGHTS_AT_ONCE
from aullm_dist.llm.pieces.skeleton import model_without_storage
from aullm_dist.llm.pieces.walk import owners
from aullm_dist.llm.quantization import BLOCK, is_packed, nf4_config
from aullm_dist.llm.stored.weight_files import WeightFiles
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.packing.forward import decoder_of

WORKER = Path(__file__).with_name("load_memory_worker.py")
MODES = {
    "ordinary": "whole on each, then partitioned",
    "pieces": "in pieces, from bf16",
    "prepared": "in pieces, from NF4",
}
WIDTH, MLP, HEADS, KEY_VALUE_HEADS, VOCABULARY = 2048, 5632, 16, 8, 32000
# The packed sequence of a clip: prefix, two branches with their suffixes.
CLIPS, TOKENS = 4, 96 + 2 * 16
BF16 = 2
SLACK = 1.1
READ_LIMIT = 1.1
QUANTISER_BYTES = 16
"""Per weight that is packed at a time. bitsandbytes on CPU: 4 bytes each for the weight, its scaled form and its index
or what it is clamped from; the weight in bf16 and the packed bytes besides."""
PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "bitsandbytes")


@dataclass(frozen=True)
class Sizes:
    """What an LLM takes in bytes, without its vocabulary head."""

    base: int
    """NF4 linear layers with their constants, all else in bf16."""
    constants: int
    embedding: int
    layer: int
    """Of the largest decoder layer, packed."""
    largest_weight: int
    """Weights of the largest linear layer."""
    layers: int
    width: int
    mlp: int


def main() -> int:
    """Measure the ways of loading, print the table, and return 1 if a bar was missed."""
    options = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="aullm-load-memory-", dir=options.scratch) as folder:
        base = options.base or write_base(Path(folder) / "base", options.gib)
        if options.base is None:
            # Of no use to the benchmark, but `quantize` takes no base without one.
            tokenizer = AutoTokenizer.from_pretrained(build_tiny_backbone(Path(folder) / "tokenizer"))
            tokenizer.save_pretrained(base)
        sizes = sizes_of(base)
        checkpoint = sum(tensor.nbytes for tensor in WeightFiles(base).tensors.values())
        prepared, quantise = Path(folder) / "nf4", {}
        if "prepared" in options.modes:
            quantise = quantise_base(base, prepared)
        strategy = write_strategy(Path(folder), sizes)
        rows = {}
        for mode in options.modes:
            source = prepared if mode == "prepared" else base
            rows[mode] = launch(mode, source, strategy, Path(folder), options)
            read_of = sum(tensor.nbytes for tensor in WeightFiles(source).tensors.values())
            for row in rows[mode]:
                row["read_share"] = row["bytes_read"] / read_of
            print(f"{mode} is measured", file=sys.stderr)
    bars = bars_of(sizes, options.ranks)
    misses = [line for mode in rows if mode != "ordinary" for line in missed(mode, rows[mode], bars[mode])]
    report = {
        "benchmark": "load_memory", "command": shlex.join(["python", *sys.argv]), "ranks": options.ranks,
        "date": datetime.now(UTC).date().isoformat(), "checkpoint_bytes": checkpoint, "sizes": vars(sizes),
        "quantize": quantise, "rows": rows, "bars": bars, "missed": misses, "machine": machine(),
    }  # fmt: skip
    print("\n".join([*headline(report, sizes), "", *table(rows), "", *bar_lines(rows, bars)]))
    if options.json:
        write_json(options.json, report)
    for line in misses:
        print(f"MISSED {line}", file=sys.stderr)
    return int(bool(misses))


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, default=2, help="processes (2)")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the random LLM in bf16 (2.0)")
    parser.add_argument("--base", type=Path, metavar="DIR", help="a local LLM in place of the random one")
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the temporary folder goes")
    parser.add_argument("--timeout", type=int, default=1800, metavar="SECONDS", help="longest time of one way")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.ranks < 2:
        parser.error(f"--ranks is {options.ranks}; allowed: 2 or more")
    return options


def write_base(folder: Path, gib: float) -> Path:
    """Write a random Llama, one file per layer, none larger in memory than a layer."""
    folder.mkdir()
    kv = WIDTH * KEY_VALUE_HEADS // HEADS
    linear = {
        "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (kv, WIDTH), "self_attn.v_proj": (kv, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (MLP, WIDTH), "mlp.up_proj": (MLP, WIDTH),
        "mlp.down_proj": (WIDTH, MLP),
    }  # fmt: skip
    layer_bytes = BF16 * sum(math.prod(shape) for shape in linear.values())
    layers = max(2, round((gib * 2**30 - 2 * BF16 * VOCABULARY * WIDTH) / layer_bytes))
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}

    def write(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        tensors = {
            f"{name}.weight": torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            if len(shape) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))

    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (WIDTH,))
    for layer in range(layers):
        shapes = {f"model.layers.{layer}.{name}": shape for name, shape in (linear | norms).items()}
        write(f"layer-{layer:03d}.safetensors", shapes)
    write("embeddings.safetensors", {"model.embed_tokens": (VOCABULARY, WIDTH), "model.norm": (WIDTH,)})
    write("head.safetensors", {"lm_head": (VOCABULARY, WIDTH)})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    LlamaConfig(
        hidden_size=WIDTH, intermediate_size=MLP, num_hidden_layers=layers, num_attention_heads=HEADS,
        num_key_value_heads=KEY_VALUE_HEADS, vocab_size=VOCABULARY, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


def sizes_of(base: Path) -> Sizes:
    """Return what the LLM in a folder takes, from its config alone."""
    config = AutoConfig.from_pretrained(base)
    model = model_without_storage(config, torch.bfloat16, nf4_config(torch.bfloat16))
    numbers, plain, packed_weights = [], 0, 0
    for _, name, module in owners(model):
        if is_packed(module, name):
            numbers.append(module.out_features * module.in_features)
            packed_weights += numbers[-1]
        else:
            plain += BF16 * getattr(module, name).numel()
    layers = decoder_of(model).layers

    def layer_bytes(layer: torch.nn.Module) -> int:
        each = [(m.in_features * m.out_features, m) for _, n, m in owners(layer) if is_packed(m, n)]
        return sum(weights // 2 for weights, _ in each)

    constants = packed_weights // BLOCK + packed_weights // (BLOCK * 256) * 4
    return Sizes(
        base=packed_weights // 2 + constants + plain,
        constants=constants,
        embedding=BF16 * model.get_input_embeddings().weight.numel(),
        layer=max(map(layer_bytes, layers)),
        largest_weight=max(numbers),
        layers=len(layers),
        width=config.hidden_size,
        mlp=config.intermediate_size,
    )


def quantise_base(base: Path, out: Path) -> dict[str, float]:
    """Run `aullm-dist quantize`; return its seconds and largest resident memory, libraries and file pages included."""
    started = time.monotonic()
    command = [sys.executable, "-m", "aullm_dist.cli", "quantize", str(base), "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {"seconds": time.monotonic() - started, "peak_rss_mib": peak / 1024}


def write_strategy(folder: Path, sizes: Sizes) -> Path:
    """Write the shipped zero3.json with its limits scaled to the LLM: its 10^9 live values would hold all of it."""
    strategy = json.loads((ROOT / "configs" / "deepspeed" / "zero3.json").read_text())
    layer = sizes.layer // BF16  # DeepSpeed counts values of the storage dtype
    strategy["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 2 * layer,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": layer,
    }
    path = folder / "zero3_scaled.json"
    path.write_text(json.dumps(strategy))
    return path


def environment() -> dict[str, str]:
    """Return the processes' environment."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    # What is measured is the memory of processes on CPU: GPUs are hidden.
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}


def launch(mode: str, base: Path, strategy: Path, results: Path, options: argparse.Namespace) -> list[dict]:
    """Start the processes of one way of loading and return a row for each."""
    arguments = [str(WORKER), mode, str(base), str(strategy), str(CLIPS), str(TOKENS), str(results)]
    command = [*launch_line(options.ranks), *arguments]
    with open(results / f"{mode}.log", "w+") as log:
        try:
            subprocess.run(command, env=environment(), timeout=options.timeout, check=True, stdout=log, stderr=log)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            log.seek(0)
            said = [line for line in log.read().splitlines() if line.startswith("[rank") or "Error: " in line]
            sys.exit(f"{mode}: failed ({type(error).__name__})\n" + "\n".join(said[-12:]))
    return [json.loads((results / f"{mode}-{rank}.json").read_text()) for rank in range(options.ranks)]


def bars_of(sizes: Sizes, ranks: int) -> dict[str, dict[str, float]]:
    """Return the limits in MiB above the baseline, and of the share of the files that is read."""
    share = sizes.base / ranks
    group = max(sizes.embedding, sizes.layer)
    quantiser = QUANTISER_BYTES * min(WEIGHTS_AT_ONCE, sizes.largest_weight / ranks)
    tokens = CLIPS * TOKENS
    # Inputs of all layers; a recomputed layer with its gradients; float32 copies in norms.
    checkpoints = BF16 * tokens * sizes.width * (sizes.layers + 1)
    one_layer = 2 * BF16 * tokens * (12 * sizes.width + 5 * sizes.mlp)
    weight = BF16 * sizes.largest_weight + 4 * sizes.largest_weight // BLOCK
    # While it is gathered, a group is there as it was received and as it is used.
    gathered = 2 * max(sizes.embedding, 2 * sizes.layer)
    step = share + sizes.constants * (1 - 1 / ranks) + gathered + checkpoints + one_layer + weight
    parts = {
        "base / ranks": share, "gathered": gathered, "inputs of layers": checkpoints, "one layer": one_layer,
        "one weight": weight,
    }  # fmt: skip
    return {
        mode: {
            "load": SLACK * (share + 2 * (group + (quantiser if mode == "pieces" else 0))) / MIB,
            "step": step / MIB,
            "read": READ_LIMIT,
            "step_parts": {name: value / MIB for name, value in parts.items()},
        }
        for mode in ("pieces", "prepared")
    }


def above(row: dict, key: str) -> float:
    """Return MiB of anonymous and shared memory above the baseline."""
    return row[key][0] - row["baseline"][0]


def missed(mode: str, rows: list[dict], bar: dict[str, float]) -> list[str]:
    """Return a line for each bar that a way of loading missed."""
    lines = []
    for row in rows:
        for key in ("load", "step"):
            found = above(row, f"peak_{key}")
            if found > bar[key]:
                what = f"{mode}, rank {row['rank']}: peak of {key} {found:.0f} MiB"
                lines.append(f"{what}, bar {bar[key]:.0f}, {found - bar[key]:.0f} MiB too much")
    share = sum(row["read_share"] for row in rows)
    if share > bar["read"]:
        lines.append(
            f"{mode}: {share:.3f} of the files are read, bar {bar['read']}, {share - bar['read']:.3f} too much"
        )
    return lines


def headline(report: dict, sizes: Sizes) -> list[str]:
    """Return what was measured, and with what."""
    made = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    quantise = report["quantize"]
    lines = [
        f"checkpoint {report['checkpoint_bytes'] / MIB:.0f} MiB; in NF4, without the head, {sizes.base / MIB:.0f} MiB; "
        f"{sizes.layers} layers of {sizes.layer / MIB:.0f} MiB, embeddings {sizes.embedding / MIB:.0f} MiB; "
        f"{report['ranks']} ranks, {CLIPS} x {TOKENS} tokens each",
        f"{made['cpu']}, {made['cores']} cores, Python {sys.version.split()[0]}, {versions}, commit {made['commit']}",
    ]
    if quantise:
        lines.append(f"quantize: {quantise['seconds']:.0f} s, resident peak {quantise['peak_rss_mib']:.0f} MiB")
    return lines


def table(rows: dict[str, list[dict]]) -> list[str]:
    """Return the rows as a Markdown table, MiB above the baseline."""
    head = ("loaded", "rank", "baseline", "after load", "peak of load", "peak of a step", "file pages", "s", "read")
    lines = []
    for mode, ranks in rows.items():
        for row in ranks:
            cells = [MODES[mode], str(row["rank"]), f"{row['baseline'][0]:.0f}"]
            cells += [f"{above(row, key):.0f}" for key in ("divided", "peak_load", "peak_step")]
            cells += [f"{row['peak_load'][1] - row['baseline'][1]:.0f}", f"{row['seconds']:.1f}"]
            cells.append(f"{row['read_share']:.3f}" if row["bytes_read"] else "")
            lines.append(cells)
    return markdown_table(head, lines)


def bar_lines(rows: dict[str, list[dict]], bars: dict[str, dict]) -> list[str]:
    """Return a line per bar and way of loading, with what was found at worst."""
    lines = []
    for mode in (mode for mode in rows if mode in bars):
        for key in ("load", "step"):
            worst = max(above(row, f"peak_{key}") for row in rows[mode])
            lines.append(f"{mode}: peak of {key} at most {bars[mode][key]:.0f} MiB, found {worst:.0f}")
        parts = " + ".join(f"{name} {value:.0f}" for name, value in bars[mode]["step_parts"].items())
        lines.append(f"{mode}: a step is {parts} + constants that all hold")
        share = sum(row["read_share"] for row in rows[mode])
        lines.append(f"{mode}: at most {bars[mode]['read']} of the files are read, found {share:.3f}")
    return lines


def machine() -> dict[str, object]:
    """Return where and with what the numbers are measured."""
    made = {"cores": cores(), "versions": versions(PACKAGES), "commit": commit()}
    return {"cpu": cpu_name() or "unknown CPU", **made}


if __name__ == "__main__":
    sys.exit(main())
