"""Refuses a run that cannot fit before anything of it is allocated, by the plan of `aullm-dist plan`."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from aullm_dist.config import Config
from aullm_dist.distributed.context import on_main
from aullm_dist.errors import UserError
from aullm_dist.files import user_path
from aullm_dist.llm.files import load_config, load_tokenizer
from aullm_dist.log import get_logger
from aullm_dist.model.prompt import build_prompt

logger = get_logger(__name__)

_MEMINFO = Path("/proc/meminfo")
_CGROUP_OF_SELF = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")


def refuse_what_does_not_fit(accelerator: Accelerator, config: Config, aus: Sequence[int], llm_path: str) -> None:
    """Plan the run on what is free here, log its peak, and refuse it where it does not fit. Every process calls it.

    Nothing is kept in reserve, so what is refused lacks memory even if the libraries took none. The tiny backbone and
    the baseline are not planned, nor are model types whose code the planner cannot run.

    Args:
        accelerator: from `context.start`.
        config: the run's configuration.
        aus: AU numbers.
        llm_path: folder or Hugging Face name of the backbone.

    Raises:
        UserError: by how much it does not fit, and what would.
    """
    if not config.training.check_memory or config.model.llm in ("tiny", "none"):
        return
    gpu, host = _free(accelerator)
    on_main(accelerator, lambda: _plan(accelerator, config, aus, llm_path, gpu, host))


def _free(accelerator: Accelerator) -> tuple[int | None, int | None]:
    """Return free bytes of a GPU and of a machine, the least of all; None where there is no GPU, or nobody knows."""
    gpu = torch.cuda.mem_get_info(accelerator.device)[0] if accelerator.device.type == "cuda" else None
    mine = [(gpu, free_machine_memory())]
    everybody = gather_object(mine) if accelerator.num_processes > 1 else mine
    least = [[free for free in column if free is not None] for column in zip(*everybody, strict=True)]
    gpu, host = (min(column) if column else None for column in least)
    return gpu, host


def _plan(
    accelerator: Accelerator, config: Config, aus: Sequence[int], llm_path: str, gpu: int | None, host: int | None
) -> None:
    # Here, as few runs of few users need what draws tables.
    from aullm_dist.planning.advice import advise
    from aullm_dist.planning.cluster import Cluster
    from aullm_dist.planning.planner import NotPlanned, plan
    from aullm_dist.planning.report import gib, shortfall

    local = user_path(llm_path).is_dir()
    common = {"trust_remote_code": config.model.trust_remote_code, "local_files_only": local}
    llm = load_config(llm_path, common)
    config = config.changed({"data.aus": tuple(aus)})
    tokenizer = load_tokenizer(llm_path, common)
    prompt = build_prompt(tuple(aus), tokenizer, readout=config.model.readout, use_structure=config.model.structure)
    processes = accelerator.num_processes
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or processes
    on_cpu = gpu is None
    cluster = Cluster(
        gpus=processes,
        nodes=max(1, processes // per_node),
        gpu_memory=(host // per_node if host is not None else None) if on_cpu else gpu,
        host_memory=None if on_cpu else host,
        reserve=0,
        cpu=on_cpu,
    )
    make = functools.partial(
        plan, llm=llm, speed=False, prefix_tokens=prompt.prefix_tokens, suffix_tokens=prompt.suffix_tokens
    )
    try:
        planned = make(config, cluster)
    except NotPlanned as reason:
        logger.info("Memory: not planned: %s", reason)
        return
    logger.info(
        "Memory: planned at most %s of each %s, in phase %s",
        gib(planned.gpu_bytes),
        "process" if on_cpu else "GPU",
        planned.gpu_peak.name,
    )
    if planned.fits is False:
        changes = " ".join(map(str, advise(config, cluster, make).changes))
        would = f"the nearest change that fits: {changes}" if changes else "no change that is known would make it fit"
        raise UserError(
            f"the run does not fit: {shortfall(planned)}; {would} (aullm-dist plan tells more; "
            "training.check_memory=false tries anyway)"
        )


def free_machine_memory() -> int | None:
    """Return bytes of memory that this job may still take of its machine; None where the system does not say.

    That is what the kernel can give without swapping, or less where a control group (version 2), such as that of a
    SLURM job or a container, has a limit. Files that are cached do not count as taken.
    """
    if not _MEMINFO.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    own = next((line[3:] for line in _lines(_CGROUP_OF_SELF) if line.startswith("0::")), None)
    if own is None:
        return free
    group = _CGROUPS / own.strip("/")
    for folder in (group, *group.parents):
        limit = next(iter(_lines(folder / "memory.max")), "max")
        if limit != "max":
            stat = dict(line.split() for line in _lines(folder / "memory.stat"))
            taken = sum(int(stat.get(name, 0)) for name in ("anon", "shmem", "kernel"))
            free = min(free, max(0, int(limit) - taken))
        if folder == _CGROUPS:
            break
    return free


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        # Not every kernel has every file, nor may everybody read them.
        return []
