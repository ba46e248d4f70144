"""Checks on a GPU, in one command, what only a GPU can show: compiled tests, the interpreter, sanitizers, times.

    TRITON_INTERPRET=1 python kernels/benchmarks/compare.py --write build/kernels_cpu.npz     # on a CPU, to carry along
    python kernels/benchmarks/gpu_check.py --expected build/kernels_cpu.npz --out build/gpu   # on the GPU

Needs torch, triton and pytest; aullm_dist and its packages need not be there. Below --out are then `gpu_check.log` with
the output of all steps, `summary.txt`, `bench.json` and `bench.md`. Each command has --minutes; one that fails does not
keep the next from running. Without a GPU the steps run as far as they go: tests interpreted, plain PyTorch compared,
tiny sizes measured.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = "kernels/benchmarks"
STEPS = ("tests", "compare", "sanitize", "bench")
TESTS = tuple(f"tests/ops/test_{name}.py" for name in (
    "evidence_kernels", "graph_kernels", "kernel_dispatch", "kernel_framework",
))  # fmt: skip
TOOLS = ("memcheck", "racecheck")


def commands(step: str, expected: Path | None, out: Path, sizes: list[str] | None) -> dict[str, list[str] | str]:
    """Return the commands of a step by name, or why one cannot run here."""
    python = sys.executable
    if step == "tests":
        return {"tests": [python, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "-ra", *TESTS]}
    if step == "compare":
        line = [python, f"{HERE}/compare.py", "--read", str(expected)]
        return {"compare": line if expected else "no --expected: write it on a CPU with compare.py --write"}
    if step == "sanitize":
        tool = shutil.which("compute-sanitizer")
        runs = [(name, size) for name in TOOLS for size in ("odd", "model")]
        if not tool:
            return {f"{name}-{size}": "compute-sanitizer is not on the PATH" for name, size in runs}
        return {
            f"{name}-{size}": [
                tool, "--tool", name, "--error-exitcode", "9", python, f"{HERE}/compare.py", "--run", size,
            ]
            for name, size in runs
        }  # fmt: skip
    files = ["--json", str(out / "bench.json"), "--markdown", str(out / "bench.md")]
    return {"bench": [python, HERE, *files, *(["--sizes", *sizes] if sizes else [])]}


def run(name: str, command: list[str], log: Path, seconds: float) -> str:
    """Run a command, append its output to the log and return one line: the verdict, the time and what it said last."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(_paths()), "PYTHONUNBUFFERED": "1"}
    if name.partition("-")[0] in TOOLS:
        # Each tensor is an allocation of its own, so that an access outside it shows.
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    start = time.monotonic()
    with log.open("a+", errors="replace") as output:
        output.write(f"===== {name}: {' '.join(command)}\n")
        output.flush()
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
                check=False,
            )
            verdict = f"exit code {done.returncode}" if done.returncode else "ok"
        except subprocess.TimeoutExpired:
            verdict = "out of time"
    last = log.read_text(errors="replace").strip().splitlines()[-1]
    return f"{name:<17} {verdict}, {time.monotonic() - start:.0f} s: {last[:80]}"


def _paths() -> list[str]:
    given = os.environ.get("PYTHONPATH")
    return [str(ROOT), str(ROOT / "kernels"), *([given] if given else [])]


def main(argv: list[str] | None = None) -> int:
    """Run the steps; 0 if all ran and are green, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="log and tables are written there")
    parser.add_argument("--expected", type=Path, metavar="FILE", help="what compare.py --write made on a CPU")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS, help="only these steps")
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="sizes of the benchmark")
    parser.add_argument("--minutes", type=float, default=8.0, help="time of each command (%(default)s)")
    args = parser.parse_args(argv)
    if args.expected and not args.expected.is_file():
        parser.error(f"--expected is {args.expected}, allowed is a file that compare.py --write made")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    expected = args.expected.resolve() if args.expected else None
    log = out / "gpu_check.log"
    log.unlink(missing_ok=True)
    lines = []
    for step in args.steps:
        for name, command in commands(step, expected, out, args.sizes).items():
            not_run = f"{name:<17} not run: {command}"
            lines.append(not_run if isinstance(command, str) else run(name, command, log, 60 * args.minutes))
            print(lines[-1], flush=True)
    (out / "summary.txt").write_text("\n".join(lines) + "\n")
    return int(any(" ok, " not in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
