"""Says how the processes of a run share what they load: each fills its piece of every weight."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")


class Placement(Protocol):
    """How the processes of a run share what they load."""

    rank: int
    world_size: int
    device: torch.device

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every process and return its result; if it raises a UserError on any, raise it on all."""

    def largest(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum of `values` over all processes, in place."""

    def complete(self, flat: Tensor, size: int) -> None:
        """Fill flat values `[world_size * size]` of which each process has its piece of `size`, on every process."""

    def settle(self, parameter: nn.Parameter) -> None:
        """Take over a parameter of which each process has filled its piece (see `piece_of`)."""


class Alone:
    """The placement of one process for itself."""

    rank, world_size = 0, 1

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def together(self, work: Callable[[], T]) -> T:
        """Run `work`."""
        return work()

    def largest(self, values: Tensor) -> Tensor:
        """Return `values`, which nobody else has."""
        return values

    def complete(self, flat: Tensor, size: int) -> None:
        """Leave what is complete."""

    def settle(self, parameter: nn.Parameter) -> None:
        """Leave what is complete."""


def piece_of(numel: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return first and last (not included) of `numel` elements that are a process's; equal sizes but for the end."""
    size = -(-numel // world_size)
    return min(rank * size, numel), min((rank + 1) * size, numel)
