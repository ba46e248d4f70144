"""Start-up of one training process: the Accelerator, what it must agree with, and work that only one process does."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, gather_object

from aullm_dist.config import TrainingConfig
from aullm_dist.errors import CheckpointError, UserError
from aullm_dist.log import get_logger

T = TypeVar("T")
logger = get_logger(__name__)


def start(training: TrainingConfig) -> Accelerator:
    """Create the Accelerator and check that it is what was asked for.

    Raises:
        UserError: the number of processes is not what the launcher or `training.processes` asked for, or the global
            batch cannot be split over them.
    """
    _refuse_lost_processes()
    use_cpu = not torch.cuda.is_available()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    per_pass = training.micro_batch * world_size
    if training.global_batch % per_pass:
        raise UserError(
            f"training.global_batch is {training.global_batch}; allowed: a multiple of micro_batch x processes = "
            f"{training.micro_batch} x {world_size}"
        )
    accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision="bf16" if training.precision == "bf16" else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=training.global_batch // per_pass, sync_with_dataloader=False
        ),
    )
    asked = training.processes or world_size
    if accelerator.num_processes != asked:
        raise UserError(
            f"training.processes is {asked}, but the launcher started {accelerator.num_processes}; start the run with "
            f"torchrun --nproc_per_node {asked} or accelerate launch --multi_gpu --num_processes {asked}"
        )
    if training.deterministic:
        # cuBLAS needs its workspace fixed before the first matrix product; an operation that has no deterministic form
        # warns instead of stopping the run.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    if use_cpu:
        torch.set_num_threads(training.cpu_threads or _threads_per_process())
    logger.info(
        "Device: %s, %d process%s, %s, %s",
        accelerator.device,
        accelerator.num_processes,
        "" if accelerator.num_processes == 1 else "es",
        training.precision,
        f"{torch.get_num_threads()} threads each" if use_cpu else torch.cuda.get_device_name(accelerator.device),
    )
    return accelerator


def _refuse_lost_processes() -> None:
    """Refuse what `accelerate launch --cpu --num_processes 2` does: one process, told only by a rendezvous address."""
    started_by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    if started_by_accelerate and "WORLD_SIZE" not in os.environ and "MASTER_PORT" in os.environ:
        raise UserError(
            "accelerate launch was asked for several processes but started one, as it does on CPU machines; start the "
            "run with accelerate launch --multi_gpu --num_processes N (on CPU machines too), or unset MASTER_PORT if "
            "one process is meant"
        )


def _threads_per_process() -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) // local)


def together(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` on every process; if any fails for a reason that the user can mend, all raise the first error.

    Without this the other processes would wait in a collective for one that has already given up. A file that cannot be
    read or written counts as such a reason: a full disk, a removed folder, a missing permission.
    """
    result, error = None, None
    try:
        result = work()
    except (UserError, CheckpointError) as problem:
        error = problem
    except OSError as problem:
        where, why = problem.filename or "file", problem.strerror or problem
        error = UserError(f"{where}: {why}; give a readable and writable place")
    errors = gather_object([error]) if accelerator.num_processes > 1 else [error]
    for rank, problem in enumerate(errors):
        if problem is not None:
            raise problem if rank == 0 else type(problem)(f"process {rank}: {problem}")
    return result  # type: ignore[return-value]


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Run `work` on the main process and give its result to all; its errors are everybody's, as in `together`."""
    result = together(accelerator, work if accelerator.is_main_process else lambda: None)
    if accelerator.num_processes > 1:
        (result,) = broadcast_object_list([result])
    return result  # type: ignore[return-value]
