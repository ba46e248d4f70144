"""Starts one training process: the Accelerator, what it must agree with, and work that only one process does."""

import ctypes
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from aullm_dist.config import (
    Strategy,
    TrainingConfig,
    check_groups,
    load_strategy,
    offloaded_to,
    refuse_launcher,
    refuse_other_sharding,
)
from aullm_dist.config.sharding import HPZ
from aullm_dist.distributed.engine import deepspeed_plugin, hide_from_transformers, is_zero
from aullm_dist.distributed.shared_base import prepare_deepspeed, shares_base
from aullm_dist.distributed.team import TIMEOUT, Processes, first_rank, gather_objects, send_from_main
from aullm_dist.errors import CheckpointError, UserError, system_error
from aullm_dist.log import get_logger
from aullm_dist.quiet import name_deepspeed_accelerator
from aullm_dist.runtime.gpu import compute_float32_exactly
from aullm_dist.runtime.launch import check_launch, others_of
from aullm_dist.runtime.slurm import refuse_step
from aullm_dist.runtime.waiting import announced
from aullm_dist.versions import library_versions

T = TypeVar("T")
logger = get_logger(__name__)

_M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h."""
_PRECISIONS = {
    "fp32": "float32 throughout (training.precision: fp32)",
    "bf16": "forward pass in bfloat16; what is trained, and its optimizer state, in float32 (training.precision: bf16)",
}


def start(training: TrainingConfig) -> Accelerator:
    """Create the Accelerator with the engine that `training.strategy` names, and check that it is what was asked for.

    Raises:
        UserError: the launcher contradicts the run file or SLURM, the number of processes is not what was asked for,
            the global batch cannot be split over them, or they have different versions of the libraries.
    """
    strategy = load_strategy(training.strategy)
    processes = _processes(training)
    refuse_launcher(strategy, training, os.environ)
    use_cpu = not torch.cuda.is_available()
    shares = shares_base(training, processes)
    sharded = strategy.deepspeed is not None and not shares
    refuse_other_sharding(strategy, training)
    _refuse_devices(use_cpu)
    name_deepspeed_accelerator()
    try:
        with announced(lambda: others_of(os.environ), speaks=processes > 1):
            accelerator = _accelerator(strategy, training, processes, use_cpu=use_cpu, sharded=sharded)
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the processes did not meet ({reason}); {others_of(os.environ)}") from error
    assert is_zero(accelerator) == sharded, f"{strategy.name} became {accelerator.distributed_type}"
    if sharded:
        hide_from_transformers()
    if shares:
        prepare_deepspeed(strategy, accelerator.device)
    if accelerator.num_processes != processes:
        raise UserError(
            f"the launcher started {processes} processes, but {accelerator.num_processes} found each other; "
            "check its rendezvous address and port"
        )
    _refuse_other_versions(accelerator)
    compute_float32_exactly()
    if training.deterministic:
        # cuBLAS needs its workspace fixed before the first matrix product; an operation that has no deterministic form
        # warns instead of stopping the run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # torch sets this attribute on the module object itself, where no checker finds it.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010
    if use_cpu:
        torch.set_num_threads(training.cpu_threads or _threads_per_process())
        if strategy.stage == 3:
            _give_back_freed_memory()
    logger.info("Device: %s", _describe_device(accelerator))
    logger.info("Engine: %s", _describe_engine(strategy, accelerator.num_processes, shares))
    logger.info("Precision: %s", _PRECISIONS[training.precision])
    return accelerator


def _accelerator(
    strategy: Strategy, training: TrainingConfig, processes: int, *, use_cpu: bool, sharded: bool
) -> Accelerator:
    return Accelerator(
        # With cpu=True Accelerate forgets the plugin silently and runs DDP; without it and without a backend, every
        # process of a CPU machine would train alone.
        cpu=use_cpu and not sharded,
        kwargs_handlers=[
            InitProcessGroupKwargs(**({"backend": "gloo"} if use_cpu and sharded else {}), timeout=TIMEOUT)
        ],
        # Mixed precision is part of the model, the same in every engine.
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            # Set again where teams of the processes train folds of their own.
            num_steps=max(1, training.accumulation(processes)),
            sync_with_dataloader=False,
        ),
        deepspeed_plugin=deepspeed_plugin(strategy, training, processes) if sharded else None,
    )


def stop(accelerator: Accelerator) -> None:
    """End the process group once every process is there: one that leaves early takes down one that still talks."""
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _processes(training: TrainingConfig) -> int:
    """Return the number of processes that the launcher started, after checking that it is the one that is wanted."""
    refuse_step(os.environ)
    _refuse_lost_processes()
    started = check_launch()
    if training.processes is not None and started != training.processes:
        raise UserError(
            f"training.processes is {training.processes}, but the launcher started {started}; start the run with "
            f"accelerate launch --multi_gpu --num_processes {training.processes}"
        )
    check_groups(training, started)
    return started


def _refuse_other_versions(accelerator: Accelerator) -> None:
    """Refuse processes of other versions: they may send what the others do not expect, or compute another function."""
    if accelerator.num_processes == 1:
        return
    main, *others = gather_objects(accelerator, [library_versions()])
    for rank, versions in enumerate(others, start=1):
        for name in sorted(main.keys() | versions.keys()):
            mine, theirs = main.get(name, "not installed"), versions.get(name, "not installed")
            if mine != theirs:
                error = UserError(
                    f"process {rank} has {name} {theirs}, process 0 has {mine}; allowed: the same versions everywhere"
                )
                error.told_to_all = True
                raise error


def _give_back_freed_memory() -> None:
    """Have glibc return every freed block of 128 KiB and more to the system at once.

    By itself it raises that threshold to the largest block that was freed, 32 MiB at most. Gathered layers are smaller;
    the heap would keep them, and a process would end up with most of the LLM that ZeRO-3 has partitioned.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 128 * 1024)


def _describe_device(accelerator: Accelerator) -> str:
    device, count = accelerator.device, accelerator.num_processes
    if device.type == "cuda":
        what = f"{torch.cuda.get_device_name(device)}, NCCL" if count > 1 else torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        what = f"no GPU found, {threads} thread{'' if threads == 1 else 's'} each" + (", gloo" if count > 1 else "")
    return f"{device} ({what}); rank {accelerator.process_index} of {count}"


def _describe_engine(strategy: Strategy, processes: int, shares_base: bool) -> str:
    if shares_base:
        what = (
            f"DeepSpeed ZeRO-3 for the frozen LLM, partitioned over {processes} processes; what is trained is whole in "
            "each process of its fold"
        )
    elif strategy.deepspeed is None:
        what = "DDP: every process holds the whole model" if processes > 1 else "one process, nothing is distributed"
    else:
        held = {
            1: "the optimizer state is",
            2: "gradients and optimizer state are",
            3: "parameters, gradients and optimizer state are",
        }[strategy.stage]
        what = f"DeepSpeed ZeRO-{strategy.stage}: {held} partitioned over {processes} process{'es' * (processes > 1)}"
        zero = strategy.deepspeed["zero_optimization"]
        names = {"optimizer": "optimizer state", "param": "parameters"}
        offloaded = [name for key, name in names.items() if offloaded_to(zero, key) != "none"]
        if offloaded:
            what += f", {' and '.join(offloaded)} in CPU memory"
        if zero.get(HPZ, 1) != 1:
            what += ", parameters a second time within each machine"
    where = f" from {strategy.file}" if strategy.file is not None else ""
    return f"{what} (training.strategy: {strategy.name}{where})"


def _refuse_lost_processes() -> None:
    """Refuse what `accelerate launch --cpu --num_processes 2` does: one process, given only a rendezvous address."""
    started_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if started_by_accelerate and "WORLD_SIZE" not in os.environ and "MASTER_PORT" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes but started one, as it does on CPU machines; start the "
            "run with accelerate launch --multi_gpu --num_processes N (on CPU machines too), or unset MASTER_PORT if "
            "one process is meant"
        )


def _refuse_devices(use_cpu: bool) -> None:
    """Refuse what makes the libraries disagree about the device."""
    if not use_cpu and os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1"):
        raise UserError(
            "the launcher was given --cpu on a machine with GPUs; drop the flag, or hide the GPUs with "
            "CUDA_VISIBLE_DEVICES="
        )
    wanted = "cpu" if use_cpu else "cuda"
    if os.environ.get("DS_ACCELERATOR", wanted) != wanted:
        raise UserError(
            f"the environment has DS_ACCELERATOR={os.environ['DS_ACCELERATOR']}, but this machine is used by its "
            f"{wanted.upper()}; unset it"
        )
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not use_cpu and processes > torch.cuda.device_count():
        raise UserError(
            f"the launcher started {processes} processes on a machine with {torch.cuda.device_count()} GPUs; allowed: "
            "one process for each GPU"
        )


def _threads_per_process() -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local)


def together(processes: Processes, work: Callable[[], T]) -> T:
    """Run `work` on every process; if any fails for a reason that the user can fix, all raise the first error.

    Without this the other processes would wait in a collective for one that has already stopped. A file that cannot be
    read or written counts as such a reason: a full disk, a removed folder, a missing permission.
    """
    result, error = None, None
    try:
        result = work()
    except (UserError, CheckpointError) as problem:
        error = problem
    except OSError as problem:
        error = system_error(problem)
    with _waiting_for_others(processes):
        errors = gather_objects(processes, [error])
    for number, found in enumerate(errors):
        if found is not None:
            told = found if number == 0 else type(found)(f"process {first_rank(processes) + number}: {found}")
            told.told_to_all = True
            raise told
    return result  # type: ignore[return-value]  # None only with an error, which was raised


def _waiting_for_others(processes: Processes) -> AbstractContextManager[None]:
    """Say it when a collective takes long; the first process of a machine speaks for it."""
    if processes.num_processes == 1:
        return nullcontext()
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    text = (
        f"process {processes.process_index} of {processes.num_processes} has done its part and waits for the "
        f"others (met at {where}), which may still read or write files; if it stays so, look at what they print and "
        "at their disks"
    )
    return announced(lambda: text, speaks=os.environ.get("LOCAL_RANK", "0") == "0")


def on_main(processes: Processes, work: Callable[[], T]) -> T:
    """Run `work` on the main process and give its result to all; its errors are everybody's, as in `together`."""
    result = together(processes, work if processes.is_main_process else lambda: None)
    with _waiting_for_others(processes):
        return send_from_main(processes, result)  # type: ignore[return-value]  # None was replaced
