"""Counts what a run sends and computes, and estimates how fast it may be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from aullm_dist.planning.cluster import Cluster
from aullm_dist.planning.engines import Engine
from aullm_dist.planning.loading import read_bytes
from aullm_dist.planning.saving import checkpoint_bytes
from aullm_dist.planning.skeleton import Weight


@dataclass(frozen=True, slots=True)
class Network:
    """What is sent. Messages are counted as DeepSpeed's logger does: the tensor that a process hands over."""

    messages: dict[str, int]
    """Bytes of one process's messages of an optimizer step, by operation."""
    received: int
    """Bytes that one process receives in a step when rings carry the messages."""
    between_nodes: int
    """Bytes that one machine receives from the others in a step."""
    read: int
    """Bytes that a machine reads from disk at a start."""
    written: int
    """Bytes of tensors that a checkpoint puts on disk."""
    exchanged: int
    """Bytes that one process receives while the LLM is loaded and what is trained is made equal."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Arithmetic of an optimizer step of one GPU or process, and what follows from it where its peak is known."""

    tokens: int
    """LLM tokens of a micro-batch, branches on average."""
    floor_flops: int
    """4 x weights x tokens of all micro-batches: forward, and gradients of the inputs."""
    flops: int
    """Counted over the passes: with LoRA, attention and what is recomputed."""
    compute_seconds: float | None
    """At the peak of the GPU."""
    network_seconds: float | None
    clips_per_second_at_most: float | None
    """All GPUs at their peak, sending behind computing."""
    clips_per_second: float | None
    """At the assumed efficiency, nothing overlapped."""


def network_of(engine: Engine, cluster: Cluster, weights: Sequence[Weight], messages: Mapping[str, int]) -> Network:
    """Count what rings carry of messages.

    Of S bytes that each process hands over, an all-gather brings it (N - 1) S, a reduce-scatter (N - 1) / N S and an
    all-reduce twice that; where a ring crosses machines, as much comes into each machine.

    Args:
        engine: the strategy.
        cluster: the machines.
        weights: all parameters.
        messages: bytes that a process hands over in a step, by operation.
    """
    received = between = 0
    for operation, sent in messages.items():
        members, crosses = engine.processes, cluster.nodes > 1
        if operation == "all_gather_into_tensor":
            if engine.second > 1:
                # Layers come from within the machine.
                members, crosses = engine.second, engine.second > cluster.per_node
            brought = (members - 1) * sent
        else:
            if engine.is_plain:
                members, crosses = engine.team, engine.team > cluster.per_node
            brought = (2 if operation == "all_reduce" else 1) * sent * (members - 1) // members
        received += brought
        between += brought if crosses else 0
    return Network(
        messages=dict(messages),
        received=received,
        between_nodes=between,
        read=read_bytes(weights) // cluster.nodes,
        written=checkpoint_bytes(weights),
        exchanged=_exchanged(engine, weights),
    )


def _exchanged(engine: Engine, weights: Sequence[Weight]) -> int:
    """Return bytes that a process receives at a start: weights that the others read, and process 0's first values."""
    if engine.processes == 1 or (engine.is_plain and engine.stage == 3):
        return 0
    base = sum(w.nbytes + w.constants for w in weights if not w.trainable)
    total = sum(w.nbytes for w in weights if w.trainable)
    if engine.stage < 3:
        # The engine makes the LLM equal once more, although it is.
        total += base
    if engine.stage < 3 or engine.second > 1:
        total += base * (engine.processes - 1) // engine.processes
    return total


def speed_of(
    weights: Sequence[Weight],
    cluster: Cluster,
    network: Network,
    tokens: int,
    micro_batches: int,
    flops: int,
    global_batch: int,
) -> Speed:
    """Return the arithmetic of an optimizer step, and clips per second.

    Args:
        weights: all parameters.
        cluster: the machines.
        network: what is sent in a step.
        tokens: LLM tokens of a micro-batch.
        micro_batches: of a step.
        flops: counted in the passes of a micro-batch.
        global_batch: clips of a step.
    """
    frozen = sum(w.weights for w in weights if not w.trainable and _multiplies(w))
    floor, counted = 4 * frozen * tokens * micro_batches, flops * micro_batches
    if cluster.gpu_flops is None:
        return Speed(tokens, floor, counted, None, None, None, None)
    compute = counted / cluster.gpu_flops
    within = network.received - network.between_nodes
    sending = within / cluster.link + network.between_nodes / cluster.interconnect
    return Speed(
        tokens=tokens,
        floor_flops=floor,
        flops=counted,
        compute_seconds=compute,
        network_seconds=sending,
        clips_per_second_at_most=global_batch / max(compute, sending),
        clips_per_second=global_batch / (compute / cluster.efficiency + sending),
    )


def _multiplies(weight: Weight) -> bool:
    """Whether a frozen weight is part of a product that is computed: no embedding, no norm's gain, no head."""
    return weight.name.endswith("weight") and not any(part in weight.name for part in ("embed", "norm", "lm_head"))
