"""Compares the interpreter's results on a CPU with those of a GPU.

    TRITON_INTERPRET=1 python kernels/benchmarks/compare.py --write build/kernels_cpu.npz     # on a CPU
    python kernels/benchmarks/compare.py --read build/kernels_cpu.npz                         # on a GPU
    python kernels/benchmarks/compare.py --run odd                                            # one size, for sanitizers

The file holds the results and gradients of fixed draws, so that the machine with the GPU need not interpret: the
interpreter of triton 3.6 does not run with numpy 2.4.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np
import torch
from aullm_kernels import EdgeTable, evidence_pool, graph_attention
from torch import Tensor

TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}
SIZES = {
    # clips, cells, channels, heads, width of the join; feature rows, nodes, edges, heads, features
    "model": ((3, 162, 64, 4, 256), (2, 8, 40, 4, 16)),
    "odd": ((2, 33, 20, 3, 5), (3, 17, 40, 1, 20)),
}


def cases(size: str) -> dict[str, tuple]:
    """Return each case: the function on its differentiable inputs, and these as float32."""
    (clips, num_cells, channels, pool_heads, join), (rows, nodes, num_edges, heads, features) = SIZES[size]
    # The same bits on every machine, which torch's normal draws are not.
    generator = np.random.RandomState(0)
    draw = lambda *shape: torch.from_numpy((4 * generator.random_sample(shape) - 2).astype(np.float32))  # noqa: E731
    chance = lambda *shape: torch.from_numpy(generator.random_sample(shape) > 0.2)  # noqa: E731
    below = lambda high, count: torch.from_numpy(generator.randint(0, high, count, dtype=np.int64))  # noqa: E731
    regions = torch.arange(num_cells) % 9
    valid = chance(clips, num_cells)
    pool = {
        "cells": draw(clips, num_cells, channels),
        "queries": draw(clips, pool_heads, channels),
        "join": draw(clips, join),
    }
    edges = EdgeTable(*(below(high, num_edges) for high in (nodes, nodes, 5)), nodes)
    index, mask = below(rows, 4), chance(4, num_edges)
    graph = {
        "xl": draw(rows, nodes, heads, features),
        "xr": draw(rows, nodes, heads, features),
        "relation_embedding": draw(5, heads, features),
        "attention": draw(heads, features),
        "gate": draw(5, heads),
        "strength": draw(4, num_edges),
    }

    def run_pool(kernels: str, device: str, **inputs: Tensor) -> Tensor:
        return evidence_pool(**inputs, regions=regions.to(device), valid=valid.to(device), implementation=kernels)

    def run_graph(kernels: str, device: str, **inputs: Tensor) -> Tensor:
        rest = {"mask": mask.to(device), "branch_index": index.to(device)}
        return graph_attention(**inputs, edges=edges.to(device), **rest, implementation=kernels)

    return {"evidence_pool": (run_pool, pool), "graph_attention": (run_graph, graph)}


def results(size: str, kernels: str, device: str) -> dict[str, np.ndarray]:
    """Return results and gradients in float32 by size, op, type and name; and a digest of the inputs."""
    found = {}
    for op, (call, inputs) in cases(size).items():
        drawn = hashlib.sha256(b"".join(value.numpy().tobytes() for value in inputs.values())).digest()
        found[f"{size}/{op}/inputs"] = np.frombuffer(drawn, dtype=np.uint8)
        for name in TOLERANCES:
            dtype = getattr(torch, name)
            leaves = {key: value.detach().clone().to(device, dtype).requires_grad_() for key, value in inputs.items()}
            out = call(kernels, device, **leaves)
            weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(device, out.dtype)
            out.backward(weights)
            for key, value in {"out": out, **{key: leaf.grad for key, leaf in leaves.items()}}.items():
                found[f"{size}/{op}/{name}/{key}"] = value.detach().float().cpu().numpy()
    return found


def differences(expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> list[tuple[str, float, float]]:
    """Return name, relative difference and what is allowed of each array.

    Raises:
        ValueError: The file was not made from these draws.
    """
    rows = []
    for name, value in found.items():
        if name not in expected or expected[name].shape != value.shape:
            raise ValueError(f"the file has no {name} of shape {value.shape}: write it with this version")
        if name.endswith("/inputs"):
            if not np.array_equal(value, expected[name]):
                raise ValueError(f"{name}: the file was made from other draws")
            continue
        norm = max(float(np.linalg.norm(expected[name])), 1e-9)
        rows.append((name, float(np.linalg.norm(value - expected[name])) / norm, TOLERANCES[name.split("/")[2]]))
    return rows


def main(argv: list[str] | None = None) -> int:
    """Write, compare or run; 1 if something differs by more than its tolerance, 2 if the file does not fit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE", help="interpret, and write the results")
    action.add_argument("--read", type=Path, metavar="FILE", help="run, and compare with the file")
    action.add_argument("--run", choices=SIZES, help="run one size forward and backward, and compare nothing")
    default = "triton" if torch.cuda.is_available() else "torch"
    parser.add_argument(
        "--kernels", choices=("triton", "interpret", "torch"), default=default, help="what runs (here: %(default)s)"
    )
    args = parser.parse_args(argv)
    if args.read and not args.read.is_file():
        parser.error(f"--read is {args.read}, allowed is a file that --write made")
    kernels = "interpret" if args.write else args.kernels
    device = "cuda" if kernels == "triton" else "cpu"
    found = {}
    for size in [args.run] if args.run else SIZES:
        found |= results(size, kernels, device)
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(args.write, **found)
    if not args.read:
        return 0
    with np.load(args.read) as expected:
        try:
            rows = differences(dict(expected), found)
        except ValueError as error:
            print(f"compare: {error}", file=sys.stderr)
            return 2
    for name, difference, allowed in rows:
        print(f"{'ok ' if difference <= allowed else 'BAD'} {name:<50} {difference:.1e} (allowed {allowed:.0e})")
    return int(any(not difference <= allowed for _, difference, allowed in rows))


if __name__ == "__main__":
    sys.exit(main())
