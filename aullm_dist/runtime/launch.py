"""Reads a launcher's environment variables of this process, and refuses those that cannot be true.

The libraries read the same variables and take what an earlier shell, a container template or MPI has left in them: a
run then ends in one of their exceptions, or waits for processes that nobody has started.
"""

import os
from collections.abc import Mapping, MutableMapping

from aullm_dist.errors import UserError

VARIABLES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_OF_MPI = (
    *_SIZES, "PMI_RANK", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALRANKID",
    "MPI_LOCALNRANKS",
)  # fmt: skip
"""What Accelerate reads where it does not find the variables of torch's launcher, and some of it before those."""
_TRUTHS = ("1", "0", "true", "false", "yes", "no", "on", "off", "t", "f", "y", "n")
_FLAGS = ("ACCELERATE_DEBUG_MODE", "FORK_LAUNCHED")
"""What Accelerate reads as yes or no, in addition to `ACCELERATE_USE_...`."""
_NOT_OFFERED = ("ACCELERATE_TORCH_DEVICE", "ACCELERATE_FP8_BACKEND")
"""What would have Accelerate compute elsewhere or otherwise than the run file says."""
_MOST_PROCESSES = 10**6
_START = "start the run with accelerate launch --multi_gpu --num_processes N, or with torchrun"


def check_launch(environment: MutableMapping[str, str] | None = None) -> int:
    """Check what the launcher has said, take MPI's variables out of the libraries' sight, and return the world size.

    Args:
        environment: of the process; None takes `os.environ`.

    Raises:
        UserError: a variable is empty, no number, out of range or contradicts another; or MPI started the processes.
    """
    environment = os.environ if environment is None else environment
    _refuse_accelerate(environment)
    _refuse_mpi(environment)
    for name in _OF_MPI:
        environment.pop(name, None)
    if "WORLD_SIZE" not in environment:
        for name, most in (("RANK", 0), ("LOCAL_RANK", 0), ("GROUP_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
            _number(environment, name, default=0, most=most)
        return 1
    world = _number(environment, "WORLD_SIZE", least=1, most=_MOST_PROCESSES)
    rank = _number(environment, "RANK", default=0 if world == 1 else None, most=world - 1)
    here = _number(environment, "LOCAL_WORLD_SIZE", default=world, least=1, most=world)
    _number(environment, "LOCAL_RANK", default=rank % here, most=here - 1)
    if "GROUP_RANK" in environment:
        _number(environment, "GROUP_RANK", most=world - 1)
    if world > 1:
        _number(environment, "MASTER_PORT", least=1, most=65535)
        if not environment.get("MASTER_ADDR", "").strip():
            said = "empty" if "MASTER_ADDR" in environment else "not set"
            raise UserError(f"MASTER_ADDR is {said}, but WORLD_SIZE is {world}; {_remedy(environment)}")
    return world


def others_of(environment: Mapping[str, str]) -> str:
    """Return in words which processes a process of a run meets, where, and what to do if they do not come."""
    world, rank = environment.get("WORLD_SIZE", "1"), environment.get("RANK", "0")
    others = "process" if world == "2" else f"{int(world) - 1} processes"
    where = f"{environment.get('MASTER_ADDR', '?')}:{environment.get('MASTER_PORT', '?')}"
    return (
        f"process {rank} of {world} waits at {where} for the other {others} of the run; "
        "look whether all were started and reach that address. If only this one was started, the shell "
        f"keeps an earlier run's variables: {_unset(environment)}"
    )


def _refuse_accelerate(environment: Mapping[str, str]) -> None:
    for name in _NOT_OFFERED:
        if name in environment:
            raise UserError(f"{name} is {environment[name]!r}, which is not offered; unset {name}")
    for name, given in environment.items():
        if (name in _FLAGS or name.startswith("ACCELERATE_USE_")) and given.lower() not in _TRUTHS:
            raise UserError(f"{name} is {given!r}; allowed: true or false; unset {name} if no launcher has set it")


def _refuse_mpi(environment: Mapping[str, str]) -> None:
    if "WORLD_SIZE" in environment:
        return  # torch's launcher has started the processes, whatever was around it
    for name in _SIZES:
        given = environment.get(name, "1").strip() or "1"
        if not (given.isascii() and given.isdigit()) or int(given) > 1:
            raise UserError(
                f"{name} is {environment[name]!r}: MPI started this process, or an earlier shell left it; {_START}, or "
                f"for one process unset {' '.join(name for name in _OF_MPI if name in environment)}"
            )


def _number(environment: Mapping[str, str], name: str, *, default: int | None = None, least: int = 0, most: int) -> int:
    given = environment.get(name)
    if given is None:
        if default is not None:
            return default
        raise UserError(f"{name} is not set, but WORLD_SIZE is {environment['WORLD_SIZE']}; {_remedy(environment)}")
    # Longer ones are no number of processes, and Python refuses to read the longest.
    value = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else -1
    if not least <= value <= most:
        said = f"is {given!r}" if given else "is set, and empty"
        allowed = f"{least}" if least == most else f"{least} to {most}"
        alone = "" if "WORLD_SIZE" in environment else " where WORLD_SIZE is not set"
        raise UserError(f"{name} {said}; allowed{alone}: {allowed}; {_remedy(environment)}")
    return value


def _remedy(environment: Mapping[str, str]) -> str:
    return f"{_START}; for one process {_unset(environment)}"


def _unset(environment: Mapping[str, str]) -> str:
    return f"unset {' '.join(name for name in VARIABLES if name in environment)}"
