"""Tracks what ZeRO-3 holds whole at each moment of a pass, and what it sends for that.

The order in which modules fetch and release their parameters comes from `trace`; the rules for how long they stay, and
how many are fetched ahead, are those of DeepSpeed.

Source: deepspeed 0.19.8, runtime/zero/partitioned_param_coordinator.py and partition_parameters.py.
"""

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from aullm_dist.planning.recorder import Record
from aullm_dist.planning.skeleton import Weight


@dataclass(frozen=True, slots=True)
class Limits:
    """The keys of `zero_optimization` that matter; sizes in stored elements."""

    live: int
    reuse: int
    prefetch: int
    persistent: int


@dataclass(frozen=True, slots=True)
class Gathered:
    """The result for one micro-batch.

    Attributes:
        peak: bytes at most of passes and gathered parameters together.
        saved: of these, bytes that the passes keep at that moment.
        parameters: of these, bytes of whole parameters.
        in_transit: of these, bytes in which they travel.
        messages: bytes of this process's shares that it sends to all others, as DeepSpeed's logger counts them.
        gathers: number of those messages.
    """

    peak: int
    saved: int
    parameters: int
    in_transit: int
    messages: int
    gathers: int


class _Transfer:
    """Parameters that travel together: the space in which they arrive goes when the last of them was asked for."""

    __slots__ = ("arrived", "flat", "waiting")

    def __init__(self, weights: Sequence[Weight], flat: int) -> None:
        self.waiting, self.flat, self.arrived = set(weights), flat, False


class Gatherer:
    """One process's parameters during passes.

    Args:
        weights: all parameters.
        processes: among which a parameter is partitioned where it is gathered from.
        limits: from the strategy.
        copies_on_receipt: whether the communication library needs space of its own for what it receives, as gloo does.
    """

    def __init__(self, weights: Iterable[Weight], processes: int, limits: Limits, copies_on_receipt: bool) -> None:
        self._of: dict[str, list[Weight]] = defaultdict(list)
        # As DeepSpeed has come to know them: the LLM while it was loaded, the rest when it was set up.
        for weight in sorted(weights, key=lambda w: w.trainable):
            self._of[weight.owner].append(weight)
        self._leaves = {owner for owner, own in self._of.items() if own[0].in_layer}
        self._processes, self._limits, self._copies = processes, limits, copies_on_receipt
        self.persistent = {w for own in self._of.values() for w in own if w.numel <= limits.persistent}
        self._order: list[str] | None = None
        self._available: set[Weight] = set(self.persistent)
        self._active: dict[Weight, set[str]] = defaultdict(set)
        self._transfers: dict[Weight, _Transfer] = {}
        self._begin()

    def share(self, weight: Weight) -> int:
        """Return bytes of a process's share."""
        return -(-weight.numel // self._processes) * weight.itemsize

    def passes(self, records: Sequence[Record]) -> Gathered:
        """Go through the records of a micro-batch; the first call learns the order that later ones know."""
        self._begin()
        self._messages = self._gathers = 0
        seen: list[str] = []
        level, best = 0, Gathered(0, 0, 0, 0, 0, 0)
        for record in records:
            self._at_once = self._behind = 0
            if record.kind == "fetch":
                seen.append(record.module)
                self._fetch(record)
            elif record.kind == "release":
                self._release(record)
            whole, flats = self._held()
            # What is needed at once arrives before the module computes; what is fetched ahead travels meanwhile.
            for memory, transit in ((0, flats + self._at_once), (record.peak, flats + self._behind)):
                if level + memory + whole + transit > best.peak:
                    best = Gathered(level + memory + whole + transit, level, whole, transit, 0, 0)
            level += record.change
        for module in list(self._backward):
            self._let_go(self._of[module], set(self._of[module]) - self.persistent, module)
        if self._order is None:
            self._order = seen
            self._uses = [(w, step) for step, name in enumerate(seen) for w in self._of[name]]
            self._inside = {name: self._below(name) for name in dict.fromkeys(seen)}
        return replace(best, messages=self._messages, gathers=self._gathers)

    def partition_all(self) -> None:
        """End an optimizer step: everything is partitioned again, and persistent parameters are gathered again."""
        self._available = set(self.persistent)
        self._active.clear()

    def persistent_messages(self) -> int:
        """Return bytes of this process's shares of the parameters that are whole between steps."""
        return sum(map(self.share, self.persistent))

    def _begin(self) -> None:
        for transfer in set(self._transfers.values()):
            self._available |= transfer.waiting
            self._available -= {w for w in transfer.waiting if w not in self.persistent and not self._active[w]}
        self._transfers.clear()
        self._counted = self._step = 0
        self._queue = deque(self._uses) if self._order is not None else deque()
        self._last_use: dict[Weight, int] = defaultdict(lambda: -1)
        self._backward: dict[str, set[Weight]] = {}

    def _held(self) -> tuple[int, int]:
        arrived = {w for w, t in self._transfers.items() if t.arrived} | self._available
        flats = sum(transfer.flat for transfer in set(self._transfers.values()))
        return sum(w.nbytes for w in arrived), flats

    def _fetch(self, record: Record) -> None:
        if not record.forward:
            self._backward.setdefault(record.module, set())
        wanted = self._of[record.module]
        self._at_once = self._gather([w for w in wanted if w not in self._available and w not in self._transfers])
        for weight in wanted:
            self._active[weight].add(record.module)
            if record.anew and self._backward and not weight.trainable:
                owner = next(reversed(self._backward))
                self._backward[owner].add(weight)
                self._active[weight].add(owner)
            self._arrive(weight)
        if self._order is not None:
            self._fetch_ahead([w for w in wanted if self._last_use[w] < self._step])
        self._step += 1

    def _arrive(self, weight: Weight) -> None:
        transfer = self._transfers.pop(weight, None)
        if transfer is not None:
            transfer.arrived = True
            transfer.waiting.discard(weight)
            self._available.add(weight)

    def _fetch_ahead(self, fresh: list[Weight]) -> None:
        missing = set(fresh)
        while self._queue and missing:
            weight, step = self._queue.popleft()
            self._last_use[weight] = step
            missing.discard(weight)
        room = min(self._limits.live - self._counted, self._limits.prefetch)
        ahead: dict[Weight, None] = {}
        size = 0
        while self._queue and size < room:
            weight, step = self._queue.popleft()
            self._last_use[weight] = max(self._last_use[weight], step)
            if weight not in self._available and weight not in self._transfers and weight not in ahead:
                ahead[weight] = None
                size += weight.numel
        self._gather(list(ahead))
        if self._copies:
            self._behind = sum(map(self.share, ahead)) * self._processes

    def _gather(self, weights: list[Weight]) -> int:
        """Send for parameters; return bytes that are there twice at the moment when they arrive."""
        if not weights:
            return 0
        self._counted += sum(w.numel for w in weights)
        by_dtype: dict[int, list[Weight]] = defaultdict(list)
        for weight in weights:
            by_dtype[weight.itemsize].append(weight)
        twice = 0
        for same in by_dtype.values():
            sent = sum(map(self.share, same))
            self._messages += sent
            self._gathers += 1
            # A parameter that travels alone is used where it arrived; several are copied out of what arrived.
            flat = sent * self._processes if len(weights) > 1 else 0
            transfer = _Transfer(same, flat)
            transfer.arrived = len(weights) == 1
            self._transfers.update(dict.fromkeys(same, transfer))
            # Alone: gloo's own copy. Several: where they arrived, behind which gloo has freed its copy.
            twice += flat or self._copies * sent * self._processes
        return twice

    def _release(self, record: Record) -> None:
        module = record.module
        own = self._of[module]
        released = {w for w in own if w not in self.persistent}
        if self._order is not None:
            released = {w for w in released if self._last_use[w] <= self._step}
            released -= self._soon(module in self._leaves)
        members = list(own)
        if not record.forward:
            again = self._backward.pop(module, set())
            released |= {w for w in again if w not in self.persistent}
            members += again
        self._let_go(members, released, module)

    def _soon(self, leaf: bool) -> set[Weight]:
        """Return what is used again within the reuse distance; behind a leaf DeepSpeed counts what modules contain."""
        assert self._order is not None, "the order is known once it was traced"
        passed, soon = 0, set()
        for name in self._order[self._step :]:
            if passed >= self._limits.reuse:
                break
            for weight in self._inside[name] if leaf else self._of[name]:
                soon.add(weight)
                passed += weight.numel
        return soon

    def _below(self, module: str) -> list[Weight]:
        inside = f"{module}." if module else ""
        return [w for name, own in self._of.items() for w in own if name == module or name.startswith(inside)]

    def _let_go(self, members: Iterable[Weight], released: set[Weight], module: str) -> None:
        for weight in members:
            self._active[weight].discard(module)
            if weight in released and weight in self._available and not self._active[weight]:
                self._available.discard(weight)
                self._counted -= weight.numel


def limits_of(zero: Mapping[str, Any]) -> Limits:
    """Return the limits of a `zero_optimization` section, DeepSpeed's defaults where it is silent."""
    return Limits(
        live=int(zero.get("stage3_max_live_parameters", 1e9)),
        reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
        persistent=int(zero.get("stage3_param_persistence_threshold", 1e5)),
    )
