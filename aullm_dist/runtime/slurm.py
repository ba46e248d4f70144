"""Reads SLURM's environment variables of this process, and refuses those that cannot be true."""

from collections.abc import Mapping
from dataclasses import dataclass

from aullm_dist.errors import UserError

# Steps that are shells and not programs started by srun have numbers from here on (slurm.h: SLURM_BATCH_SCRIPT, ...).
_FIRST_SHELL_STEP = 0xFFFFFFF0


@dataclass(frozen=True, slots=True)
class Job:
    """The SLURM job of this process.

    Attributes:
        job_id: the job's number; of an array, the array's number and the task's, as `17_3`.
        restart_count: how often SLURM has started it again, 0 in its first life.
    """

    job_id: str
    restart_count: int


def job_of(environment: Mapping[str, str]) -> Job | None:
    """Return the job that a process belongs to, None outside of SLURM.

    Raises:
        UserError: SLURM_RESTART_COUNT is no number.
    """
    job_id = environment.get("SLURM_JOB_ID")
    if not job_id:
        return None
    if "SLURM_ARRAY_JOB_ID" in environment:
        job_id = f"{environment['SLURM_ARRAY_JOB_ID']}_{environment.get('SLURM_ARRAY_TASK_ID', '?')}"
    return Job(job_id, _number(environment, "SLURM_RESTART_COUNT", "0"))


def node_of(environment: Mapping[str, str]) -> str | None:
    """Return SLURM's name of this machine, None outside of a job."""
    return environment.get("SLURMD_NODENAME") or None


def in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process, as opposed to a job script or a shell inside an allocation."""
    step = environment.get("SLURM_STEP_ID", "")
    return bool(environment.get("SLURM_JOB_ID")) and step.isdigit() and int(step) < _FIRST_SHELL_STEP


def refuse_step(environment: Mapping[str, str]) -> None:
    """Refuse a process started by srun whose number the launcher has got otherwise than from SLURM.

    One task per node is expected, and in it a launcher that starts the node's processes. What is compared is what
    torch's launcher sets (`GROUP_RANK`, `LOCAL_WORLD_SIZE`, `WORLD_SIZE`) with what srun sets in each task.

    Raises:
        UserError: a variable is missing, is no number, or contradicts another.
    """
    if not in_step(environment):
        return
    nodes, tasks = _number(environment, "SLURM_NNODES"), _number(environment, "SLURM_NTASKS")
    node = _number(environment, "SLURM_NODEID")
    if node >= nodes:
        raise UserError(f"SLURM_NODEID is {node} with SLURM_NNODES {nodes}; allowed: 0 to {nodes - 1}")
    if "WORLD_SIZE" not in environment:
        if tasks > 1:
            raise UserError(
                f"srun started {tasks} tasks, but this process knows of no other (WORLD_SIZE is not set); start the "
                "run with launchers/slurm.sh, or with srun torchrun, one task per node"
            )
        return
    if tasks != nodes:
        raise UserError(
            f"srun started {tasks} tasks on {nodes} nodes (SLURM_NTASKS, SLURM_NNODES); allowed: one task per node "
            "(--ntasks-per-node=1), which starts the processes of its node"
        )
    if "GROUP_RANK" not in environment:
        return
    group, here = _number(environment, "GROUP_RANK"), _number(environment, "LOCAL_WORLD_SIZE")
    if group != node:
        raise UserError(
            f"the launcher was given node rank {group} on node {node} (SLURM_NODEID); let the task itself expand "
            "$SLURM_NODEID, as launchers/slurm.sh does: in the job script it is 0"
        )
    started = _number(environment, "WORLD_SIZE")
    if started != nodes * here:
        raise UserError(
            f"the launcher was given {started} processes, but {nodes} nodes with {here} each make {nodes * here}; "
            "every node must start the same number"
        )


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    given = environment.get(name, default)
    if given is None:
        raise UserError(f"{name} is not set in a step of SLURM job {environment.get('SLURM_JOB_ID')}; start with srun")
    if not given.isdigit():
        raise UserError(f"{name} is {given!r}; allowed: a number, 0 or more")
    return int(given)
