"""Provides what the benchmarks of both kernels share: timing, memory, ceilings of this machine, errors, tables.

Times come from CUDA events over runs with a flushed L2 (`triton.testing.do_bench`), on a CPU from the clock. Ceilings -
a copy, a matrix product, instruction issue - are measured in the same run, and a kernel's floor is the largest of what
its bytes, FLOPs and instructions take at them.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MODES = ("forward", "backward", "full")
LEGEND = """\
Times in us. MB, GB/s: the least bytes a pass must move, and over its time. % SoL: speed of light, the least time for
bytes, FLOPs or instructions (`by`) at this machine's ceilings, over the time. saved, peak: MiB kept for the backward
pass, inputs aside, and the most allocated above them. error: the largest relative error of result and gradients to
float64. x: how many times faster ours is."""
_SUSPICIOUS = 10.0
_HEAD = ("provider", "mode", "p50", "p20", "p80", "MB", "GB/s", "% SoL", "by", "saved", "peak", "error", "x")
_WIDTHS = (20, 8, 8, 8, 8, 8, 7, 7, 5, 7, 7, 7, 6)


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass must do at least: bytes that memory moves, FLOPs in matrix products, instructions of all threads."""

    bytes: float
    flops: float = 0.0
    instructions: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops, self.instructions + other.instructions)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Bytes, FLOPs and thread instructions per second that this machine reaches; None where it was not measured."""

    copy: float
    matmul: float
    issue: float | None

    def floor(self, work: Work) -> tuple[float, str]:
        """Return the seconds that `work` takes at least, and what they are bound by."""
        bounds = {"bytes": work.bytes / self.copy, "flops": work.flops / self.matmul}
        if self.issue:
            bounds["issue"] = work.instructions / self.issue
        bound = max(bounds, key=bounds.get)
        return bounds[bound], bound


@dataclass(slots=True)
class Provider:
    """One way to compute an op.

    Attributes:
        name: As in the table.
        call: Differentiable inputs by name -> result.
        prepare: What the inputs become first; the autocast provider takes float32.
        skip: Why it does not run here, or None.
        comparable: Whether it computes the very function, so that its error means something.
        ours: Whether the others are compared with it.
    """

    name: str
    call: Callable[..., Tensor] | None
    prepare: Callable[[Tensor], Tensor] = field(default=lambda tensor: tensor)
    skip: str | None = None
    comparable: bool = True
    ours: bool = False


def times(call: Callable[[], object], device: str, seconds: float = 0.2) -> tuple[float, float, float]:
    """Return median, 20th and 80th percentile of the seconds of `call`."""
    if device == "cuda":
        from triton.testing import do_bench

        return tuple(1e-3 * ms for ms in do_bench(call, warmup=50, rep=200, quantiles=[0.5, 0.2, 0.8]))
    call()
    found, end = [], time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    low, *_, high = statistics.quantiles(found, n=5, method="inclusive")
    return statistics.median(found), low, high


def measure_ceilings(device: str) -> Ceilings:
    """Measure what this machine reaches."""
    big = device == "cuda"
    # 4 GB with the copy, and on a CPU 32 MB.
    source = torch.randn(2**29 if big else 2**22, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / times(lambda: target.copy_(source), device)[0]
    size, dtype = (8192, torch.bfloat16) if big else (512, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    matmul = 2 * size**3 / times(lambda: a @ b, device)[0]
    return Ceilings(copy, matmul, _issue_rate() if big else None)


def _issue_rate() -> float:
    """Thread instructions per second of a kernel that does nothing but independent multiply-adds."""
    from issue_kernel import INSTRUCTIONS, run

    out = torch.empty(132 * 16 * 1024, device="cuda")
    return INSTRUCTIONS * out.numel() / times(lambda: run(out), "cuda")[0]


def row(
    provider: Provider, inputs: dict[str, Tensor], expected: dict[str, Tensor], work: dict[str, Work], top: Ceilings
) -> list[dict]:
    """Measure a provider in every mode: one row for each, or one that says why there is none.

    Args:
        provider: What to run.
        inputs: Differentiable inputs.
        expected: Result (`out`) and gradients in float64.
        work: What each mode must do at least.
        top: Ceilings of this machine.
    """
    if provider.skip:
        return [{"provider": provider.name, "skip": provider.skip}]
    try:
        return _measured(provider, inputs, expected, work, top)
    except torch.OutOfMemoryError:
        return [{"provider": provider.name, "skip": "more memory than the device has"}]
    except RuntimeError as error:
        # A compiler that another provider needs must not end the run; what is wrong with ours must.
        if provider.ours:
            raise
        return [{"provider": provider.name, "skip": (str(error).splitlines() or [type(error).__name__])[0][:80]}]


def _measured(
    provider: Provider, inputs: dict[str, Tensor], expected: dict[str, Tensor], work: dict[str, Work], top: Ceilings
) -> list[dict]:
    device = next(iter(inputs.values())).device.type
    leaves = {name: provider.prepare(value.detach()).requires_grad_() for name, value in inputs.items()}
    out = provider.call(**leaves)
    grad = torch.randn_like(out)
    worst = _errors(provider, leaves, expected) if provider.comparable else None
    saved, peak = _memory(provider, leaves, grad, device)

    def clear() -> None:
        for leaf in leaves.values():
            leaf.grad = None

    def backward() -> None:
        clear()
        out.backward(grad, retain_graph=True)

    def full() -> None:
        clear()
        provider.call(**leaves).backward(grad)

    calls = {"forward": lambda: provider.call(**leaves), "backward": backward, "full": full}
    rows = []
    for mode in MODES:
        median, low, high = times(calls[mode], device)
        floor, bound = top.floor(work[mode])
        rows.append(
            {
                "provider": provider.name,
                "mode": mode,
                "p50_us": 1e6 * median,
                "p20_us": 1e6 * low,
                "p80_us": 1e6 * high,
                "bytes": work[mode].bytes,
                "gb_per_s": 1e-9 * work[mode].bytes / median,
                "percent_of_floor": 100 * floor / median,
                "bound": bound,
                "saved_mib": saved / 2**20,
                "peak_mib": None if peak is None else peak / 2**20,
                "error": worst,
            }
        )
    return rows


def _errors(provider: Provider, leaves: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the largest relative error of result and gradients to float64."""
    out = provider.call(**leaves)
    out.backward(torch.ones_like(out))
    found = {"out": out, **{name: leaf.grad for name, leaf in leaves.items()}}
    for leaf in leaves.values():
        leaf.grad = None
    return max(
        ((found[name].double() - value).norm() / value.norm().clamp(min=1e-9)).item()
        for name, value in expected.items()
    )


def _memory(provider: Provider, leaves: dict[str, Tensor], grad: Tensor, device: str) -> tuple[int, int | None]:
    """Return the bytes kept for the backward pass, inputs aside, and on a GPU the peak above the inputs of a pass."""
    storages: dict[int, int] = {}
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = provider.call(**leaves)
    saved = sum(storages.values())
    del out
    if device != "cuda":
        return saved, None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    provider.call(**leaves).backward(grad)
    torch.cuda.synchronize()
    for leaf in leaves.values():
        leaf.grad = None
    return saved, torch.cuda.max_memory_allocated() - before


def add_speedups(rows: list[dict], ours: str, arithmetic: str) -> list[str]:
    """Add to each provider how much faster `ours` is; return a line for every one above 10 times, with its reason."""
    mine = {r["mode"]: r["p50_us"] for r in rows if r["provider"] == ours and "mode" in r}
    lines = []
    for r in rows:
        if "mode" in r and r["mode"] in mine and r["provider"] != ours:
            r["ours_faster"] = r["p50_us"] / mine[r["mode"]]
            if r["ours_faster"] > _SUSPICIOUS:
                lines.append(f"{r['ours_faster']:.1f} times {r['provider']} in {r['mode']}: {arithmetic}")
    return lines


def cells_of(r: dict) -> list[str]:
    """Return a measured row as it is printed."""
    times_us = [_short(r[name]) for name in ("p50_us", "p20_us", "p80_us")]
    work = [_short(1e-6 * r["bytes"]), _short(r["gb_per_s"]), _short(r["percent_of_floor"]), r["bound"]]
    memory = [_short(r["saved_mib"]), "-" if r["peak_mib"] is None else _short(r["peak_mib"])]
    error = "-" if r["error"] is None else f"{r['error']:.0e}"
    faster = _short(r["ours_faster"]) if "ours_faster" in r else "-"
    return [r["provider"], r["mode"], *times_us, *work, *memory, error, faster]


def _short(value: float) -> str:
    """Three digits or more, without an exponent."""
    return f"{value:.4f}" if value < 1 else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def text(title: str, rows: list[dict]) -> str:
    """Return the rows as a table of at most 120 columns."""
    lines = [title, _line(_HEAD)]
    for r in rows:
        lines.append(f"{r['provider']:<{_WIDTHS[0]}} not run: {r['skip']}" if "skip" in r else _line(cells_of(r)))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    left = [f"{cell:<{width}}" for cell, width in zip(cells[:2], _WIDTHS[:2], strict=True)]
    return " ".join(left + [f"{cell:>{width}}" for cell, width in zip(cells[2:], _WIDTHS[2:], strict=True)])


def markdown(title: str, rows: list[dict]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [f"### {title}", "", f"| {' | '.join(_HEAD)} |", "|---|---" + "|---:" * (len(_HEAD) - 2) + "|"]
    for r in rows:
        if "skip" in r:
            lines.append(f"| {r['provider']} | not run: {r['skip']} |{' |' * (len(_HEAD) - 2)}")
        else:
            lines.append(f"| {' | '.join(cells_of(r))} |")
    return "\n".join(lines)
