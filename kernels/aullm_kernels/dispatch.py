"""Chooses which implementation of an op runs, and says why.

The choice is the argument, else the environment variable `AULLM_KERNELS`, else `auto`. `auto` takes Triton where it can
run and plain PyTorch everywhere else; an explicit choice that cannot run raises, so that nobody measures or debugs
another implementation than the one asked for.
"""

import importlib.util
import logging
import os
import sys

import torch

from aullm_kernels import tables
from aullm_kernels.first_launch import start_obstacle

ENVIRONMENT = "AULLM_KERNELS"
CHOICES = ("auto", "triton", "torch", "interpret")
_INTERPRETER_SWITCH = "TRITON_INTERPRET"
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

_logger = logging.getLogger("aullm_kernels")
_logged: set[tuple[str, str]] = set()


def resolve(
    op: str,
    requested: str,
    device: torch.device | str,
    *,
    sizes: dict[str, int] | None = None,
    dtypes: tuple[torch.dtype, ...] = (),
) -> tuple[str, str]:
    """Choose the implementation of `op` for tensors on `device`; the first choice for each op is logged.

    Asking for `interpret` before anything has imported triton switches triton's interpreter on for this process.

    Args:
        op: Name of the op.
        requested: `auto`, `triton`, `torch` or `interpret`; `auto` lets the environment variable decide.
        device: Device of the op's tensors.
        sizes: Sizes that the configuration table limits, by name; None checks none.
        dtypes: Types of the op's floating point tensors, those that enter matrix products if it has any.

    Returns:
        The implementation and the reason for it.

    Raises:
        ValueError: The choice is unknown, or it names an implementation that cannot run here or on these tensors.
    """
    origin = "implementation"
    if requested == "auto" and os.environ.get(ENVIRONMENT):
        origin, requested = ENVIRONMENT, os.environ[ENVIRONMENT]
    if requested not in CHOICES:
        raise ValueError(f"{op}: {origin} is {requested!r}, allowed are {', '.join(CHOICES)}")
    chosen, reason = requested, f"asked for by {origin}"
    if requested != "torch":
        wanted = "interpret" if requested == "interpret" else "triton"
        limits = tuple((name, int(size)) for name, size in (sizes or {}).items())
        obstacle = _obstacle(op, wanted, str(device), limits, dtypes)
        if obstacle and requested != "auto":
            raise ValueError(f"{op}: {origin} is {requested!r}, but {obstacle}; auto and torch can run")
        if requested == "auto":
            chosen = "torch" if obstacle else "triton"
            reason = obstacle or f"the fastest that can run on {_device_name(str(device))}"
    if not torch.compiler.is_compiling() and _logger.isEnabledFor(logging.INFO) and (op, chosen) not in _logged:
        _logged.add((op, chosen))
        _logger.info("%s: implementation=%s reason=%s", op, chosen, reason)
    return chosen, reason


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name(device)


def _obstacle(
    op: str, wanted: str, device: str, sizes: tuple[tuple[str, int], ...], dtypes: tuple[torch.dtype, ...]
) -> str | None:
    """Say what keeps `triton` or `interpret` from running `op`, or return None."""
    place = torch.device(device)
    missing = importlib.util.find_spec("triton") is None
    needed = "cuda" if wanted == "triton" else "cpu"
    if place.type != needed:
        return f"the tensors are on {place.type}, {wanted} runs on {needed}"
    if missing:
        return "the package triton is not installed"
    obstacle = _interpreter_obstacle() if wanted == "interpret" else _compiler_obstacle(place)
    if obstacle or not sizes:
        return obstacle
    limited = dict(sizes)
    if op == "evidence_pool" and wanted == "triton":
        limited["bits"] = tables.operand_bits(*dtypes)
    return _dtype_obstacle(wanted, dtypes) or tables.oversize(op, limited)


def _interpreter_obstacle() -> str | None:
    if "triton" not in sys.modules:
        os.environ[_INTERPRETER_SWITCH] = "1"
        return None
    return (
        None if _interprets() else f"triton was imported without {_INTERPRETER_SWITCH}=1: set it before Python starts"
    )


def _compiler_obstacle(device: torch.device) -> str | None:
    if _interprets():
        return f"{_INTERPRETER_SWITCH} is set, so that triton would interpret"
    capability = torch.cuda.get_device_capability(device)
    if tables.family_of(capability) is None:
        known = ", ".join(target for family in tables.families().values() for target in family["targets"])
        return f"its compute capability is {capability[0]}.{capability[1]}, there are configurations for {known}"
    return start_obstacle(str(device))


def _interprets() -> bool:
    """Whether triton interprets in this process, or would if it were imported."""
    if "triton" in sys.modules:
        return bool(sys.modules["triton"].knobs.runtime.interpret)
    return os.environ.get(_INTERPRETER_SWITCH, "0").lower() in ("1", "true", "yes", "on", "y")


def _dtype_obstacle(wanted: str, dtypes: tuple[torch.dtype, ...]) -> str | None:
    allowed = _KERNEL_DTYPES if wanted == "triton" else (*_KERNEL_DTYPES, torch.float64)
    for dtype in dtypes:
        if dtype not in allowed:
            names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
            return f"a tensor is {str(dtype).removeprefix('torch.')}, its types are {names}"
    return None


# What torch.compiler.assume_constant_result does; calling it imports the compiler, and with it triton.
for _function in (_obstacle, _device_name):
    setattr(_function, "_dynamo_marked_constant", True)  # noqa: B010 - the name is the compiler's
