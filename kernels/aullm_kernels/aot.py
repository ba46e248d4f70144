"""Compiles every shipped configuration for its GPU, without one, and compares the result with `kernels.lock.json`.

    python -m aullm_kernels.aot                  # check
    python -m aullm_kernels.aot --target 8.0     # check for another compute capability of configs.json
    python -m aullm_kernels.aot --write          # write the lock again, after a change that was meant

Each launch that the package can make is made with tensors that have no memory, and what would have been launched is
compiled instead: arguments, specialisation and options are those of a run. A configuration fails if it does not
compile, spills more registers to memory than its target allows, needs more shared memory than a program may have, or
more registers or shared memory than the lock says.

Needs triton, not a GPU; the interpreter must be off, so tests start this as a process.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aullm_kernels.tables import FAMILY, TARGET, Tile, families, tiles

LOCK = Path(__file__).with_name("kernels.lock.json")
"""Of the capability that the tiles were chosen for; the others' are next to it (`lock_of`)."""
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One call of the package: an op, its pass, a dtype, a mode and sizes."""

    op: str
    stage: str
    dtype: str
    mode: str
    size: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={value}" for name, value in self.size)
        return f"{self.op} {self.stage} {self.dtype} {self.mode} {sizes}"


def cases(family: str = FAMILY) -> list[Case]:
    """Return every call that uses another kernel, tile or specialisation."""
    found = []
    for stage, modes in (("forward", ("plain", "full", "transposed")), ("backward", ("full", "frozen", "transposed"))):
        for tile in tiles(f"evidence_pool_{stage}", family):
            dtype = {16: "bf16", 19: "fp16", 32: "fp32"}[tile.size["bits"]]
            channels = tile.size["channels"]
            found += [Case("evidence_pool", stage, dtype, mode, (("channels", channels),)) for mode in modes]
            # Rows of cells that are no multiple of 16 bytes.
            found.append(Case("evidence_pool", stage, dtype, "full", (("channels", channels - 28),)))
    for tile in tiles("graph_attention_forward", family):
        found += [Case("graph_attention", "forward", *mode, _sizes(tile)) for mode in _GRAPH_MODES]
    for tile in tiles("graph_attention_target", family):
        found += [Case("graph_attention", "backward", *mode, _sizes(tile)) for mode in _GRAPH_MODES]
    return found


# Everything is cast after it is loaded, so that the type changes loads and stores only.
_GRAPH_MODES = (("bf16", "branches"), ("bf16", "plain"), ("fp16", "plain"), ("fp32", "branches"))


def _sizes(tile: Tile) -> tuple[tuple[str, int], ...]:
    return tuple((name, tile.size[name]) for name in ("features", "degree"))


@dataclass(slots=True)
class _Launch:
    kernel: Any
    arguments: tuple
    constants: dict[str, Any]
    tile: Any


def _record(case: Case) -> list[_Launch]:
    """Make the call of `case` with tensors without memory and return what it would have launched."""
    from aullm_kernels import evidence_kernels, graph_kernels, library

    launches: list[_Launch] = []

    def record(kernel: Any, grid: Any, *arguments: Any, device: Any, tile: Any, **constants: Any) -> None:
        assert 0 not in grid, grid
        launches.append(_Launch(kernel, arguments, constants, tile))

    evidence_kernels.launch = graph_kernels.launch = record
    size = dict(case.size)
    dtype = _DTYPES[case.dtype]
    if case.op == "evidence_pool":
        _call_evidence_pool(library, case, dtype, size["channels"])
    else:
        _call_graph_attention(library, case, dtype, size["features"], size["degree"])
    return launches


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _call_evidence_pool(library: Any, case: Case, dtype: torch.dtype, channels: int) -> None:
    batch, num_cells, heads, num_regions = 512, 162, 4, 9
    cells = _empty(batch, num_cells, channels, dtype=dtype)
    if case.mode == "transposed":
        cells = _empty(batch, channels, num_cells, dtype=dtype).transpose(1, 2)
    queries = _empty(batch, heads, channels, dtype=dtype)
    regions = _empty(num_cells, dtype=torch.int64)
    valid = None if case.mode in ("plain", "transposed") else _empty(batch, num_cells, dtype=torch.bool)
    join = None if case.mode == "plain" else _empty(batch, 256, dtype=dtype)
    forward = library.EAGER["evidence_pool_forward"]
    out, pooled, stats = library.evidence_outputs(cells, queries, join, num_regions)
    if case.stage == "forward":
        forward(cells, queries, regions, valid, join, num_regions)
    else:
        library.EAGER["evidence_pool_backward"](
            out, cells, queries, regions, valid, pooled, stats, num_regions, case.mode != "frozen", True
        )


def _call_graph_attention(library: Any, case: Case, dtype: torch.dtype, features: int, degree: int) -> None:
    rows, branches, nodes, heads, relations = 1024, 1024, 27, 4, 5
    xl, xr = _empty(rows, nodes, heads, features, dtype=dtype), _empty(rows, nodes, heads, features, dtype=dtype)
    parameters = [
        _empty(*shape, dtype=torch.float32)
        for shape in ((relations, heads, features), (heads, features), (relations, heads))
    ]
    num_edges = nodes * degree
    slots = _empty(3, degree, nodes, dtype=torch.int32)
    strength, mask, index = None, None, None
    if case.mode == "branches":
        branches *= 3
        strength = _empty(branches, num_edges, dtype=dtype)
        mask = _empty(1, num_edges, dtype=torch.bool).expand(branches, -1)
        index = _empty(branches, dtype=torch.int64)
    if case.stage == "forward":
        library.EAGER["graph_attention_forward"](xl, xr, *parameters, slots, strength, mask, index, 0.2)
    else:
        grad = _empty(branches, nodes, heads, features, dtype=dtype)
        library.EAGER["graph_attention_backward"](
            grad, xl, xr, *parameters, slots, slots, strength, mask, index, num_edges, 0.2
        )


def _source(launch: _Launch) -> Any:
    """Return what the just-in-time compiler would compile for this launch."""
    from triton.compiler import ASTSource

    signature, attributes = {}, {}
    constants = dict(launch.constants)
    for index, name in enumerate(launch.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = launch.arguments[index]
        if value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return the registers of a thread and the bytes that it spills: no kernel has a stack for anything else."""
    import triton

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", text)
    assert found is not None, "cuobjdump of CUDA 12 and 13 reports registers in this form"
    return int(found[1]), int(found[2]) + int(found[3])


def lock_of(target: str) -> Path:
    """Return the lock of a compute capability."""
    return LOCK if target == TARGET else LOCK.with_name(f"kernels-{target}.lock.json")


def compile_case(case: Case, target: str = TARGET) -> dict[str, dict[str, int]]:
    """Compile the kernels of one call: name -> registers, spilled bytes, shared memory in bytes."""
    import triton
    from triton.backends.compiler import GPUTarget

    from aullm_kernels.launch import OPTIONS

    arch = int(target.replace(".", ""))
    results = {}
    for launch in _record(case):
        compiled = triton.compile(
            _source(launch),
            target=GPUTarget("cuda", arch, 32),
            options={**OPTIONS, **launch.tile.options()},
        )
        registers, spilled = _resources(compiled.asm["cubin"])
        name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
        results[f"{name} | {case}"] = {
            "registers": registers,
            "spilled": spilled,
            "shared": compiled.metadata.shared,
        }
    return results


def compile_all(jobs: int, target: str = TARGET) -> dict[str, dict[str, int]]:
    """Compile every case in `jobs` processes: name of a kernel and its case -> what it takes.

    Raises:
        RuntimeError: A case does not compile; the message names it.
    """
    results: dict[str, dict[str, int]] = {}
    # A forked child would inherit torch's threads in an unknown state.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        pending = {case: pool.submit(compile_case, case, target) for case in cases()}
        for case, future in pending.items():
            error = future.exception()
            if error is not None:
                raise RuntimeError(f"{case}: does not compile: {error}") from error
            results.update(future.result())
    return dict(sorted(results.items()))


def complaints(
    found: dict[str, dict[str, int]], locked: dict[str, dict[str, int]] | None, target: str = TARGET
) -> Iterator[str]:
    """Yield a line for each kernel that spills or takes more than its target has, or than the lock allows."""
    limits, lock = families()[FAMILY]["targets"][target], lock_of(target).name
    for name, taken in found.items():
        if taken["spilled"] > limits["spilled"]:
            yield f"{name}: spills {taken['spilled']} bytes of registers, allowed are {limits['spilled']}"
        if taken["shared"] > limits["shared_memory"]:
            most = limits["shared_memory"]
            yield f"{name}: needs {taken['shared']} bytes of shared memory, a program may have {most}"
        if locked is None:
            continue
        if name not in locked:
            yield f"{name}: is not in {lock}"
            continue
        for what in ("registers", "shared"):
            if taken[what] > locked[name][what]:
                yield f"{name}: takes {taken[what]} {what}, {lock} allows {locked[name][what]}"
    for name in sorted((locked or {}).keys() - found.keys()):
        yield f"{name}: is in {lock} but was not compiled"


def main(argv: list[str] | None = None) -> int:
    """Compile, then check or write the lock; 0 if nothing is to be said, 2 if it cannot run here."""
    parser = argparse.ArgumentParser(prog="python -m aullm_kernels.aot", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the lock instead of checking against it")
    targets = list(families()[FAMILY]["targets"])
    parser.add_argument("--target", choices=targets, default=TARGET, help=f"compute capability ({TARGET})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    args = parser.parse_args(argv)
    if importlib.util.find_spec("triton") is None:
        return _say("the package triton is not installed", 2)
    import triton

    if triton.knobs.runtime.interpret:
        return _say("TRITON_INTERPRET is set: unset it, an interpreter compiles nothing", 2)
    file = lock_of(args.target)
    lock = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    # Another version of the compiler counts registers in its own way: then only what fails everywhere is checked.
    locked = None if args.write else lock.get(triton.__version__)
    if locked is None and not args.write:
        sys.stderr.write(f"aot: {file.name} has no entry for triton {triton.__version__}: registers are not compared\n")
    start = time.perf_counter()
    try:
        found = compile_all(args.jobs, args.target)
    except RuntimeError as error:
        return _say(str(error), 1)
    lines = list(complaints(found, locked, args.target))
    for line in lines:
        _say(line, 1)
    if args.write and not lines:
        file.write_text(_as_json({**lock, triton.__version__: found}), encoding="utf-8")
    sys.stdout.write(
        f"{len(found)} kernels for compute capability {args.target}, triton {triton.__version__}, "
        f"{time.perf_counter() - start:.0f} s: "
        f"{len(lines)} complaints\n"
    )
    return 1 if lines else 0


def _say(line: str, code: int) -> int:
    sys.stderr.write(f"aot: {line}\n")
    return code


def _as_json(lock: dict[str, dict[str, dict[str, int]]]) -> str:
    """One line per kernel, so that a change shows as one."""
    parts = []
    for version, kernels in lock.items():
        rows = ",\n".join(f"    {json.dumps(name)}: {json.dumps(taken)}" for name, taken in kernels.items())
        parts.append(f"  {json.dumps(version)}: {{\n{rows}\n  }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
