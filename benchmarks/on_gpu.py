"""Everything that only a GPU can show, in one command: `make gpu`.

    python benchmarks/on_gpu.py --out build/gpu [--minutes 45] [--wheels build/wheels] [--steps NAME ...]
    python benchmarks/on_gpu.py --list

Runs the steps of `on_gpu_steps.py` in order of value until the minutes are spent: what checks comes before what times,
and a step that fails or hangs does not keep the next from running. `OUT/on_gpu.md` and `on_gpu.json` are written after
each step, its output is in `OUT/STEP/log.txt`. Exit code 0 if every step that ran passed, 1 otherwise; missed targets
are results and change nothing. Without a GPU all of it is rehearsed with small sizes, and the page says so.

The machine needs Python, torch, triton, transformers, accelerate and peft, this checkout, and no network. What else is
lacking comes from a folder of wheels (`make gpu-wheels`), which are unpacked into OUT/site and installed nowhere.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from on_gpu_steps import Machine, Step, Target, steps_for

ROOT = Path(__file__).resolve().parents[1]
DESCRIBE = "benchmarks/on_gpu_machine.py"
LEAST_SHARE = 0.3
"""A step is not begun where less than this share of its time is left."""
INSTALLED = "import importlib.metadata as m; print(*(str(d.name).lower().replace('-', '_') for d in m.distributions()))"
TAIL = 12
"""Lines of a failed step's output that are shown."""


def main() -> int:
    """Run the steps; 0 if all that ran passed."""
    options = parse_arguments()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    python = shlex.split(options.python)
    environment = variables(out, options.wheels, python)
    described = describe(python, environment)
    gpus = len(described["gpus"])
    small = options.small or gpus == 0
    machine = Machine(gpus, described["gib"], frozenset(described["packages"]), small)
    steps = [step for step in steps_for(machine) if not options.steps or step.name in options.steps]
    unknown = sorted(set(options.steps or ()) - {step.name for step in steps})
    if unknown:
        sys.exit(f"--steps: {unknown[0]} is unknown; allowed: {', '.join(step.name for step in steps_for(machine))}")
    if options.list:
        print("\n".join(f"{step.name:<14} {step.minutes:>4.0f} min  {shlex.join(step.command)}" for step in steps))
        return 0
    report = {
        "benchmark": "on_gpu", "command": shlex.join(["python", *sys.argv]), "minutes": options.minutes,
        "date": datetime.now(UTC).isoformat(timespec="minutes"), "machine": described, "small": small, "steps": [],
    }  # fmt: skip
    passed: dict[str, bool] = {}
    for step in steps:
        row = run(step, machine, passed, deadline, python, environment, out)
        passed[step.name] = row["verdict"] in ("ok", "not run")
        report["steps"].append(row)
        print(line_of(row), flush=True)
        write(out / "on_gpu.json", json.dumps(report, indent=1) + "\n")
        write(out / "on_gpu.md", "\n".join(page(report)) + "\n")
    print(f"{out / 'on_gpu.md'}")
    return int(not all(passed.values()))


def parse_arguments() -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), metavar="DIR", help="results (build/gpu)")
    parser.add_argument("--minutes", type=float, default=45.0, help="time of all steps together (45)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of packages that this machine lacks")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="only these steps; --list names them")
    parser.add_argument("--python", default=sys.executable, metavar="LINE", help="interpreter of the steps (this one)")
    parser.add_argument("--small", action="store_true", help="rehearse with small sizes; without a GPU always")
    parser.add_argument("--list", action="store_true", help="print the steps and their commands, and run nothing")
    options = parser.parse_args()
    if options.minutes <= 0:
        parser.error(f"--minutes is {options.minutes}, allowed is a number above 0")
    if options.wheels and not (options.wheels.is_dir() and any(options.wheels.glob("*.whl"))):
        parser.error(f"--wheels is {options.wheels}, allowed is a folder with wheels; make gpu-wheels makes one")
    return options


def variables(out: Path, wheels: Path | None, python: list[str]) -> dict[str, str]:
    """Return the environment of the steps, in which wheels of packages that are not installed can be imported."""
    places = [str(ROOT), str(ROOT / "kernels")]
    if wheels:
        site = out / "site"
        installed = subprocess.run(
            [*python, "-c", INSTALLED], capture_output=True, text=True, check=True
        ).stdout.split()
        for wheel in sorted(wheels.glob("*.whl")):
            if wheel.name.partition("-")[0].lower() in installed:
                # What PYTHONPATH names would be taken first.
                continue
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        places.append(str(site))
    given = os.environ.get("PYTHONPATH")
    paths = os.pathsep.join([*places, *([given] if given else [])])
    return os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}


def describe(python: list[str], environment: dict[str, str]) -> dict:
    """Return devices, versions and commit, as a process of the steps sees them."""
    done = subprocess.run(
        [*python, DESCRIBE], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        sys.exit(f"{shlex.join(python)} {DESCRIBE} fails: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def run(
    step: Step,
    machine: Machine,
    passed: dict[str, bool],
    deadline: float,
    python: list[str],
    environment: dict[str, str],
    out: Path,
) -> dict:
    """Run one step and return its row."""
    folder = out / step.name
    command = [*python, *(part.replace("{out}", str(folder)) for part in step.command)]
    shown = shlex.join(["python", *(part.replace("{out}", f"OUT/{step.name}") for part in step.command)])
    row = {"step": step.name, "command": shown, "seconds": 0.0, "targets": [], "output": []}
    left = deadline - time.monotonic()
    reason = step.obstacle(machine, passed)
    if reason is None and left < LEAST_SHARE * 60 * step.minutes:
        reason = f"{max(left, 0) / 60:.0f} minutes left, it may take {step.minutes:.0f}"
    if reason is not None:
        return row | {"verdict": "not run", "reason": reason}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("result.*"):
        # Of another run; a step that fails must not show it.
        old.unlink()
    log = folder / "log.txt"
    start = time.monotonic()
    code = watch(command, environment, log, min(left, 60 * step.minutes))
    row["seconds"] = time.monotonic() - start
    row["targets"] = [asdict(one) | {"met": one.met} for one in targets_of(step, folder)]
    if code == 0 or (code == 1 and step.bars and row["targets"]):
        return row | {"verdict": "ok"}
    row["output"] = log.read_text(errors="replace").strip().splitlines()[-TAIL:]
    return row | {"verdict": "failed", "reason": "out of time" if code is None else f"exit code {code}"}


def targets_of(step: Step, folder: Path) -> list[Target]:
    """Return what a step reached; nothing where its files were cut off."""
    try:
        return step.targets(folder)
    except json.JSONDecodeError:
        return []


def watch(command: list[str], environment: dict[str, str], log: Path, seconds: float) -> int | None:
    """Run a command in a group of its own and return its exit code, None where its time was up."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # What a launcher started goes with it, also after Ctrl-C.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


def line_of(row: dict) -> str:
    """Return a step's result in a line."""
    reason = f" ({row['reason']})" if "reason" in row else ""
    met = [target["met"] for target in row["targets"]]
    targets = f"; {sum(met)} of {len(met)} targets met" if met else ""
    return f"{row['step']:<14} {row['verdict']}{reason}, {row['seconds']:.0f} s{targets}"


def page(report: dict) -> list[str]:
    """Return the page: machine, targets, steps, and the output of what failed."""
    machine, rows = report["machine"], report["steps"]
    gpus = ", ".join(f"{name} of {machine['gib']:.0f} GiB" for name in machine["gpus"])
    lines = ["# What ran on this machine", ""]
    if report["small"]:
        lines += ["**A rehearsal with small sizes: no number here says anything about GPUs.**", ""]
    lines += [
        f"{gpus or machine['cpu']}, {machine['cores']} cores, {machine['driver'] or 'no driver'}, Python "
        f"{machine['python']}, {', '.join(f'{name} {number}' for name, number in machine['versions'].items())}, commit "
        f"{machine['commit']}, {report['date']}", "", f"`{report['command']}`", "",
        "| target | found | bar | |", "|---|---:|---:|---|",
    ]  # fmt: skip
    for row in rows:
        for target in row["targets"]:
            found = "not measured" if target["found"] is None else f"{target['found']:.4g}"
            sign = "at least" if target["at_least"] else "at most"
            verdict = "met" if target["met"] else "**missed**"
            lines.append(f"| {row['step']}: {target['name']} | {found} | {sign} {target['bar']:g} | {verdict} |")
    lines += ["", "| step | | s | command |", "|---|---|---:|---|"]
    for row in rows:
        verdict = row["verdict"] + (f": {row['reason']}" if "reason" in row else "")
        lines.append(f"| {row['step']} | {verdict} | {row['seconds']:.0f} | `{row['command']}` |")
    for row in rows:
        if row["output"]:
            lines += ["", f"The end of `{row['step']}`:", "", *(f"    {line}" for line in row["output"])]
    return lines


def write(path: Path, text: str) -> None:
    """Write a file, all or nothing."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
