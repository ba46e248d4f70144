"""Finds the nearest change that makes a run fit: single changes in a fixed order, then the smallest combination."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from aullm_dist.config import Config
from aullm_dist.errors import UserError
from aullm_dist.planning.cluster import Cluster
from aullm_dist.planning.planner import Plan, plan

LARGEST_NODE = 8
"""GPUs that a machine is thought to have at most."""
MOST_GPUS = 1024

Setting = tuple[Config, Cluster]


@dataclass(frozen=True, slots=True)
class Change:
    """A way to need less memory: what to write in the run file, or on the command line, and why."""

    overrides: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        """Return what the user can paste."""
        return " ".join(self.overrides)


Option = tuple[Change, Callable[[Config, Cluster], Setting]]


@dataclass(frozen=True, slots=True)
class Advice:
    """What would fit: the changes and the plan with them; neither where nothing would."""

    changes: tuple[Change, ...]
    plan: Plan | None


def advise(config: Config, cluster: Cluster, make_plan: Callable[..., Plan] = plan) -> Advice:
    """Find the nearest change that fits. Of all changes NF4 alone is one of what the run learns.

    The order of single changes: NF4, activation checkpointing, smaller micro-batches at the same global batch, `zero3`,
    AdamW's state in the machine's memory, parameters in the machine's memory, more GPUs. Then pairs in the same order,
    then three, and so on.

    Args:
        config: the run's configuration, which does not fit.
        cluster: the machines, with their memory.
        make_plan: `plan` with what it is to be given besides.

    Returns:
        Changes that fit, with their plan, or none.
    """
    kinds = [options for options in (list(kind(config, cluster)) for kind in _KINDS) if options]

    def fitting(options: Sequence[Option]) -> Plan | None:
        made = _apply(config, cluster, options)
        if made is None:
            return None
        try:
            planned = make_plan(*made, speed=False)
        except UserError:
            # Changes that do not go together, a batch that the processes cannot share for one.
            return None
        return planned if planned.fits else None

    if all(fitting(options) is None for options in _strongest(config, cluster)):
        return Advice((), None)
    for size in range(1, len(kinds) + 1):
        for chosen in itertools.combinations(kinds, size):
            # The last option of each kind saves most: where that does not fit, the others need not be tried.
            if fitting([options[-1] for options in chosen]) is None:
                continue
            for options in itertools.product(*chosen):
                planned = fitting(options)
                if planned is not None:
                    return Advice(tuple(change for change, _ in options), planned)
    return Advice((), None)


def _strongest(config: Config, cluster: Cluster) -> Iterator[list[Option]]:
    """Yield what needs least memory under each strategy, with and without more GPUs.

    No strategy needs least at every size: the buffers of ZeRO-3 alone are more than a small LLM.
    """
    for more in (_MORE, ()):
        always = [options[-1] for kind in (*_SAVINGS, *more) if (options := list(kind(config, cluster)))]
        yield always
        for strategy in _STRATEGIES:
            yield from ([*always, option] for option in strategy(config, cluster))


def _apply(config: Config, cluster: Cluster, options: Sequence[Option]) -> Setting | None:
    for _, change in options:
        config, cluster = change(config, cluster)
    if config.training.global_batch % (config.training.micro_batch * cluster.gpus):
        return None
    return config, cluster


def _setting(name: str, value: object, reason: str) -> Option:
    def change(config: Config, cluster: Cluster) -> Setting:
        return config.changed({name: value}), cluster

    return Change((f"{name}={value}",), reason), change


def _nf4(config: Config, cluster: Cluster) -> Iterator[Option]:
    if config.model.quantization == "none":
        yield _setting("model.quantization", "nf4", "the frozen LLM in 4 bits: another function, the one of QLoRA")


def _checkpointing(config: Config, cluster: Cluster) -> Iterator[Option]:
    if config.model.activation_checkpointing == "none":
        yield _setting("model.activation_checkpointing", "non_reentrant", "about a third more time")


def _micro_batches(config: Config, cluster: Cluster) -> Iterator[Option]:
    smaller = config.training.micro_batch // 2
    while smaller:
        if config.training.micro_batch % smaller == 0:
            yield _setting("training.micro_batch", smaller, "the same global batch in more micro-batches")
        smaller //= 2


def _divided(config: Config, cluster: Cluster) -> Iterator[Option]:
    if cluster.gpus > 1 and not config.training.strategy.startswith("zero3"):
        yield _setting("training.strategy", "zero3", "the LLM is partitioned, and gathered in every micro-batch")


def _optimizer_on_host(config: Config, cluster: Cluster) -> Iterator[Option]:
    for strategy in ("zero2", "zero3"):
        if config.training.strategy == strategy:
            name = {"zero2": "zero2_offload", "zero3": "zero3_offload_optimizer"}[strategy]
            yield _setting("training.strategy", name, "AdamW's state is in the machine's memory")


def _parameters_on_host(config: Config, cluster: Cluster) -> Iterator[Option]:
    if config.training.strategy != "zero3_offload_param":
        yield _setting("training.strategy", "zero3_offload_param", "layers come from the machine's memory: slow")


def _more_gpus(config: Config, cluster: Cluster) -> Iterator[Option]:
    gpus = 2 * cluster.gpus
    while gpus <= MOST_GPUS and config.training.global_batch % gpus == 0:
        nodes = max(cluster.nodes, -(-gpus // LARGEST_NODE))
        if gpus % nodes == 0:
            yield _gpus(gpus, nodes)
        gpus *= 2


def _gpus(gpus: int, nodes: int) -> Option:
    def change(config: Config, cluster: Cluster) -> Setting:
        return config, dataclasses.replace(cluster, gpus=gpus, nodes=nodes)

    return Change((f"--gpus {gpus}", f"--nodes {nodes}", f"training.processes={gpus}"), "smaller shares"), change


_SAVINGS = (_nf4, _checkpointing, _micro_batches)
_STRATEGIES = (_divided, _optimizer_on_host, _parameters_on_host)
_MORE = (_more_gpus,)
_KINDS = (*_SAVINGS, *_STRATEGIES, *_MORE)
