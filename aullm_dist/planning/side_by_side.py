"""Compares how many folds to train at once: memory, gathering and time of every number that the processes allow."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from aullm_dist.config import Config
from aullm_dist.data.order import total_steps
from aullm_dist.planning.cluster import Cluster
from aullm_dist.planning.planner import Plan
from aullm_dist.planning.report import gib


@dataclass(frozen=True, slots=True)
class Choice:
    """A number of folds at once, with the largest micro-batch that fits."""

    folds_at_once: int
    plan: Plan
    gathered: int
    """Bytes of the LLM that a process receives for an optimizer step of one fold."""
    step_seconds: float | None
    """Of an optimizer step, which every team takes at the same time; None for CPUs, whose speed is not assumed."""
    protocol_seconds: float | None
    """Of all folds, at the assumed efficiency: evaluations, checkpoints and loading left out."""


def compare(
    config: Config, cluster: Cluster, make: Callable[..., Plan], folds: int, clips: int | None = None
) -> list[Choice]:
    """Plan every number of folds at once that divides the processes.

    Args:
        config: the run's configuration; its micro-batch is not looked at.
        cluster: the machines; without their memory, the largest micro-batch is taken.
        make: `planner.plan`, with what is known already.
        folds: of the protocol.
        clips: training clips of a fold; None takes an epoch to be one step, so that only proportions mean anything.
    """
    training = config.training
    clips = training.global_batch if clips is None else clips
    steps = total_steps(clips, training.epochs, training.global_batch, training.max_steps)
    choices = []
    for groups in (number for number in range(1, min(cluster.gpus, folds) + 1) if cluster.gpus % number == 0):
        team = cluster.gpus // groups
        fitting = None
        for micro_batch in _micro_batches(training.global_batch, team):
            changed = config.changed({"training.folds_at_once": groups, "training.micro_batch": micro_batch})
            if make(changed, cluster, speed=False).fits is not False:
                fitting = changed
                break
        if fitting is not None:
            choices.append(_choice(make(fitting, cluster), groups, math.ceil(folds / groups) * steps))
    return choices


def _micro_batches(global_batch: int, team: int) -> Iterator[int]:
    """Yield the micro-batches that a team can share a step by, from the largest."""
    if global_batch % team:
        return
    share = global_batch // team
    yield from (number for number in range(share, 0, -1) if share % number == 0)


def _choice(plan: Plan, groups: int, steps: int) -> Choice:
    speed = plan.speed
    assert speed is not None
    sent = plan.network.messages.get("all_gather_into_tensor", 0)
    gathered = (plan.cluster.gpus - 1) * sent // groups
    if speed.clips_per_second is None:
        return Choice(groups, plan, gathered, None, None)
    seconds = plan.config.training.global_batch * groups / speed.clips_per_second
    return Choice(groups, plan, gathered, seconds, steps * seconds)


def best(choices: Sequence[Choice]) -> Choice | None:
    """Return the choice that ends first, the one with fewer folds at once where it makes no difference.

    None where nothing is known of the time.
    """
    timed = [(choice.protocol_seconds, choice.folds_at_once) for choice in choices if choice.protocol_seconds]
    return next((c for c in choices if timed and (c.protocol_seconds, c.folds_at_once) == min(timed)), None)


def table_of(choices: Sequence[Choice], folds: int, known: bool) -> Table:
    """Return the choices as a table, the best one in bold.

    Args:
        choices: from `compare`.
        folds: of the protocol.
        known: whether the training clips of a fold are known.
    """
    table = Table(title=f"{folds} folds, so many at once, with the largest micro-batch that fits", title_justify="left")
    what = "process" if choices and choices[0].plan.cluster.cpu else "GPU"
    for column in ("training.folds_at_once", "micro_batch", f"each {what}", "gathered per fold-step", "a step"):
        table.add_column(column, justify="right")
    table.add_column("all folds" if known else "all folds, in proportion", justify="right")
    chosen, slowest = best(choices), max((c.protocol_seconds or 0.0 for c in choices), default=0.0)
    for choice in choices:
        seconds = choice.protocol_seconds
        time = "-" if seconds is None else f"{seconds / 3600:.3g} h" if known else f"{seconds / slowest:.2f}"
        table.add_row(
            str(choice.folds_at_once),
            str(choice.plan.config.training.micro_batch),
            gib(choice.plan.gpu_bytes),
            gib(choice.gathered),
            "-" if choice.step_seconds is None else f"{choice.step_seconds:.3g} s",
            time,
            style="bold" if choice is chosen else "",
        )
    return table


def as_list(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Return the choices as plain values: bytes and seconds."""
    return [
        {
            **{f.name: getattr(choice, f.name) for f in dataclasses.fields(choice) if f.name != "plan"},
            "micro_batch": choice.plan.config.training.micro_batch,
            "gpu_bytes": choice.plan.gpu_bytes,
        }
        for choice in choices
    ]
