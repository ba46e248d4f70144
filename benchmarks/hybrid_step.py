"""Packed against padded step of a tiny hybrid: seconds per clip, forward and backward through the inputs.

    python benchmarks/hybrid_step.py [--type qwen3_5_text] [--prefix 96] [--suffix 16] [--branches 2] [--clips 16]

The architecture is the probe's (`packing/shrink.py`), with random weights and more width. The two paths are compared
first: a benchmark of paths that disagree reports nothing. Times are medians of interleaved repeats.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from aullm_dist.packing import attention
from aullm_dist.packing.forward import decoder_of, packed_hidden, padded_hidden
from aullm_dist.packing.shrink import shrink

TOLERANCE = 1e-4


def main() -> int:
    """Print one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", default="qwen3_5_text")
    parser.add_argument("--width", type=int, default=512)
    for name, value in (("prefix", 96), ("suffix", 16), ("branches", 2), ("clips", 16), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = shrink(CONFIG_MAPPING[options.type]())
    config.hidden_size, config.intermediate_size = options.width, 3 * options.width
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    model.requires_grad_(False)
    inputs = decoder_of(model).config
    prefix = torch.randn(options.prefix, options.width)
    suffixes = torch.randn(options.clips * options.branches, options.suffix, options.width).requires_grad_()

    def step(run: Callable[..., Tensor], implementation: str) -> tuple[float, Tensor]:
        inputs._attn_implementation = implementation
        suffixes.grad = None
        started = time.perf_counter()
        hidden = run(model, prefix, suffixes, [options.suffix - 1])
        hidden.sum().backward()
        return time.perf_counter() - started, torch.cat([hidden.detach().flatten(), suffixes.grad.flatten()])

    paths = {"packed": (packed_hidden, attention.NAME), "padded": (padded_hidden, "sdpa")}
    results = {name: step(*path)[1] for name, path in paths.items()}
    deviation = ((results["packed"] - results["padded"]).norm() / results["padded"].norm()).item()
    assert deviation <= TOLERANCE, f"the paths disagree by {deviation:.2g}"
    times: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(options.repeats):
        for name, path in paths.items():
            times[name].append(step(*path)[0])
    packed, padded = (1000 * statistics.median(times[name]) / options.clips for name in ("packed", "padded"))
    print(
        f"{options.type}: padded {padded:.1f} ms per clip, packed {packed:.1f} ms, {padded / packed:.1f} times as fast "
        f"(P={options.prefix} S={options.suffix} K={options.branches}, {options.clips} clips, deviates {deviation:.1g})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
