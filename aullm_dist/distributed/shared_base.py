"""Holds a frozen LLM in pieces on all processes of a run, while teams of them train folds of their own on it.

DeepSpeed's engine divides what is trained over all processes and adds its gradients up over all of them. Here only its
parameter offload is used, the part of ZeRO-3 that gathers a layer before it computes and releases it afterwards. What
is trained stays plain: whole in each process, and averaged by DistributedDataParallel over the processes of its team.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from aullm_dist.config import Strategy, TrainingConfig, load_strategy
from aullm_dist.distributed.engine import check_zero_section, gather_by_layer, hide_from_transformers, import_deepspeed

_OF_GATHERING = {
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_max_reuse_distance": "max_reuse_distance",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_param_persistence_threshold": "param_persistence_threshold",
    "stage3_model_persistence_threshold": "model_persistence_threshold",
}
"""Keys of a JSON and what the parameter offload calls them."""


def shares_base(training: TrainingConfig, processes: int) -> bool:
    """Whether the run divides its frozen LLM in this way: ZeRO-3 with several folds at once."""
    return training.folds_at_once != 1 and processes > 1 and load_strategy(training.strategy).stage == 3


def prepare_deepspeed(strategy: Strategy, device: torch.device) -> None:
    """Let DeepSpeed speak through the process group that is there.

    Raises:
        UserError: DeepSpeed is not installed, or refuses the JSON.
    """
    import_deepspeed(strategy)
    assert strategy.deepspeed is not None
    check_zero_section(strategy, strategy.deepspeed["zero_optimization"])
    import deepspeed

    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    hide_from_transformers()


def base_section(training: TrainingConfig) -> dict[str, Any]:
    """Return the DeepSpeed configuration of the frozen LLM alone: there are no steps, so there is no batch."""
    deepspeed = load_strategy(training.strategy).deepspeed
    assert deepspeed is not None
    return {"train_micro_batch_size_per_gpu": 1, "zero_optimization": dict(deepspeed["zero_optimization"])}


class SharedBase:
    """Gathers the layers of a partitioned LLM for every pass of it, on all processes at once.

    Args:
        llm: the LLM; what it holds that is not partitioned, such as LoRA, is left alone.
        deepspeed: from `base_section`.
    """

    def __init__(self, llm: nn.Module, deepspeed: Mapping[str, Any]) -> None:
        gather_by_layer(llm)
        _skip_what_is_whole()
        _multiply_plainly_what_is_whole()
        zero = deepspeed["zero_optimization"]
        limits = {ours: zero[key] for key, ours in _OF_GATHERING.items() if key in zero}
        self._offload = _offload_class()(llm, timers=None, ds_config=dict(deepspeed), **limits)

    def begins_with(self, user: nn.Module) -> RemovableHandle:
        """Take every call of a module that uses the LLM for a pass of it, until the handle is removed.

        The LLM's own top is never called, and models that take turns on it have tops of their own.
        """
        return user.register_forward_pre_hook(lambda *_: self._offload.get_param_coordinator().reset_step())

    def pass_ended(self) -> None:
        """Release what a pass has left gathered; every process calls it after a backward pass."""
        self._offload.release_backward_leftovers()

    def partition(self) -> None:
        """Release everything, also what an evaluation has gathered ahead; every process calls it."""
        self._offload.empty_partition_cache()

    def release(self) -> None:
        """Take the hooks off the LLM again."""
        self._offload.destroy()


@functools.cache
def _offload_class() -> type:
    """Return DeepSpeed's parameter offload, for modules of which only some parameters are partitioned."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    class BaseOffload(DeepSpeedZeRoOffload):
        def _convert_to_zero_parameters(self, ds_config: Any, module: Any, mpu: Any) -> None:
            """The LLM was partitioned as it was loaded, and nothing else is to be."""

        def mark_persistent_parameters(self, param_threshold: int, model_threshold: int) -> list[nn.Parameter]:
            persistent, total = [], 0
            for parameter in _divided(self.module.parameters()):
                size = parameter.ds_numel
                if size <= param_threshold and size + total <= model_threshold:
                    parameter.ds_persist = True
                    persistent.append(parameter)
                    total += size
            return persistent

    return BaseOffload


def _divided(parameters: Iterable[Any]) -> Iterator[Any]:
    return (parameter for parameter in parameters if hasattr(parameter, "ds_id"))


def _skip_what_is_whole() -> None:
    """Let DeepSpeed's hooks pass over parameters that it does not manage, in this process; again is no change.

    A decoder layer is gathered as one, with the LoRA inside of it. In DeepSpeed's own engine every parameter is
    partitioned, so its coordinator asks each for what only partitioned ones have.
    """
    from deepspeed.runtime.zero import parameter_offload, partitioned_param_coordinator

    upstream = partitioned_param_coordinator.iter_params
    if getattr(upstream, "_aullm_skips", False):
        return

    @functools.wraps(upstream)
    def iter_params(module: nn.Module, recurse: bool = False) -> Iterator[Any]:
        return _divided(upstream(module, recurse))

    setattr(iter_params, "_aullm_skips", True)  # noqa: B010 - a function has no attributes for a checker
    for place in (partitioned_param_coordinator, parameter_offload):
        setattr(place, "iter_params", iter_params)  # noqa: B010


def _multiply_plainly_what_is_whole() -> None:
    """Leave DeepSpeed's linear function to partitioned weights, in this process; again is no change.

    It forgets a gathered weight between forward and backward pass. For what is whole there is nothing to gain, and it
    rounds twice where torch rounds once: a fold would not be trained as it is alone.
    """
    from deepspeed.runtime.zero.linear import zero3_linear_wrap
    from deepspeed.runtime.zero.partition_parameters import InsertPostInitMethodToModuleSubClasses as Patches

    if nn.functional.linear is not zero3_linear_wrap:
        return
    plain = Patches.linear_bk

    @functools.wraps(plain)
    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return (zero3_linear_wrap if hasattr(weight, "ds_id") else plain)(input, weight, bias)

    setattr(nn.functional, "linear", linear)  # noqa: B010 - as DeepSpeed has put its own there
