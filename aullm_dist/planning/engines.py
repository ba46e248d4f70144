"""Counts what each engine holds of the parameters and of their optimizer, from one moment of a run to the next.

Names: N processes, T bytes of everything that is trained, all float32. On a CPU, address space counts when it is
written to; on a GPU all of it counts. What is offloaded is in the machine's memory, as is what the trainer keeps there.

Source: torch 2.13 (DistributedDataParallel, AdamW) and deepspeed 0.19.8, runtime/zero/stage_1_and_2.py and stage3.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aullm_dist.config import offloaded_to
from aullm_dist.config.sharding import HPZ
from aullm_dist.planning.gathering import Limits, limits_of
from aullm_dist.planning.skeleton import Weight

FLOAT32 = 4
DDP_BROADCAST = 250 * 2**20
"""Bytes from which DistributedDataParallel closes a bucket when it sends process 0's values to all, two at a time."""


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a memory peak.

    Attributes:
        name: what it is, with its formula in letters where it has one.
        nbytes: its bytes.
        on_host: whether it is in the machine's memory rather than the GPU's.
    """

    name: str
    nbytes: int
    on_host: bool = False


@dataclass(frozen=True, slots=True)
class Engine:
    """A strategy for a number of processes.

    Attributes:
        stage: ZeRO stage, 0 for DDP.
        processes: N.
        cpu: whether the processes compute on CPUs.
        accumulation: micro-batches of an optimizer step.
        limits: of ZeRO-3.
        bucket: elements of the buffer in which gradients wait to be sent.
        overlap: whether there are two of them in stages 1 and 2.
        second: processes among which ZeRO++ hpZ divides parameters a second time, 1 without it.
        offload_optimizer, offload_param: whether these are in the machine's memory.
        team: processes that train a fold together: all of them, unless several folds are trained at once.
    """

    stage: int
    processes: int
    cpu: bool
    accumulation: int
    limits: Limits
    bucket: int
    overlap: bool
    second: int
    offload_optimizer: bool
    offload_param: bool
    team: int

    @classmethod
    def of(
        cls,
        deepspeed: Mapping[str, Any] | None,
        processes: int,
        accumulation: int,
        cpu: bool,
        team: int | None = None,
    ) -> "Engine":
        """Return the engine of a resolved DeepSpeed configuration, DDP for None; `team` is None for all processes."""
        zero = deepspeed["zero_optimization"] if deepspeed else {}
        stage = zero.get("stage", 0)
        return cls(
            stage=stage,
            processes=processes,
            cpu=cpu,
            accumulation=accumulation,
            limits=limits_of(zero),
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            overlap=bool(zero.get("overlap_comm") if zero.get("overlap_comm") is not None else stage == 3),
            second=int(zero.get(HPZ, 1)),
            offload_optimizer=offloaded_to(zero, "optimizer") != "none",
            offload_param=offloaded_to(zero, "param") != "none",
            team=team or processes,
        )

    @property
    def is_plain(self) -> bool:
        """Whether what is trained is whole in each process: with DDP, and where teams share a partitioned LLM."""
        return self.stage == 0 or self.team < self.processes

    def share(self, weight: Weight) -> int:
        """Return bytes of a parameter that a process keeps."""
        if self.stage < 3:
            return weight.nbytes
        return -(-weight.numel // self.processes) * weight.itemsize

    def base(self, weights: Sequence[Weight]) -> list[Term]:
        """Return what is held of the frozen LLM between passes."""
        frozen = [w for w in weights if not w.trainable]
        whole = "frozen LLM" if self.stage < 3 else "frozen LLM / N"
        terms = [Term(whole, sum(map(self.share, frozen)), self.offload_param)]
        if self.stage == 3 and self.second > 1:
            second = sum(-(-w.numel // self.second) * w.itemsize for w in weights)
            terms.append(Term("second share of all parameters / processes of a machine", second, self.offload_param))
        terms.append(Term("quantisation constants", sum(w.constants for w in weights)))
        return terms

    def trained(self, weights: Sequence[Weight]) -> list[Term]:
        """Return what is held of what is trained between steps, once a step was taken."""
        total, part = self._sizes(weights)
        host = self.offload_optimizer
        first = Term("first values of what is trained, for the next fold: T", total, True)
        if self.is_plain:
            buckets = [Term("gradient buckets: T", total)] if self.team > 1 else []
            return [Term("trained parameters: T", total), Term("AdamW's moments: 2T", 2 * total), *buckets, first]
        moments = Term("AdamW's moments: 2T/N", 2 * part, host)
        if self.stage < 3:
            own = [Term("trained parameters, flat: T", total), Term("their float32 copy: T/N", part, host)]
            if host:
                largest = FLOAT32 * max(w.numel for w in weights if w.trainable)
                own += [Term("gradients and copy on their way: 2T/N", 2 * part, True)]
                own += [Term("one gradient on its way", largest), Term("one gradient on its way", largest, True)]
            return [*own, moments, first]
        return [*self._divided(weights), moments, first]

    def _divided(self, weights: Sequence[Weight]) -> list[Term]:
        """Return what ZeRO-3 holds of what is trained before its first step."""
        total, part = self._sizes(weights)
        host, bucket = self.offload_optimizer, FLOAT32 * self.bucket
        own = [
            Term("trained parameters: T/N", part, self.offload_param),
            Term("their float32 copy: T/N", part, host),
            Term("gradients: T/N", part, host),
            Term("gradient bucket", min(bucket, total) if self.cpu else bucket),
        ]
        return [*own, Term("gradients of the optimizer: T/N", part, True)] if host else own

    def at_end_of_backward(self, weights: Sequence[Weight]) -> list[Term]:
        """Return what sending the gradients takes when all of them are there."""
        total, part = self._sizes(weights)
        if self.is_plain:
            return [Term("gradients: T", total)]
        held = min(total, FLOAT32 * self.bucket)
        if self.stage == 3:
            sent = [Term("gradients as they are sent", held)]
            return sent + ([Term("gradients as gloo receives them", held)] if self.cpu and self.processes > 1 else [])
        buffers = (1 + self.overlap) * FLOAT32 * self.bucket
        touched = min(total, buffers)
        terms = [
            Term("gradient bucket", touched if self.cpu else buffers),
            Term("gradients as they are sent", held),
            Term("gradients of the own part: T/N", part, self.offload_optimizer),
        ]
        if self.stage == 1 and self.accumulation > 1:
            terms.append(Term("gradients: T", total))
        return terms

    def at_optimizer(self, weights: Sequence[Weight]) -> list[Term]:
        """Return what norm and update take beyond what stays; fused AdamW itself takes nothing."""
        total, part = self._sizes(weights)
        # The norm is taken in float64, of one gradient after the other.
        largest = 2 * FLOAT32 * max(w.numel for w in weights if w.trainable)
        if self.is_plain:
            return [Term("gradients: T", total), Term("a gradient in float64, for its norm", largest)]
        waiting = []
        if self.stage < 3 and not self.offload_optimizer:
            waiting = [Term("gradients that wait", (total if self.stage == 1 else 0) + part)]
        if self.stage == 3:
            largest = -(-largest // self.processes)
        norm = Term("a gradient in float64, for its norm", largest, self.offload_optimizer)
        flat = Term("flat gradients: T/N", part, self.offload_optimizer)
        return [*waiting, max(norm, flat, key=lambda term: term.nbytes)]

    def during_passes(self, weights: Sequence[Weight]) -> list[Term]:
        """Return what is held while a micro-batch is computed that is not there between steps."""
        total, part = self._sizes(weights)
        if self.is_plain:
            return [Term("gradients of earlier micro-batches: T", total)] if self.accumulation > 1 else []
        if self.stage == 3:
            return []
        buffers = (1 + self.overlap) * FLOAT32 * self.bucket
        terms = [] if self.cpu else [Term("gradient bucket", buffers)]
        if self.accumulation > 1:
            size, name = (part, "T/N") if self.stage == 2 else (total, "T")
            terms.append(Term(f"gradients of earlier micro-batches: {name}", size, self.offload_optimizer))
        return terms

    def at_start(self, weights: Sequence[Weight]) -> list[Term]:
        """Return what setting up takes: more than what is then held."""
        total, part = self._sizes(weights)
        held = [Term("trained parameters: T", total), Term("first values of what is trained: T", total, True)]
        if self.is_plain:
            if self.team == 1:
                return held
            if self.stage == 3:
                return held if self.cpu else [*held, Term("gradient buckets: T", total)]
            flat = Term("values that process 0 sends, two buckets at a time", _broadcast_buckets(weights))
            return [*held, flat] if self.cpu else [*held, flat, Term("gradient buckets: T", total)]
        if self.stage < 3:
            return [*held, Term("trained parameters, flat: T", total), Term("their float32 copy: T/N", part)]
        # Partitioned one after the other; then joined into flat pieces. Last comes the bucket, whole on a GPU.
        joined = [Term("shares, as they were and flat: 2T/N", 2 * part), Term("optimizer's buffers: 3T/N", 3 * part)]
        if self.cpu:
            return [held[1], *joined]
        ready = self._divided(weights)
        return [held[1], *max(joined, ready, key=lambda terms: sum(t.nbytes for t in terms if not t.on_host))]

    def sends_per_step(self, weights: Sequence[Weight], gathers: int, persistent: int) -> dict[str, int]:
        """Return bytes of the messages of an optimizer step by operation, as DeepSpeed's logger counts them.

        Args:
            weights: all parameters.
            gathers: bytes of one micro-batch's gathering.
            persistent: bytes of gathering what is whole between steps.
        """
        total, part = self._sizes(weights)
        if self.processes == 1:
            return {}
        if self.is_plain:
            averaged = {"all_reduce": total} if self.team > 1 else {}
            return averaged | ({"all_gather_into_tensor": self.accumulation * gathers} if self.stage == 3 else {})
        if self.stage < 3:
            times = self.accumulation if self.stage == 2 else 1
            return {"all_reduce": times * total, "all_gather_into_tensor": part}
        return {
            "all_gather_into_tensor": self.accumulation * gathers + persistent,
            "reduce_scatter_tensor": self.accumulation * total,
        }

    def _sizes(self, weights: Sequence[Weight]) -> tuple[int, int]:
        """Return T, and bytes of a process's part."""
        trained = [w for w in weights if w.trainable]
        return sum(w.nbytes for w in trained), sum(-(-w.numel // self.processes) * FLOAT32 for w in trained)


def _broadcast_buckets(weights: Sequence[Weight]) -> int:
    """Return bytes of the two largest buckets in a row in which DDP copies all parameters, by dtype, to send them."""
    largest = 0
    for itemsize in {w.itemsize for w in weights}:
        buckets, now = [], 0
        for weight in weights:
            if weight.itemsize == itemsize:
                now += weight.nbytes
                if now >= DDP_BROADCAST:
                    buckets.append(now)
                    now = 0
        buckets.append(now)
        largest = max(largest, *(sum(buckets[i : i + 2]) for i in range(len(buckets))))
    return largest
