"""Describes what a run is planned for: GPUs, their memory and links, and what is assumed of them."""

import re
from dataclasses import dataclass

from aullm_dist.errors import UserError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


H100_FLOPS = 989e12
"""Floating-point operations per second of an H100 in bf16 without sparsity, as its datasheet has them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The machines. What no datasheet of a given cluster says is an assumption, and the plan repeats it.

    Attributes:
        gpus: processes of the run, one per GPU.
        nodes: machines.
        gpu_memory: bytes of one GPU; None leaves the question open.
        reserve: bytes of it that the CUDA context, NCCL and the allocator's rounding are left.
        host_memory: bytes of RAM of one machine; None leaves the question open.
        interconnect: bytes per second that a machine receives from the others.
        link: bytes per second that a GPU receives from the others of its machine.
        gpu_flops: floating-point operations per second of one GPU, or of one process on a CPU, in the run's precision;
            None, as nothing is known of a CPU's, leaves times and rates out of the plan.
        efficiency: share of `gpu_flops` that a step reaches.
        cpu: the processes compute on CPUs and talk through gloo; then memory counts when it is written to.
    """

    gpus: int = 1
    nodes: int = 1
    gpu_memory: int | None = None
    reserve: int = 2 * 2**30
    host_memory: int | None = None
    interconnect: float = 50e9
    link: float = 300e9
    gpu_flops: float | None = H100_FLOPS
    efficiency: float = 0.4
    cpu: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.gpus < 1 or self.nodes < 1 or self.gpus % self.nodes:
            what = "processes" if self.cpu else "GPUs"
            raise UserError(
                f"{self.gpus} {what} on {self.nodes} machines; allowed: a multiple of the machines, the same on each"
            )
        for name in ("interconnect", "link", "gpu_flops"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                option = name.replace("_", "-")
                raise UserError(f"--{option} is {getattr(self, name)}; allowed: a finite number above 0")
        if not 0 < self.efficiency <= 1:
            raise UserError(f"--efficiency is {self.efficiency}; allowed: a share above 0, at most 1")

    @property
    def per_node(self) -> int:
        """GPUs of a machine."""
        return self.gpus // self.nodes


def parse_size(text: str, what: str) -> int:
    """Return bytes of `80GiB`, `24GB` or a plain number.

    Raises:
        UserError: not a size above 0.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS or float(match[1]) <= 0:
        raise UserError(f"{what} is {text!r}; allowed: a size above 0 such as 80GiB or 24GB")
    return round(float(match[1]) * _UNITS[match[2].upper()])
