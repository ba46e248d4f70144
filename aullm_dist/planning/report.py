"""Renders a plan for people, as tables, and for programs, as JSON."""

import dataclasses
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from aullm_dist.planning.advice import Advice
from aullm_dist.planning.planner import Phase, Plan

_GIB = 2**30
_MEANING = {
    "load": "the LLM is read and packed",
    "start": "the engine is set up",
    "step": "forward, backward, AdamW",
    "evaluation": "held-out clips are answered",
    "save": "a checkpoint is collected",
}


def shortfall(plan: Plan) -> str | None:
    """Return in one line by how much a run does not fit; None where it does, or where no memory was given."""
    cluster = plan.cluster
    if plan.fits is not False:
        return None
    parts = []
    if cluster.gpu_memory is not None and plan.gpu_bytes + cluster.reserve > cluster.gpu_memory:
        needed = plan.gpu_bytes + cluster.reserve
        what = "process" if cluster.cpu else "GPU"
        reserve = f", and {gib(cluster.reserve)} of reserve" if cluster.reserve else ""
        parts.append(
            f"each {what} needs {gib(needed)} ({gib(plan.gpu_bytes)} at its peak, in phase {plan.gpu_peak.name}"
            f"{reserve}), {gib(needed - cluster.gpu_memory)} more than its {gib(cluster.gpu_memory)}"
        )
    if cluster.host_memory is not None and plan.host_bytes > cluster.host_memory:
        parts.append(
            f"each machine needs {gib(plan.host_bytes)} of memory, {gib(plan.host_bytes - cluster.host_memory)} "
            f"more than its {gib(cluster.host_memory)}"
        )
    return "; ".join(parts)


def gib(nbytes: float) -> str:
    """Return bytes as text, in GiB, or in MiB where that says more."""
    return f"{nbytes / _GIB:.1f} GiB" if nbytes >= 0.95 * _GIB else f"{nbytes / 2**20:.0f} MiB"


def amount(value: float) -> str:
    """Return a number with two decimals, or with two digits where these would be zeros."""
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def print_plan(console: Console, name: str, plan: Plan, advice: Advice | None) -> None:
    """Print the tables of a plan.

    Args:
        console: where to.
        name: of the run file.
        plan: the plan.
        advice: what would fit, where the plan does not.
    """
    step = next(phase for phase in plan.phases if phase.name == "step")
    phases = [step] if plan.gpu_peak is step else [step, plan.gpu_peak]
    console.print(Group(_headline(name, plan), _memory(plan), *(_terms(phase, plan) for phase in phases)))
    console.print(Group(_traffic(plan), _speed(plan)))
    for line in plan.assumptions:
        console.print(Text(f"assumed: {line}", style="dim"))
    console.print(_verdict(plan, advice))


def _headline(name: str, plan: Plan) -> Text:
    sizes, cluster = plan.sizes, plan.cluster
    packed = ""
    if sizes["packed_weights"]:
        packed = f", {sizes['packed_weights'] / 1e9:.2f} of them in NF4 ({gib(sizes['packed_bytes'])})"
    on_cpu = "process on a CPU" if cluster.gpus == 1 else "processes on CPUs"
    what = on_cpu if cluster.cpu else "GPUs" if cluster.gpus > 1 else "GPU"
    machines = f" in {cluster.nodes} machines" if cluster.nodes > 1 else ""
    return Text.assemble(
        (f"{name}: {cluster.gpus} {what}{machines}, {plan.engine}\n", "bold"),
        f"LLM: {amount(sizes['llm_weights'] / 1e9)} 10^9 weights{packed}, {sizes['layers']} layers, "
        f"{gib(sizes['llm_bytes'])} without its vocabulary head\n",
        f"Trained: LoRA {sizes['lora_weights'] / 1e6:.2f}, other modules {sizes['other_trained_weights'] / 1e6:.2f} "
        "10^6 weights, float32\n",
        f"Micro-batch: {plan.config.training.micro_batch} clips, {sizes['branches_mean']} branches "
        f"(at most {sizes['branches_most']}), prompt {sizes['prefix_tokens']} + {sizes['suffix_tokens']}, "
        f"{sizes['tokens_mean']} tokens (at most {sizes['tokens_most']}); {sizes['micro_batches']} per step\n",
    )


def _memory(plan: Plan) -> Table:
    table = Table(title="Memory peaks", title_justify="left")
    table.add_column("phase")
    table.add_column("")
    for column in ["each process"] if plan.cluster.cpu else ["each GPU", "machine memory, a process"]:
        table.add_column(column, justify="right")
    for phase in plan.phases:
        cells = [gib(phase.both)] if plan.cluster.cpu else [gib(phase.total(False)), gib(phase.total(True))]
        style = "bold" if phase is plan.gpu_peak else ""
        table.add_row(phase.name, _MEANING[phase.name], *cells, style=style)
    return table


def _terms(phase: Phase, plan: Plan) -> Table:
    table = Table(title=f"What makes the peak of phase {phase.name}", title_justify="left")
    table.add_column("term")
    table.add_column("bytes", justify="right")
    if not plan.cluster.cpu:
        table.add_column("where")
    for term in sorted(phase.terms, key=lambda term: -term.nbytes):
        if term.nbytes:
            table.add_row(
                term.name, gib(term.nbytes), *([] if plan.cluster.cpu else ["machine" if term.on_host else "GPU"])
            )
    rest = [] if plan.cluster.cpu else [""]
    if phase.name in ("step", "evaluation"):
        table.add_row("vocabulary logits (the head is not loaded)", "0", *rest)
    if phase.name == "step" and plan.activations is not None:
        table.add_section()
        for kind, nbytes in plan.activations.items():
            table.add_row(f"passes at most, activation_checkpointing={kind}", gib(nbytes), *rest)
    return table


def _traffic(plan: Plan) -> Table:
    network = plan.network
    table = Table(title="Network and disk", title_justify="left")
    table.add_column("")
    table.add_column("bytes", justify="right")
    for operation, sent in network.messages.items():
        table.add_row(f"step: {operation}, handed over by a process", gib(sent))
    table.add_row("step: received by a process", gib(network.received))
    if plan.cluster.nodes > 1:
        table.add_row("step: received by a machine from the others", gib(network.between_nodes))
    table.add_row("start: read from disk by a machine", gib(network.read))
    table.add_row("start: received by a process", gib(network.exchanged))
    table.add_row("save: written to disk", gib(network.written))
    return table


def _speed(plan: Plan) -> Table:
    speed = plan.speed
    assert speed is not None, "only a plan with arithmetic is printed"
    what = "process" if plan.cluster.cpu else "GPU"
    table = Table(title=f"Arithmetic of an optimizer step, one {what}", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("floor: 4 x weights x tokens", f"{amount(speed.floor_flops / 1e12)} TFLOP")
    table.add_row("counted: with LoRA, attention, recomputation", f"{amount(speed.flops / 1e12)} TFLOP")
    rows = (
        (f"computing at the {what}'s peak", speed.compute_seconds, " s"),
        ("sending", speed.network_seconds, " s"),
        ("clips/s, at most", speed.clips_per_second_at_most, ""),
        ("clips/s, at the assumed efficiency", speed.clips_per_second, ""),
    )
    for name, value, unit in rows:
        if value is not None:
            table.add_row(name, f"{value:.3g}{unit}")
    return table


def _verdict(plan: Plan, advice: Advice | None) -> Text:
    if plan.fits is None:
        of_process = " of one process" if plan.cluster.cpu else ""
        return Text(f"Give --gpu-memory{of_process} (and --host-memory) to learn whether it fits.", style="bold")
    if plan.fits:
        left = (
            [] if plan.cluster.gpu_memory is None else [plan.cluster.gpu_memory - plan.cluster.reserve - plan.gpu_bytes]
        )
        what = "process" if plan.cluster.cpu else "GPU"
        return Text(f"It fits{f', {gib(left[0])} of each {what} to spare' if left else ''}.", style="bold green")
    lines: list[str | tuple[str, str]] = [(f"It does not fit: {shortfall(plan)}.\n", "bold red")]
    if advice is not None and advice.plan is not None:
        lines.append((f"The nearest change that fits: {' '.join(map(str, advice.changes))}", "bold"))
        lines += [f"\n  {change}: {change.reason}" for change in advice.changes]
        lines.append(f"\n  then the peak is {gib(advice.plan.gpu_bytes)}, in phase {advice.plan.gpu_peak.name}")
    elif advice is not None:
        lines.append("None of the changes that are known, nor all of them together, makes it fit.")
    return Text.assemble(*lines)


def as_dict(name: str, plan: Plan, advice: Advice | None = None) -> dict[str, Any]:
    """Return a plan as plain values: bytes, seconds, operations."""
    cluster = plan.cluster
    described: dict[str, Any] = {
        "run": name,
        "strategy": plan.engine,
        "cluster": dataclasses.asdict(cluster),
        "sizes": plan.sizes,
        "phases": {phase.name: _phase(phase, cluster.cpu) for phase in plan.phases},
        "peak": {"phase": plan.gpu_peak.name, "bytes": plan.gpu_bytes, "machine_bytes": plan.host_bytes},
        "network": dataclasses.asdict(plan.network),
        "activations": plan.activations,
        "speed": None if plan.speed is None else dataclasses.asdict(plan.speed),
        "assumptions": list(plan.assumptions),
        "fits": plan.fits,
        "shortfall": shortfall(plan),
    }
    if advice is not None:
        described["advice"] = {
            "changes": [{"overrides": list(c.overrides), "reason": c.reason} for c in advice.changes],
            "peak_bytes": advice.plan.gpu_bytes if advice.plan is not None else None,
        }
    return described


def _phase(phase: Phase, cpu: bool) -> dict[str, Any]:
    totals = {"bytes": phase.both} if cpu else {"gpu_bytes": phase.total(False), "machine_bytes": phase.total(True)}
    terms = [{"name": t.name, "bytes": t.nbytes, "where": "machine" if t.on_host else "gpu"} for t in phase.terms]
    return {**totals, "terms": terms}
