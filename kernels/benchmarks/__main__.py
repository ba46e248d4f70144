"""Benchmarks the kernels against every other way to compute the same.

    python kernels/benchmarks                                   # both ops; on a CPU tiny sizes in plain PyTorch
    python kernels/benchmarks --op evidence_pool --sizes M L --json build/bench/kernels.json --step-ms 850

The tests of an op run first; while they are red no speed-up is reported, and the exit code is 1.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType

import torch
from driver import LEGEND, Ceilings, add_speedups, markdown, measure_ceilings, row, text

ROOT = Path(__file__).resolve().parents[2]
OPS = ("evidence_pool", "graph_attention")
SIZES = ("tiny", "model", "model-12", "S", "M", "L")
RED = "tests are red: no speed-up is reported"
UNTESTED = "tests were not run: no speed-up is reported"


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if the tests of all ops are green."""
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    top = measure_ceilings(device)
    machine = describe(device, top)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()), LEGEND, sep="\n\n")
    results, tables, red = [], [], False
    for op in args.op or OPS:
        stem = importlib.import_module(op)
        green = None if args.no_tests else tests_are_green(stem.TESTS)
        red |= green is False
        default = ["tiny"] if device == "cpu" else [size for size in stem.SIZES if size != "tiny"]
        for size in [size for size in args.sizes or default if size in stem.SIZES]:
            rows, ours = measure(stem, size, device, top)
            notes = add_speedups(rows, ours, stem.arithmetic(size)) if green else [UNTESTED if green is None else RED]
            if args.step_ms and size.startswith("model"):
                notes += share(rows, stem.CALLS, args.step_ms)
            title = f"{op}, {size} {stem.SIZES[size]}"
            print("\n".join(["", text(title, rows), *(f"- {note}" for note in notes)]), flush=True)
            tables.append("\n".join([markdown(title, rows), "", *(f"- {note}" for note in notes)]).strip())
            results.append({"op": op, "size": size, "rows": rows, "notes": notes, "tests_green": green})
            write(args, machine, results, tables)
    return 1 if red else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(prog="python kernels/benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, action="append", help="only this op (may be given again)")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: on a CPU tiny, on a GPU all others")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there, after each size")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, after each size")
    parser.add_argument(
        "--step-ms", type=float, help="milliseconds of a whole training step: tells each op's share of it"
    )
    parser.add_argument("--no-tests", action="store_true", help="do not run the tests; no speed-up is reported then")
    args = parser.parse_args(argv)
    if args.step_ms is not None and args.step_ms <= 0:
        parser.error(f"--step-ms is {args.step_ms}, allowed is a number above 0")
    return args


def measure(stem: ModuleType, size: str, device: str, top: Ceilings) -> tuple[list[dict], str]:
    """Measure every provider of one op and size on the same fresh random inputs; the second result names ours."""
    torch.manual_seed(0)
    # Otherwise a compiled provider is not compiled for this size alone, or after a few sizes not at all.
    torch.compiler.reset()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    kernels = "triton" if device == "cuda" else "torch"
    inputs, rest = stem.make_inputs(size, device, dtype)
    expected, work = stem.expected(inputs, rest), stem.work(size, dtype)
    providers = stem.providers(rest, device, kernels, inputs)
    if device == "cuda":
        # What two runs of the same code differ by is noise, and so is any smaller difference between two others.
        again = stem.providers(rest, device, kernels, inputs)[0]
        again.name += " again"
        providers.append(again)
    rows = []
    for provider in providers:
        rows += row(provider, inputs, expected, work, top)
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows, next(provider.name for provider in providers if provider.ours)


def share(rows: list[dict], calls: int, step_ms: float) -> list[str]:
    """Say what part of a training step the op takes, however small."""
    return [
        f"{r['provider']}: {calls} x {r['p50_us']:.0f} us of a step of {step_ms:.0f} ms are "
        f"{calls * 0.1 * r['p50_us'] / step_ms:.3f} %"
        for r in rows
        if r.get("mode") == "full"
    ]


def tests_are_green(path: str) -> bool:
    """Run the tests of an op as they stand next to this script; what they print goes to stderr."""
    # Without the project's own options, one of which needs a plug-in that a GPU machine may not have.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-o", "addopts=", "-p", "no:cacheprovider", str(ROOT / path)]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode == 0


def describe(device: str, top: Ceilings) -> dict[str, str]:
    """Return what a reader needs to repeat the numbers."""
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=False)
    cpu = f"CPU, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    issue = "not measured" if top.issue is None else f"{1e-12 * top.issue:.1f} T thread instructions/s"
    packages = ("torch", "triton", "torch-geometric")
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "ceilings": f"copy {1e-9 * top.copy:.0f} GB/s, matmul {1e-12 * top.matmul:.2f} TFLOP/s, issue {issue}",
        "versions": ", ".join(f"{package} {_version(package)}" for package in packages),
        "commit": commit.stdout.strip() or "unknown",
        "date": date.today().isoformat(),
        "command": " ".join(["python kernels/benchmarks", *sys.argv[1:]]),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def write(args: argparse.Namespace, machine: dict, results: list[dict], tables: list[str]) -> None:
    """Write what there is so far: a run that is cut off keeps its rows."""
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", encoding="utf-8")
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        head = "\n".join(f"- {name}: {value}" for name, value in machine.items())
        args.markdown.write_text("\n\n".join([head, *tables]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
