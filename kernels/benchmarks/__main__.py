"""Benchmark the kernels against every other way to compute the same.

    python kernels/benchmarks                                   # both ops; on a CPU tiny sizes in plain PyTorch
    python kernels/benchmarks --op evidence_pool --sizes M L --json build/bench/kernels.json --step-ms 850

The tests of an op run first; while they are red no speed-up is printed, and the exit code is 1.
"""

import argparse
import importlib
import json
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from driver import add_speedups, markdown, measure_ceilings, row

ROOT = Path(__file__).resolve().parents[2]
OPS = ("evidence_pool", "graph_attention")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if the tests of all ops are green."""
    parser = argparse.ArgumentParser(prog="python kernels/benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--op", choices=OPS, action="append", help="only this op (may be given again)")
    parser.add_argument(
        "--sizes", nargs="+", choices=("tiny", "model", "S", "M", "L"), help="default: all, on a CPU tiny"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rows there, after each size")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there")
    parser.add_argument("--step-ms", type=float, help="milliseconds of a whole training step, from the log of a run")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = args.sizes or (["tiny"] if device == "cpu" else ["model", "S", "M", "L"])
    top = measure_ceilings(device)
    machine = describe(device, top)
    print("\n".join(f"{name}: {value}" for name, value in machine.items()))
    results, tables, red = [], [], False
    for op in args.op or OPS:
        stem = importlib.import_module(op)
        green = tests_are_green(stem.TESTS)
        red |= not green
        for size in sizes:
            rows = measure(stem, size, device, top)
            notes = (
                add_speedups(rows, "ours in triton", stem.arithmetic(size))
                if green
                else ["tests are red: no speed-up is told"]
            )
            if args.step_ms:
                notes += share(rows, args.step_ms)
            table = "\n".join([markdown(f"{op}, {size} {stem.SIZES[size]}", rows), *(f"- {note}" for note in notes)])
            print(table)
            tables.append(table)
            results.append({"op": op, "size": size, "rows": rows, "notes": notes, "tests_green": green})
            write(args, machine, results, tables)
    return 1 if red else 0


def measure(stem, size: str, device: str, top) -> list[dict]:
    """Measure every provider of one op and size; all get the same fresh random inputs."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    inputs, rest = stem.make_inputs(size, device, dtype)
    expected, work = stem.expected(inputs, rest), stem.work(size, dtype)
    rows = []
    for provider in stem.providers(rest, device, "triton" if device == "cuda" else "torch", inputs):
        rows += row(provider, inputs, expected, work, top)
        if device == "cuda":
            torch.cuda.empty_cache()
    if device == "cuda":
        # What two runs of the same code differ by is noise, and so is any smaller difference between two others.
        again = stem.providers(rest, device, "triton", inputs)[0]
        again.name += " again"
        rows += row(again, inputs, expected, work, top)
    return rows


def share(rows: list[dict], step_ms: float) -> list[str]:
    """Say what part of a training step the op takes, however small."""
    return [
        f"{r['provider']}: {r['p50_us']:.0f} us of a step of {step_ms:.0f} ms are {0.1 * r['p50_us'] / step_ms:.3f} %"
        for r in rows
        if r.get("mode") == "full"
    ]


def tests_are_green(path: str) -> bool:
    """Run the tests of an op as they stand beside this script."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(ROOT / path)]
    return subprocess.run(command, cwd=ROOT, stdout=sys.stderr, check=False).returncode == 0


def describe(device: str, top) -> dict[str, str]:
    """Return what a reader needs to repeat the numbers."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    issue = "not measured" if top.issue is None else f"{1e-12 * top.issue:.1f} T thread instructions/s"
    return {
        "device": name,
        "ceilings": f"copy {1e-9 * top.copy:.0f} GB/s, matmul {1e-12 * top.matmul:.2f} TFLOP/s, issue {issue}",
        "versions": ", ".join(f"{package} {_version(package)}" for package in ("torch", "triton", "torch-geometric")),
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
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1), encoding="utf-8")
    if args.markdown:
        args.markdown.parent.mkdir(parents=True, exist_ok=True)
        head = "\n".join(f"- {name}: {value}" for name, value in machine.items())
        args.markdown.write_text("\n\n".join([head, *tables]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
