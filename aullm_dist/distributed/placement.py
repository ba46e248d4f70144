"""Shares the LLM among the processes of a run while it loads (`llm.pieces.placement`), for each engine."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from aullm_dist.config.sharding import HPZ
from aullm_dist.distributed.context import together
from aullm_dist.llm.pieces.placement import Placement

T = TypeVar("T")

# Marks a parameter of which every process has read its own piece.
_OWN_PIECE = "aullm_own_piece"


def placement_of(accelerator: Accelerator, deepspeed: Mapping[str, Any] | None) -> Placement | None:
    """Return the placement of a run, None for a single process, which loads for itself alone.

    Args:
        accelerator: from `context.start`.
        deepspeed: the resolved DeepSpeed configuration, None for DDP.
    """
    if deepspeed is not None and deepspeed["zero_optimization"]["stage"] == 3:
        return Divided(accelerator, deepspeed)
    return Whole(accelerator) if accelerator.num_processes > 1 else None


class Whole:
    """Every process ends with the whole parameter, put together on its device from the pieces that all have read."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.device = accelerator.device
        self._accelerator = accelerator

    def together(self, work: Callable[[], T]) -> T:
        """Run `work` on every process; if any fails for a reason that the user can fix, all raise the first error."""
        return together(self._accelerator, work)

    def largest(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum of `values` over all processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def complete(self, flat: Tensor, size: int) -> None:
        """Fill flat values `[world_size * size]` of which each process has its piece of `size`, on every process."""
        if self.world_size > 1:
            as_bytes = flat.view(torch.uint8)
            width = size * flat.element_size()
            own = as_bytes[self.rank * width : (self.rank + 1) * width].clone()
            # Into one tensor: a list of them would be gathered into a second copy of the whole first.
            # Recent versions of torch warn of the function's earlier name.
            gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
            gather(as_bytes, own)

    def settle(self, parameter: nn.Parameter) -> None:
        """Complete the parameter from the pieces of all."""
        storage = parameter.detach()
        padded = torch.empty(0, dtype=storage.dtype, device=storage.device)
        padded.set_(storage.untyped_storage())
        self.complete(padded, len(padded) // self.world_size)


class Divided(Whole):
    """ZeRO-3: every process keeps its own piece, which is the very one that it read."""

    def __init__(self, accelerator: Accelerator, deepspeed: Mapping[str, Any]) -> None:
        super().__init__(accelerator)
        # An empty module: it has nothing to divide, but DeepSpeed's memory-saving linear function comes with one.
        self._init = _own_pieces_class()(module=nn.Module(), config_dict_or_path=dict(deepspeed))
        self._second_copy = deepspeed["zero_optimization"].get(HPZ, 1) > 1

    def settle(self, parameter: nn.Parameter) -> None:
        """Partition the parameter; the space of the other pieces is freed."""
        if self._second_copy:
            # ZeRO++ hpZ divides it a second time, inside each node: a larger piece than the one that was read here.
            super().settle(parameter)
        setattr(parameter, _OWN_PIECE, True)
        self._init._convert_to_zero_parameters([parameter])


@functools.cache
def _own_pieces_class() -> type:
    """Return zero.Init that does not send process 0's values for parameters of which each process has its own piece."""
    from deepspeed.runtime.zero import Init

    class OwnPieces(Init):
        def _zero_init_param(self, param: Any) -> None:
            if not getattr(param, _OWN_PIECE, False):
                super()._zero_init_param(param)
                return
            self._convert_to_deepspeed_param(param)
            param.partition()

    return OwnPieces
