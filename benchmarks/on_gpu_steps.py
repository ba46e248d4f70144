"""The steps of `on_gpu.py` in order of value: their commands, what they need, and what they must reach."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLOOR_POINTS = 20.0
"""Points of f1_macro above its floor that the demo must reach, as in the tests."""
KERNEL_TARGETS = {
    # provider -> times that ours must be faster in forward + backward (docs/benchmarks/kernels.md)
    "evidence_pool": {"eager": 4.0, "compile": 2.0, "SDPA": 1.8},
    "graph_attention": {"eager": 8.0, "compile": 2.0, "PyG GATv2Conv": 8.0},
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What the steps may use; `small` makes every step a rehearsal of small sizes."""

    gpus: int
    gib: float
    packages: frozenset[str]
    small: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """What a step found beside what it must reach."""

    name: str
    found: float | None
    bar: float
    at_least: bool = True

    @property
    def met(self) -> bool:
        return self.found is not None and (self.found >= self.bar if self.at_least else self.found <= self.bar)


@dataclass(frozen=True, slots=True)
class Step:
    """One command.

    Attributes:
        name: names the step, its log and its files.
        command: arguments after the interpreter; `{out}` is the folder of the step's files.
        minutes: longest time.
        gpus, gib, packages: what it needs; gib is of one GPU.
        tool: program that it calls.
        rehearsed: whether processes on a CPU may stand for the GPUs it needs.
        after: steps that must have passed: those that check what this one times.
        bars: 1 is the exit code of a missed target, and no failure.
        targets: reads what was reached from the folder of the step's files.
    """

    name: str
    command: tuple[str, ...]
    minutes: float
    gpus: int = 0
    gib: float = 0.0
    packages: tuple[str, ...] = ()
    tool: str | None = None
    rehearsed: bool = False
    after: tuple[str, ...] = ()
    bars: bool = False
    targets: Callable[[Path], list[Target]] = field(default=lambda out: [])

    def obstacle(self, machine: Machine, passed: Mapping[str, bool]) -> str | None:
        """Return why the step cannot run here, None where it can."""
        if machine.gpus < self.gpus and not (self.rehearsed and machine.gpus == 0):
            return f"needs {self.gpus} GPU{'s' if self.gpus > 1 else ''}, here are {machine.gpus}"
        if machine.gib < self.gib:
            return f"needs a GPU of {self.gib:.0f} GiB, here are {machine.gib:.0f}"
        lacking = [name for name in self.packages if name not in machine.packages]
        if lacking:
            return f"needs the package {', '.join(lacking)}; --wheels brings it"
        if self.tool and not shutil.which(self.tool):
            return f"needs {self.tool}, which is not on the PATH"
        failed = [name for name in self.after if not passed.get(name, True)]
        return f"{failed[0]} did not pass, and what is wrong is not timed" if failed else None


ENGINE = ("deepspeed", "bitsandbytes", "datasets")


def steps_for(machine: Machine) -> list[Step]:
    """Return all steps in order of value, with small sizes where there is no GPU."""
    return [*_checks(machine.small), *_runs(machine.small), *_large(machine.small), *_choices(), *_rest(machine.small)]


def _checks(small: bool) -> Iterator[Step]:
    expected = () if small else ("--expected", "build/kernels_cpu.npz")
    checks = ("tests",) if small or not Path("build/kernels_cpu.npz").is_file() else ("tests", "compare")
    yield Step(
        "kernels",
        ("kernels/benchmarks/gpu_check.py", "--out", "{out}", "--steps", *checks, *(expected * ("compare" in checks))),
        minutes=10,
        packages=("triton", "pytest"),
    )
    sizes = ("--clips", "2", "--steps", "2", "--warm-up", "1", "--threads", "1", "--rate-side", "256") if small else ()
    yield Step("step-tiny", _step("tiny", *sizes), minutes=4, packages=("peft", "pydantic"), targets=_step_targets)
    if not small:
        yield _large_step("step-8b-nf4", "8b-nf4", 40, 8)


def _runs(small: bool) -> Iterator[Step]:
    nf4 = (
        "model.quantization=nf4", "training.precision=bf16", "model.activation_checkpointing=non_reentrant",
    )  # fmt: skip
    forms = {
        "demo-fp32": (),
        "demo-nf4": nf4,
        "demo-zero3": (*nf4, "training.strategy=zero3"),
        "demo-offload": (*nf4, "training.strategy=zero3_offload_param"),
    }
    sizes = (
        "data.synthetic_subjects=6", "data.synthetic_clips=4", "training.epochs=1", "training.baseline=false",
        "monitor.clips=0", "monitor.projector_clips=0", "training.cpu_threads=1",
    ) if small else ()  # fmt: skip
    for name, settings in forms.items():
        yield Step(
            name,
            ("aullm_dist/train.py", "--config", "demo", "training.output={out}/run", "--replace", *sizes, *settings),
            minutes=5,
            packages=(
                "datasets",
                *(ENGINE if "zero3" in " ".join(settings) else ()),
                *(ENGINE[1:2] if settings else ()),
            ),
            targets=lambda out: [] if small else _demo_targets(out),
        )


def _large(small: bool) -> Iterator[Step]:
    if small:
        return
    yield _large_step("step-70b-nf4", "70b-nf4", 70, 12, "--steps", "5", "--warm-up", "2")
    yield _large_step("step-8b-bf16", "8b-bf16", 40, 6)


def _choices() -> Iterator[Step]:
    """Attention, compilation and recomputation at 8B with 64 clips; they need a GPU, at any size."""
    for name, options in {
        "sdpa": ("--attention", "sdpa"),
        "flex": ("--attention", "flex"),
        "compile": ("--compile", "blocks", "--suffix-multiple", "16"),
        "recompute": ("--checkpointing", "non_reentrant"),
    }.items():
        yield Step(
            f"8b-{name}",
            _step("8b-nf4", "--clips", "64", "--paths", "packed", *options),
            minutes=5,
            gpus=1,
            gib=40,
            packages=("bitsandbytes",),
            after=("kernels",),
        )


def _rest(small: bool) -> Iterator[Step]:
    engine = {"packages": ENGINE, "bars": True, "rehearsed": True}
    files = ("--json", "{out}/result.json")
    yield Step(
        "plan",
        ("benchmarks/plan_accuracy.py", *files, *(("--cases", "padded-zero2-fp32") if small else ())),
        minutes=10,
        targets=_missed("planned memory and traffic off by more than allowed"),
        **engine,
    )
    yield Step(
        "load",
        ("benchmarks/load_memory.py", "--ranks", "2", "--gib", "0.1" if small else "4", *files),
        minutes=6,
        gpus=2,
        targets=_missed("bounds of load memory missed"),
        **engine,
    )
    yield Step(
        "two-processes",
        ("benchmarks/engines.py", "--quick", *(("--precisions", "fp32", "--steps", "4") if small else ()), *files),
        minutes=10,
        gpus=2,
        **engine,
    )
    if not small:
        yield Step(
            "folds",
            ("benchmarks/folds.py", "--gib", "2", "--precision", "bf16", *files, "--markdown", "{out}/result.md"),
            minutes=10,
            gpus=2,
            **engine,
        )
    sizes = ("tiny",) if small else ("M", "L", "model", "model-12")
    untested = ("--no-tests",) if small else ()
    yield Step(
        "kernel-times",
        ("kernels/benchmarks", "--sizes", *sizes, *files, "--markdown", "{out}/result.md", *untested),
        minutes=12,
        packages=("triton", "pytest"),
        after=("kernels",),
        targets=lambda out: [] if small else _kernel_targets(out),
    )
    if not small:
        yield _large_step("step-32b-nf4", "32b-nf4", 60, 8)
    sanitizer = ("kernels/benchmarks/gpu_check.py", "--out", "{out}", "--steps", "sanitize")
    yield Step("sanitizer", sanitizer, minutes=10, gpus=1, tool="compute-sanitizer")


def _step(preset: str, *options: str) -> tuple[str, ...]:
    return ("benchmarks/train_step.py", preset, "--check", "--json", "{out}/result.json", *options)


def _large_step(name: str, preset: str, gib: float, minutes: float, *options: str) -> Step:
    packages = ("bitsandbytes", "peft", "pydantic") if "nf4" in preset else ("peft", "pydantic")
    return Step(
        name, _step(preset, *options), minutes, gpus=1, gib=gib, packages=packages, after=("kernels",), bars=True,
        targets=_step_targets,
    )  # fmt: skip


def _read(out: Path) -> Any:
    path = out / "result.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _step_targets(out: Path) -> list[Target]:
    report = _read(out) or {"targets": []}
    return [Target(one["name"], one["found"], one["bar"], one["at_least"]) for one in report["targets"]]


def _demo_targets(out: Path) -> list[Target]:
    path = out / "run" / "metrics.json"
    if not path.is_file():
        return []
    metrics = json.loads(path.read_text())
    above = 100 * (metrics["mean"]["f1_macro"] - metrics["floors"]["f1_macro"])
    return [Target("points of f1_macro above the floor", above, FLOOR_POINTS)]


def _missed(name: str) -> Callable[[Path], list[Target]]:
    def count(out: Path) -> list[Target]:
        report = _read(out)
        return [] if report is None else [Target(name, float(len(report["missed"])), 0.0, at_least=False)]

    return count


def _kernel_targets(out: Path) -> list[Target]:
    found = []
    for result in (_read(out) or {"results": []})["results"]:
        if result["size"] not in ("M", "L"):
            continue
        ratios = {row["provider"]: row.get("ours_faster") for row in result["rows"] if row.get("mode") == "full"}
        for provider, bar in KERNEL_TARGETS[result["op"]].items():
            name = f"{result['op']} {result['size']}, forward + backward, times faster than {provider}"
            found.append(Target(name, ratios.get(provider), bar))
    return found
