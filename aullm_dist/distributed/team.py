"""Groups the processes that train one fold together: all of a run, or one of the equal teams that it is split into.

A team shows a fold what it needs of Accelerate, with the numbers of the team in the place of those of the run. What
speaks to others speaks to the team: `gather_objects`, `sum_over`, `send_from_main`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import Tensor, nn

from aullm_dist.config import TrainingConfig

T = TypeVar("T")

TIMEOUT = timedelta(hours=1)
"""For one process that prepares data, hashes a large checkpoint or saves; NCCL's own ten minutes are short."""


class Team:
    """One of `count` equal parts of a run's processes, neighbours in rank.

    Args:
        accelerator: the run's Accelerator.
        count: teams of the run.
        process_group: of the team; None where the team is the run, or one process.
        accumulation: micro-batches of each process in a step.

    Attributes:
        index: number of this process's team.
        num_processes: processes of a team.
        process_index: this process's number in its team.
    """

    def __init__(
        self, accelerator: Accelerator, count: int = 1, process_group: Any = None, accumulation: int = 1
    ) -> None:
        self.accelerator, self.count, self.process_group = accelerator, count, process_group
        self.accumulation = accumulation
        self.num_processes = accelerator.num_processes // count
        self.index, self.process_index = divmod(accelerator.process_index, self.num_processes)

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes and speaks for its team."""
        return self.process_index == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def distributed_type(self) -> DistributedType:
        """Of the run."""
        return self.accelerator.distributed_type

    @property
    def sync_gradients(self) -> bool:
        """Whether the micro-batch at work is the last of its step."""
        return self.accelerator.sync_gradients

    def accumulate(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the region of a micro-batch, as Accelerate's."""
        return self.accelerator.accumulate(model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a micro-batch, as Accelerate does."""
        self.accelerator.backward(loss)

    def clip_grad_norm_(self, parameters: Sequence[nn.Parameter], max_norm: float) -> Any:
        """Return the norm that a ZeRO engine has clipped by."""
        return self.accelerator.clip_grad_norm_(parameters, max_norm)

    def unwrap_model(self, model: nn.Module) -> nn.Module:
        """Return the model without its engine's wrapper."""
        return self.accelerator.unwrap_model(model)


Processes: TypeAlias = Accelerator | Team
"""Those of a run, or of one of its teams."""


def divide(accelerator: Accelerator, count: int, training: TrainingConfig) -> Team:
    """Divide the processes of a run into `count` equal teams and return this one's; every process calls it."""
    size = accelerator.num_processes // count
    accumulation = training.accumulation(size)
    if count == 1 or size == 1:
        return Team(accelerator, count, accumulation=accumulation)
    # Every process takes part in making every group.
    groups = [
        dist.new_group(list(range(first, first + size)), timeout=TIMEOUT) for first in range(0, size * count, size)
    ]
    return Team(accelerator, count, groups[accelerator.process_index // size], accumulation)


def is_alone(processes: Processes) -> bool:
    """Whether no other team trains at the same time as these processes."""
    return not isinstance(processes, Team) or processes.count == 1


def group_of(processes: Processes) -> Any:
    """Return the process group that the processes speak in, None for that of the run."""
    return processes.process_group if isinstance(processes, Team) else None


def gather_objects(processes: Processes, objects: Sequence[T]) -> list[T]:
    """Return the objects of all, in the order of their ranks."""
    if processes.num_processes == 1:
        return list(objects)
    group = group_of(processes)
    if group is None:
        return list(gather_object(list(objects)))
    gathered: list[Any] = [None] * processes.num_processes
    dist.all_gather_object(gathered, list(objects), group=group)
    return [item for part in gathered for item in part]


def send_from_main(processes: Processes, item: T) -> T:
    """Return the object of the main process."""
    if processes.num_processes == 1:
        return item
    items = [item]
    dist.broadcast_object_list(items, src=first_rank(processes), group=group_of(processes))
    return items[0]


def sum_over(processes: Processes, values: Tensor) -> Tensor:
    """Return the sum of everybody's `values`, which are overwritten."""
    if processes.num_processes > 1:
        dist.all_reduce(values, group=group_of(processes))
    return values


def copy_from_main(processes: Processes, values: Tensor) -> None:
    """Overwrite `values` with those of the main process."""
    if processes.num_processes > 1:
        dist.broadcast(values, src=first_rank(processes), group=group_of(processes))


def first_rank(processes: Processes) -> int:
    """Return the rank in the run of the main process."""
    return processes.index * processes.num_processes if isinstance(processes, Team) else 0
