"""Keeps a board that all processes read and write without waiting for each other: what folds are left, who is done.

It lies in the store that the processes found each other through; no collective is part of it, so teams may come to it
at any time.
"""

import itertools
import json
import time
from collections.abc import Callable

import torch.distributed as dist

from aullm_dist.errors import CheckpointError, UserError

_RUNS = itertools.count()
_POLL_SECONDS = 0.2


class Board:
    """The board of one run; every process makes one for each run, in the same order.

    Args:
        store: None takes the one of the process group.
    """

    def __init__(self, store: dist.Store | None = None) -> None:
        # torch has no public name for it, and a store of our own would need another port.
        base = dist.distributed_c10d._get_default_store() if store is None else store
        self._store = dist.PrefixStore(f"aullm/{next(_RUNS)}", base)

    def take(self) -> int:
        """Return 0, 1, ... to whoever asks, each number once."""
        return int(self._store.add("taken", 1)) - 1

    def set(self) -> None:
        """Set the run's flag: its teams are to stop."""
        self._store.set("stop", "1")

    def is_set(self) -> bool:
        """Whether the flag was set."""
        return bool(self._store.check(["stop"]))

    def fail(self, error: UserError | CheckpointError) -> None:
        """Set the run's flag, and say why."""
        rank = dist.get_rank()
        text = str(error) if rank == 0 else f"process {rank}: {error}"
        self._store.set("error", json.dumps([type(error) is CheckpointError, text]))
        self.set()

    def failure(self) -> UserError | CheckpointError | None:
        """Return why a team has failed, None if none has."""
        if not self._store.check(["error"]):
            return None
        of_checkpoint, text = json.loads(self._store.get("error"))
        return CheckpointError(text) if of_checkpoint else UserError(text)

    def meet(self, processes: int, while_waiting: Callable[[], None]) -> None:
        """Return when so many processes have come here; without an end, as one may train for hours yet."""
        self._store.add("here", 1)
        while self._store.add("here", 0) < processes:
            while_waiting()
            time.sleep(_POLL_SECONDS)
