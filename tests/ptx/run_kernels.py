"""Run what Triton compiles of our kernels on the CPU, and compare results and gradients with float64.

    python tests/ptx/run_kernels.py [--target 9.0] [--only WORD ...] [--every N]

Every call of `aullm_kernels.aot.cases` is made with a few clips or rows, forward and backward. What would have been
launched is compiled for the target, and the PTX is executed by `machine`. Needs triton, not a GPU; the interpreter must
be off. Prints a line for each call and ends with 1 where an error is above its bar, or memory is used wrongly.
"""

import argparse
import functools
import itertools
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).parents[1])
import kernel_tools
import pytest
import torch
from aullm_kernels import EdgeTable, aot, evidence_kernels, graph_kernels, ops, reference
from aullm_kernels.launch import OPTIONS
from aullm_kernels.tables import TARGET, families
from ptx.machine import Machine
from ptx.memory import GlobalMemory, MemoryFaultError
from ptx.program import Program, UnknownPtxError, read

BARS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative Frobenius error of a result or a gradient, as for compiled kernels in tests/ops."""
CELLS, NODES, ROWS = 37, 19, 2


@functools.cache
def _compiled(key: str, source: Any, target: str, options: tuple) -> tuple[Any, int, int]:
    import triton
    from triton.backends.compiler import GPUTarget

    found = triton.compile(source, target=GPUTarget("cuda", int(target.replace(".", "")), 32), options=dict(options))
    return read(found.asm["ptx"]), 32 * found.metadata.num_warps, found.metadata.shared


def launcher(target: str, done: list[int], plant: str | None = None):
    """Return what launches a kernel on the machine, in the place of `launch.launch`; `done` counts programs."""

    def launch(kernel: Any, grid: tuple, *arguments: Any, device: Any, tile: Any, **constants: Any) -> None:
        if 0 in grid:
            return
        source = aot._source(aot._Launch(kernel, arguments, constants, tile))
        options = tuple({**OPTIONS, **tile.options()}.items())
        program, threads, shared = _compiled(source.hash(), source, target, options)
        if plant is not None:
            program = without(program, plant)
        memory = GlobalMemory(value for value in arguments if isinstance(value, torch.Tensor))
        given = [
            memory.address(value) if isinstance(value, torch.Tensor) else value
            for name, value in zip(kernel.arg_names, arguments, strict=False)
            if source.signature[name] != "constexpr"
        ]
        # Memory for what a kernel may spill beyond its own, which these do not ask for.
        given += [0] * (len(program.parameters) - len(given))
        sizes = (*grid, 1, 1)[:3]
        for number, place in enumerate(itertools.product(*map(range, sizes))):
            memory.program = number
            Machine(program, threads, shared, memory, given, place, sizes).run()
            done.append(number)
        memory.copy_back()

    return launch


def without(program: Program, opcode: str) -> Program:
    """Return a kernel that lacks an instruction: it lets threads pass where they would do something."""
    left = [replace(s, guard=None, opcode="nop") if s.opcode == opcode else s for s in program.statements]
    return replace(program, statements=left)


def errors(case: aot.Case) -> dict[str, float]:
    """Make the call of a case, forward and backward, and return the error of every result."""
    torch.manual_seed(sum(map(ord, str(case))))
    inputs, options, function = (_evidence if case.op == "evidence_pool" else _graph)(case)
    frozen = {"cells": inputs.pop("cells")} if case.mode == "frozen" else {}
    plain, compiled = getattr(reference, function), getattr(ops, function)
    result = plain(**inputs, **frozen, **options)
    grad = torch.randn(result.shape).to(result.dtype)
    wide, still = ({name: value.double() for name, value in given.items()} for given in (inputs, frozen))
    expected = kernel_tools.gradients(lambda **given: plain(**given, **still, **options), wide, grad.double())
    with pytest.MonkeyPatch.context() as patch, kernel_tools.poisoned_and_fenced(patch):
        found = kernel_tools.gradients(
            lambda **given: compiled(**given, **frozen, **options, implementation="triton"), inputs, grad
        )
    return {name: kernel_tools.error(value, expected[name]) for name, value in found.items()}


def _evidence(case: aot.Case) -> tuple[dict, dict, str]:
    """As `aot` calls it, with fewer clips and cells."""
    dtype, channels = aot._DTYPES[case.dtype], dict(case.size)["channels"]
    cells = torch.randn(ROWS, CELLS, channels).to(dtype)
    if case.mode == "transposed":
        cells = cells.transpose(1, 2).contiguous().transpose(1, 2)
    inputs = {"cells": cells, "queries": torch.randn(ROWS, 4, channels).to(dtype)}
    if case.mode != "plain":
        inputs["join"] = torch.randn(ROWS, 256).to(dtype)
    valid = None if case.mode in ("plain", "transposed") else torch.rand(ROWS, CELLS) > 0.2
    return inputs, {"regions": torch.arange(CELLS) % 9, "valid": valid, "num_regions": 9}, "evidence_pool"


def _graph(case: aot.Case) -> tuple[dict, dict, str]:
    """As `aot` calls it, with fewer rows and nodes: one node has all its slots, others fewer."""
    dtype, size = aot._DTYPES[case.dtype], dict(case.size)
    features, degree = size["features"], size["degree"]
    target = torch.cat([torch.zeros(degree, dtype=torch.int64), torch.randint(1, NODES, (NODES,))])
    taken = torch.zeros(NODES, dtype=torch.int64)
    kept = []
    for index, node in enumerate(target.tolist()):
        if taken[node] < degree:
            taken[node] += 1
            kept.append(index)
    target = target[kept]
    edges = EdgeTable(target, torch.arange(len(target)) % NODES, torch.randint(0, 5, target.shape), NODES)
    shared = case.mode == "branches"
    branches = 3 if shared else ROWS
    shapes = {"relation_embedding": (5, 2, features), "attention": (2, features), "gate": (5, 2)}
    inputs = {name: torch.randn(ROWS, NODES, 2, features).to(dtype) for name in ("xl", "xr")}
    inputs |= {name: torch.randn(shape) for name, shape in shapes.items()}
    options: dict[str, Any] = {"edges": edges}
    if shared:
        inputs["strength"] = torch.randn(branches, edges.num_edges).to(dtype)
        options["mask"] = (torch.rand(1, edges.num_edges) > 0.2).expand(branches, -1)
        options["branch_index"] = torch.tensor([1, 0, 1])
    return inputs, options, "graph_attention"


def chosen(only: list[str], every: int) -> list[aot.Case]:
    """Return the cases whose names have all words of `only`, each N-th of them.

    Both passes run for each. A forward pass over edges has the more rows, and each backward row is taken after one.
    """
    cases = [case for case in aot.cases() if case.op == "evidence_pool" or case.stage == "forward"]
    unique = {(case.op, case.dtype, case.mode, case.size): case for case in cases}
    return [case for case in unique.values() if all(word in str(case).split() for word in only)][::every]


def main(argv: list[str] | None = None) -> int:
    """Run the cases; 0 if every error is below its bar."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=list(families()["hopper"]["targets"]), default=TARGET)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="words that a call's name must have")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th call alone")
    parser.add_argument("--plant", metavar="OPCODE", help="a fault: leave these instructions out, such as bar.sync")
    args = parser.parse_args(argv)
    programs: list[int] = []
    evidence_kernels.launch = graph_kernels.launch = launcher(args.target, programs, args.plant)
    ops.resolve = lambda *_, **__: ("triton", "")
    failed, start, cases = 0, time.perf_counter(), chosen(args.only, args.every)
    for case in cases:
        bar = BARS[aot._DTYPES[case.dtype]]
        try:
            found = errors(case)
            worst = max(found, key=found.get)
            told, wrong = f"{found[worst]:.1e} ({worst})", not found[worst] <= bar
        except (MemoryFaultError, UnknownPtxError) as fault:
            told, wrong = f"{type(fault).__name__}: {fault}", True
        failed += wrong
        sys.stdout.write(f"{'FAILED' if wrong else 'ok':6} {case}: {told}, bar {bar:g}\n")
        sys.stdout.flush()
    seconds = time.perf_counter() - start
    sys.stdout.write(f"{args.target}: {len(cases)} calls, {len(programs)} programs, {seconds:.0f} s: {failed} failed\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
