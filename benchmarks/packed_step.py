"""Clips per second of the packed step, the padded step and one forward per branch.

    python benchmarks/packed_step.py [--json FILE]

One step is forward and backward through LoRA on all linear layers of a frozen random Llama with the proportions of
Llama 3 (MLP 3.5 times the width, a quarter of the heads for keys and values), wide enough that its matrix products
dominate as they do in a real one. `K` counts all branches of a clip, the factual one included; one forward per branch
runs K forwards of `batch` rows and one backward over their sum. The three paths are compared in float32 first, outputs
and gradients: a benchmark of paths that disagree reports nothing. Times are medians of interleaved repeats; memory is
measured in a process of its own per path.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import MIB, commit, cpu_name, gpu_names, markdown_table, median, versions, write_json
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from aullm_dist.data.corpora import CORPORA
from aullm_dist.llm.backbone import BackboneOptions, embedding_rms, load_backbone
from aullm_dist.llm.tiny import build_tiny_backbone
from aullm_dist.model.prompt import build_prompt
from aullm_dist.packing.forward import packed_hidden, padded_hidden, per_branch_hidden

PATHS = ("packed", "padded", "per_branch")
TOLERANCE = 2e-5


class Case:
    """One shape: P prefix tokens, S suffix tokens, `batch` clips with K branches each; readout at the last position."""

    def __init__(self, name: str, prefix_tokens: int, suffix_tokens: int, batch: int, branches: int):
        self.name, self.batch, self.branches = name, batch, branches
        self.prefix_tokens, self.suffix_tokens = prefix_tokens, suffix_tokens
        self.suffixes = batch * branches
        self.packed_tokens = prefix_tokens + self.suffixes * suffix_tokens
        self.padded_tokens = self.suffixes * (prefix_tokens + suffix_tokens)

    def inputs(self, llm: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """Return prefix [P, D] and suffixes [K * batch, S, D] of random embeddings; the suffixes require grad."""
        weight = llm.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(0)
        shapes = ((self.prefix_tokens,), (self.suffixes, self.suffix_tokens))
        scale = embedding_rms(llm)
        prefix, suffix = (torch.randn(*shape, weight.shape[1], generator=generator) * scale for shape in shapes)
        return prefix.to(weight.device, weight.dtype), suffix.to(weight.device, weight.dtype).requires_grad_()

    def step(self, llm: torch.nn.Module, path: str) -> Callable[[], Tensor]:
        """Return a function that runs one forward and backward along `path` and returns the hidden states."""
        prefix, suffix = self.inputs(llm)
        readout = [self.suffix_tokens - 1]
        forward = {
            "packed": lambda: packed_hidden(llm, prefix, suffix, readout),
            "padded": lambda: padded_hidden(llm, prefix, suffix, readout),
            "per_branch": lambda: per_branch_hidden(llm, prefix, suffix, readout, clips=self.batch),
        }[path]

        # A random direction: the final norm fixes the length of a hidden state, a loss on that would have no gradient.
        generator = torch.Generator().manual_seed(1)
        direction = torch.randn(self.suffixes, 1, prefix.shape[1], generator=generator).to(prefix.device)

        def run() -> Tensor:
            llm.zero_grad()
            suffix.grad = None
            hidden = forward()
            (hidden.float() * direction).mean().backward()
            return hidden.detach()

        run.suffix = suffix
        return run


def build_llm(folder: Path, hidden: int, layers: int, device: torch.device) -> tuple[torch.nn.Module, object]:
    """Return a random Llama with LoRA of rank 16, and the tokenizer of the shipped tiny backbone."""
    build_tiny_backbone(folder, hidden=32, layers=1, heads=2)
    heads = max(4, hidden // 128)
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        vocab_size=1024,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    backbone = load_backbone(folder, BackboneOptions(lora_rank=16))
    for name, parameter in backbone.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    return backbone.model.to(device).train(), backbone.tokenizer


def cases(tokenizer: object, batch: int) -> list[Case]:
    """Return the fixed shapes, then those of the shipped prompt (CASME II's AUs, the tiny backbone's tokenizer)."""
    prompt = build_prompt(CORPORA["casme2"].aus, tokenizer)
    shipped = (prompt.prefix_tokens, prompt.suffix_tokens)
    return [
        Case(f"{name} K={k}", *shape, batch, k)
        for name, shape in (("fixed", (96, 16)), ("shipped prompt", shipped))
        for k in (2, 3)
    ]


def largest_deviation(llm: torch.nn.Module, case: Case) -> float:
    """Return how far outputs, LoRA and soft-token gradients of the paths lie apart, relative to the padded ones."""
    results = {}
    for path in PATHS:
        step = case.step(llm, path)
        hidden = step()
        lora = torch.cat([p.grad.flatten() for p in llm.parameters() if p.requires_grad])
        results[path] = (hidden, lora.clone(), step.suffix.grad)
    return max(
        ((got - want).norm() / want.norm()).item()
        for path in PATHS
        for got, want in zip(results[path], results["padded"], strict=True)
    )


def time_case(llm: torch.nn.Module, case: Case, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of `repeats` steps per path, one path after the other in turn; all have run before."""
    steps = {path: case.step(llm, path) for path in PATHS}
    seconds: dict[str, list[float]] = {path: [] for path in PATHS}
    for _ in range(repeats):
        for path, step in steps.items():
            _synchronize()
            started = time.perf_counter()
            step()
            _synchronize()
            seconds[path].append(time.perf_counter() - started)
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def step_memory_mib(step: Callable[[], Tensor]) -> float:
    """Return the peak MiB of one step beyond what was held before it (CUDA allocator, otherwise sampled RSS)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    peak = before = _rss_bytes()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, _rss_bytes())

    sampler = threading.Thread(target=sample)
    sampler.start()
    step()
    done.set()
    sampler.join()
    return (peak - before) / MIB


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def measure_memory(path: str, options: argparse.Namespace) -> list[float]:
    """Measure one path in a fresh process, so that no other path's freed memory is counted or reused."""
    command = [sys.executable, __file__, "--memory-of", path]
    for name in ("hidden", "layers", "batch", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    # glibc keeps freed blocks below this size, which would hide what the next shape needs.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, object]:
    """Return where and with what the numbers were measured."""
    return {
        "device": gpu_names()[0] if torch.cuda.is_available() else cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions(("torch", "transformers", "peft")),
        "commit": commit(),
    }


def run_case(llm: torch.nn.Module, case: Case, deviation: float, memory: dict[str, float], repeats: int) -> dict:
    """Time one case and return its JSON row."""
    seconds = time_case(llm, case, repeats)
    middle = {path: median(values) for path, values in seconds.items()}
    return {
        "name": case.name,
        "prefix_tokens": case.prefix_tokens,
        "suffix_tokens": case.suffix_tokens,
        "batch": case.batch,
        "branches": case.branches,
        "readout": "last",
        "tokens": {"packed": case.packed_tokens, "padded": case.padded_tokens},
        "speedup_ceiling": case.padded_tokens / case.packed_tokens,
        "largest_relative_deviation": deviation,
        "seconds": seconds,
        "clips_per_second": {path: case.batch / value for path, value in middle.items()},
        "speedup_vs_per_branch": middle["per_branch"] / middle["packed"],
        "speedup_vs_padded": middle["padded"] / middle["packed"],
        "peak_memory_mib": memory,
    }


def table(rows: list[dict]) -> str:
    """Return the rows as a markdown table."""
    head = ["shape", "P", "S", "clips/s packed", "padded", "per branch", "vs per branch", "vs padded", "ceiling"]
    head += ["MiB packed", "padded", "per branch"]
    lines = []
    for row in rows:
        clips, memory = row["clips_per_second"], row["peak_memory_mib"]
        cells = [row["name"], row["prefix_tokens"], row["suffix_tokens"], *(f"{clips[path]:.1f}" for path in PATHS)]
        cells += [f"{row[key]:.2f}x" for key in ("speedup_vs_per_branch", "speedup_vs_padded", "speedup_ceiling")]
        cells += [f"{memory[path]:.0f}" for path in PATHS]
        lines.append(cells)
    return "\n".join(markdown_table(head, lines))


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--hidden", type=int, default=1024, help="LLM width, a multiple of 512")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="clips per step")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="CPU threads")
    parser.add_argument("--memory-of", choices=PATHS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Check, time, print and write."""
    options = parse_arguments()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # The comparison wants plain float32.
    torch.backends.cuda.matmul.allow_tf32 = False
    with tempfile.TemporaryDirectory() as folder:
        llm, tokenizer = build_llm(Path(folder), options.hidden, options.layers, device)
    shapes = cases(tokenizer, options.batch)
    if options.memory_of:
        Case("warm-up", 16, 4, 2, 2).step(llm, options.memory_of)()
        print(json.dumps([step_memory_mib(case.step(llm, options.memory_of)) for case in shapes]))
        return
    deviations = [largest_deviation(llm, case) for case in shapes]
    for case, deviation in zip(shapes, deviations, strict=True):
        if not deviation <= TOLERANCE:
            sys.exit(f"{case.name}: the paths disagree by {deviation:.2g} (allowed: {TOLERANCE}); nothing is reported")
    if device.type == "cuda":
        for parameter in (p for p in llm.parameters() if not p.requires_grad):
            parameter.data = parameter.data.to(torch.bfloat16)
        for path in PATHS:
            shapes[0].step(llm, path)()
    memory = {path: measure_memory(path, options) for path in PATHS}
    rows = [
        run_case(llm, case, deviations[i], {path: memory[path][i] for path in PATHS}, options.repeats)
        for i, case in enumerate(shapes)
    ]
    headline = {key: rows[0][key] for key in ("speedup_vs_per_branch", "speedup_vs_padded", "peak_memory_mib")}
    dtype = str(llm.get_input_embeddings().weight.dtype).removeprefix("torch.")
    model = {
        "architecture": "llama",
        "hidden": options.hidden,
        "layers": options.layers,
        "lora_rank": 16,
        "dtype": dtype,
    }
    report = {"benchmark": "packed_step", **headline, "rows": rows, "model": model, "machine": machine()}
    print(table(rows))
    if options.json:
        write_json(options.json, report)


if __name__ == "__main__":
    main()
