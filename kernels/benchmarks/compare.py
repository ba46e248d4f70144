"""The interpreter's results on a CPU, and a GPU's beside them.

    TRITON_INTERPRET=1 python kernels/benchmarks/compare.py --write build/kernels_cpu.npz     # on a CPU
    python kernels/benchmarks/compare.py --read build/kernels_cpu.npz                         # on a GPU

The file holds inputs, results and gradients of fixed draws, so that the GPU need not interpret: the interpreter of
triton 3.6 does not run with numpy 2.4.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from aullm_kernels import EdgeTable, evidence_pool, graph_attention
from torch import Tensor

_TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-2}


def cases() -> dict[str, tuple]:
    """Return each case: the function on its differentiable inputs, and these as float32."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    regions = torch.arange(162) % 9
    valid = torch.rand(3, 162, generator=generator) > 0.2
    pool = {"cells": draw(3, 162, 64), "queries": draw(3, 4, 64), "join": draw(3, 256)}
    nodes, num_edges = 8, 40
    columns = (torch.randint(0, high, (num_edges,), generator=generator) for high in (nodes, nodes, 5))
    edges = EdgeTable(*columns, nodes)
    index = torch.tensor([1, 0, 1, 1])
    mask = torch.rand(4, num_edges, generator=generator) > 0.2
    graph = {
        "xl": draw(2, nodes, 4, 16),
        "xr": draw(2, nodes, 4, 16),
        "relation_embedding": draw(5, 4, 16),
        "attention": draw(4, 16),
        "gate": draw(5, 4),
        "strength": draw(4, num_edges),
    }

    def run_pool(kernels: str, device: str, **inputs: Tensor) -> Tensor:
        return evidence_pool(**inputs, regions=regions.to(device), valid=valid.to(device), implementation=kernels)

    def run_graph(kernels: str, device: str, **inputs: Tensor) -> Tensor:
        rest = {"mask": mask.to(device), "branch_index": index.to(device)}
        return graph_attention(**inputs, edges=edges.to(device), **rest, implementation=kernels)

    return {"evidence_pool": (run_pool, pool), "graph_attention": (run_graph, graph)}


def results(kernels: str, device: str) -> dict[str, np.ndarray]:
    """Return result and gradients of all cases in float32, by case, type and name."""
    found = {}
    for op, (call, inputs) in cases().items():
        for name in _TOLERANCES:
            dtype = getattr(torch, name)
            leaves = {key: value.detach().clone().to(device, dtype).requires_grad_() for key, value in inputs.items()}
            out = call(kernels, device, **leaves)
            weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(device, out.dtype)
            out.backward(weights)
            for key, value in {"out": out, **{key: leaf.grad for key, leaf in leaves.items()}}.items():
                found[f"{op}/{name}/{key}"] = value.detach().float().cpu().numpy()
    return found


def main() -> int:
    """Write or compare; 1 if something differs by more than its tolerance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, metavar="FILE", help="interpret, and write the results")
    action.add_argument("--read", type=Path, metavar="FILE", help="run on the GPU, and compare with the file")
    parser.add_argument("--kernels", default="triton", help="implementation to compare (default: triton)")
    args = parser.parse_args()
    if args.write:
        args.write.parent.mkdir(parents=True, exist_ok=True)
        np.savez(args.write, **results("interpret", "cpu"))
        return 0
    worst = 0
    with np.load(args.read) as expected:
        for name, value in results(args.kernels, "cuda" if args.kernels == "triton" else "cpu").items():
            error = np.linalg.norm(value - expected[name]) / max(np.linalg.norm(expected[name]), 1e-9)
            allowed = _TOLERANCES[name.split("/")[1]]
            worst |= not error <= allowed
            print(f"{'ok ' if error <= allowed else 'BAD'} {name}: {error:.1e} (allowed {allowed:.0e})")
    return int(worst)


if __name__ == "__main__":
    sys.exit(main())
