"""Prepares the distributed engine of a run: DDP, or DeepSpeed ZeRO through Accelerate.

Whatever the engine, the trainables are float32 and the frozen LLM keeps the dtype it was loaded in. Mixed precision is
part of the model (`mixed_precision` in `model.aullm`), and DeepSpeed's own casting of parameters stays off: it would
round what is trained to bfloat16, and does so or not depending on who partitioned the parameters first. With float32
trainables DeepSpeed also skips a step whose gradient is not finite in every stage, as the plain loop does.
"""

import logging
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType
from torch import Tensor, nn

from aullm_dist.config import Strategy, TrainingConfig, load_strategy
from aullm_dist.distributed.team import Processes, Team, copy_from_main
from aullm_dist.errors import UserError
from aullm_dist.llm.layers import decoder_layers
from aullm_dist.runtime.preemption import Preempted


def deepspeed_plugin(strategy: Strategy, training: TrainingConfig, processes: int) -> DeepSpeedPlugin:
    """Return Accelerate's plugin for a ZeRO strategy, with every "auto" of its JSON filled in.

    Raises:
        UserError: DeepSpeed is not installed, or refuses the JSON.
    """
    config = resolved(training, processes)
    assert config is not None, "a ZeRO strategy has a configuration"
    import_deepspeed(strategy)
    check_zero_section(strategy, config["zero_optimization"])
    _stand_alone()
    return DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)


def resolved(training: TrainingConfig, processes: int) -> dict[str, Any] | None:
    """Return the DeepSpeed configuration of a run as started here, every "auto" filled in; None for DDP.

    Raises:
        UserError: the processes cannot be split as the strategy says.
    """
    # None where the launcher does not say how many of them are on this machine.
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or None
    return load_strategy(training.strategy).resolved(training, processes, processes_here)


def hide_from_transformers() -> None:
    """Keep transformers from dividing an LLM by itself while it loads.

    Under ZeRO-3 it would, whatever Accelerate's zero3_init_flag says, but an unquantised LLM only.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def import_deepspeed(strategy: Strategy) -> None:
    """Import DeepSpeed as this trainer wants it.

    Raises:
        UserError: it is not installed.
    """
    # Its messages below a warning name files and timers; what the user must know is in our own log.
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            f"training.strategy is {strategy.name}, but DeepSpeed cannot be imported ({error}); install deepspeed or "
            "use training.strategy=ddp"
        ) from error
    from deepspeed.utils import logger as deepspeed_logger

    deepspeed_logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch has begun to replace; users can do nothing about it.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    # On CPU DeepSpeed compiles a shared-memory operation at its first start: half a minute and a C++ compiler for
    # something that inference alone uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_zero_section(strategy: Strategy, section: dict[str, Any]) -> None:
    """Have DeepSpeed check the section of a JSON.

    Raises:
        UserError: it refuses a value.
    """
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**section)
    except ValueError as error:
        # A headline, then a line with the key and one with the reason for each of its errors.
        key, reason = (str(error).splitlines() + ["", ""])[1:3]
        raise UserError(
            f"{strategy.file}: zero_optimization.{key} is refused by DeepSpeed ({reason.split(' [')[0].strip()})"
        ) from error


def _stand_alone() -> None:
    """Tell DeepSpeed of a process group of one when no launcher has made one."""
    if "WORLD_SIZE" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in alone.items()})


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Hand model and optimizer to the engine, once in a run.

    Returns:
        The model as the engine wraps it, and the optimizer: ZeRO's behind Accelerate's wrapper, or the given one.
    """
    if not is_zero(accelerator):
        # The optimizer stays plain: Accelerate's wrapper would only add a scaler that float32 does not need.
        return accelerator.prepare(model), optimizer
    gather_by_layer(model)
    before = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    wrapped, wrapped_optimizer = accelerator.prepare(model, optimizer)
    changed = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype != before[name]]
    assert not changed, f"DeepSpeed changed the dtype of {len(changed)} trainables, first {changed[0]}"
    return wrapped, wrapped_optimizer


def prepare_for_team(team: Team, model: nn.Module, *, divided: bool) -> nn.Module:
    """Return the model as it trains in a team of several: gradients are averaged over the team alone.

    Args:
        team: of this process.
        model: the same on every process.
        divided: whether its frozen LLM is in pieces, which process 0's values must not be sent in the place of.
    """
    team.accelerator.gradient_accumulation_steps = team.accumulation
    if team.num_processes == 1:
        return model
    devices = [team.device] if team.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(
        model, device_ids=devices, process_group=team.process_group, init_sync=not divided
    )


def serve(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Hand a model that only answers to the engine: ZeRO-3 divides it, elsewhere every process holds it whole."""
    model.requires_grad_(False)
    if not is_zero(accelerator) or accelerator.deepspeed_plugin.zero_stage != 3:
        return model
    gather_by_layer(model)
    return accelerator.prepare(model)


def gather_by_layer(model: nn.Module) -> None:
    """Have ZeRO-3 gather each decoder layer as one: once for its forward and once for its backward pass.

    By itself it gathers module by module, and once more for a layer that is recomputed in the backward pass: what
    it has gathered for that is released before the layer's own gradients are computed.
    """
    from deepspeed.utils import set_z3_leaf_module

    for _, layer in decoder_layers(model):
        set_z3_leaf_module(layer, True)


def repartition(model: nn.Module) -> None:
    """Re-partition parameters that ZeRO-3 prefetched for a backward pass that never runs, as after an evaluation.

    DeepSpeed expects every forward pass to be followed by a backward pass and prefetches for it. A parameter that is
    still on its way can be neither gathered nor partitioned by hand, as a save does. Every process calls it.
    """
    engine: Any = model
    if hasattr(engine, "zero_optimization_stage") and engine.zero_optimization_stage() == 3:
        engine.empty_partition_cache()


def release(accelerator: Accelerator, model: nn.Module) -> None:
    """Release what `prepare` made: a second run in this process must not find the first one's LLM in memory."""
    engine: Any = model
    if hasattr(engine, "destroy"):
        engine.destroy()
    accelerator.free_memory()


def clip_gradients(processes: Processes, parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor | float:
    """Scale the gradients of the global batch down to `max_norm` and return their norm before that.

    The norm is a float64 scalar on the gradients' device: nothing here waits for it. ZeRO has clipped inside
    the backward pass and looked at the norm there; for it this returns that number, infinity for a skipped step.
    """
    if is_zero(processes):
        return float(processes.clip_grad_norm_(parameters, max_norm))
    gradients = [p.grad for p in parameters if p.grad is not None]
    # In float64, as DeepSpeed has it: on CPU torch's float32 norm of half a million values is off by 5e-5.
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float64) for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms))
    torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm.to(gradients[0].dtype))
    return norm


def is_zero(processes: Processes) -> bool:
    """Whether the run's engine is DeepSpeed's."""
    return processes.distributed_type == DistributedType.DEEPSPEED


def _share_statistics(processes: Processes, model: nn.Module) -> None:
    """Give every process the running statistics of the first one, so that a clip's answer depends on no rank.

    Those of BatchNorm layers alone; each process has moved its own since the last step's beginning.
    """
    if processes.num_processes == 1:
        return
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            for statistic in (module.running_mean, module.running_var):
                assert statistic is not None
                copy_from_main(processes, statistic)


@contextmanager
def serving(processes: Processes, model: nn.Module) -> Iterator[nn.Module]:
    """Give the plain model in evaluation mode, and leave the engine with nothing on its way, also when `Preempted`."""
    plain = processes.unwrap_model(model)
    _share_statistics(processes, plain)
    was_training = plain.training
    plain.eval()
    try:
        yield plain
    except Preempted:
        repartition(model)  # what follows is a save
        raise
    repartition(model)
    plain.train(was_training)
