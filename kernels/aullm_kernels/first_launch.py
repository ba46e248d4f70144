"""Starts Triton on a device once, before a run depends on it.

Its first launch compiles a driver stub with the system's C compiler and Python's headers, runs an assembler, writes a
cache and loads what came out through the GPU's driver. Any of these can be missing on a machine where PyTorch runs.
"""

import functools
import os
import subprocess

import torch

# What Triton, its compilers, the loader of libraries and the operating system raise; Triton asserts what it needs. Its
# own errors come as RuntimeError (`smallest_kernel`).
_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    subprocess.SubprocessError,
)
_LONGEST = 200
"""Characters of a reason: compilers are called with long commands."""


@functools.cache
def start_obstacle(device: str) -> str | None:
    """Say what keeps Triton from compiling and loading a kernel for a CUDA device, or return None.

    Nothing is launched and no tensor is made, so it may be asked while torch's compiler traces.
    """
    try:
        _start(device)
    # Whatever it is, PyTorch can run, and the reason is logged.
    except _FAILURES as error:
        return f"triton cannot start here ({_reason(error)})"
    return None


def _start(device: str) -> None:
    from aullm_kernels.smallest_kernel import compile_smallest

    with torch.cuda.device(torch.device(device)):
        compile_smallest()


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        program = error.cmd if isinstance(error.cmd, str) else os.path.basename(str(error.cmd[0]))
        return f"{program} ended with {error.returncode}; it compiles with Python's headers, as of python3-dev"[
            :_LONGEST
        ]
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line}"[:_LONGEST] if line else type(error).__name__
