"""Which implementation of an op runs, and why.

The choice is the argument, else the environment variable `AULLM_KERNELS`, else `auto`. `auto` takes the fastest
implementation that can run and falls back to plain PyTorch; an explicit choice that cannot run raises, so that nobody
measures or debugs another implementation than the one asked for.
"""

import logging
import os

import torch

ENVIRONMENT = "AULLM_KERNELS"
CHOICES = ("auto", "triton", "torch", "interpret")
BUILT = ("torch",)
"""The implementations that this version holds; a Triton twin adds `triton` and `interpret`."""

_logger = logging.getLogger("aullm_kernels")
_logged: set[tuple[str, str]] = set()


def resolve(op: str, requested: str, device: torch.device | str) -> tuple[str, str]:
    """Choose the implementation of `op` for tensors on `device`; the first choice for each op is logged.

    Args:
        op: Name of the op, for messages.
        requested: `auto`, `triton`, `torch` or `interpret`; `auto` lets the environment variable decide.
        device: Device of the op's tensors.

    Returns:
        The implementation and the reason for it.

    Raises:
        ValueError: The choice is unknown, or names an implementation that is not built into this version.
    """
    origin = "implementation"
    if requested == "auto" and os.environ.get(ENVIRONMENT):
        origin, requested = ENVIRONMENT, os.environ[ENVIRONMENT]
    if requested not in CHOICES:
        raise ValueError(f"{op}: {origin} is {requested!r}, allowed are {', '.join(CHOICES)}")
    if requested == "auto":
        chosen, reason = (
            "torch",
            f"no Triton implementation is built into this version (device {torch.device(device).type})",
        )
    elif requested in BUILT:
        chosen, reason = requested, f"asked for by {origin}"
    else:
        raise ValueError(
            f"{op}: {origin} is {requested!r}, but no Triton implementation is built into this version; "
            f"allowed are auto, {', '.join(BUILT)}"
        )
    if not torch.compiler.is_compiling() and (op, chosen) not in _logged:
        _logged.add((op, chosen))
        _logger.info("%s: implementation=%s reason=%s", op, chosen, reason)
    return chosen, reason
