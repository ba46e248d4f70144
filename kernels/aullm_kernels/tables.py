"""Reads the configurations that ship: `configs.json` holds, per device family and kernel, the tiles for each size.

Nothing is tuned at run time: all processes of a run take the same tiles, and `aullm_kernels.aot` compiles exactly what
can run. A size takes the first row of the table that is large enough.
"""

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

_FILE = Path(__file__).with_name("configs.json")
FAMILY = "hopper"
"""The family whose tiles the interpreter takes as well."""
TARGET = "9.0"
"""The compute capability that its tiles were chosen for."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One row of the table.

    Attributes:
        size: Largest size that the row is for, by name: rows, channels and bits of a product's operands; features,
            degree and relations.
        block: Cells or nodes of a tile.
        warps: Warps of a program.
        stages: Stages of software pipelining.
        registers: Most registers of a thread; None leaves that to the assembler, which spills a few for more programs
            at a time where it sees fit.
    """

    size: dict[str, int]
    block: int
    warps: int
    stages: int
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Return the options of the compiler."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, "num_stages": self.stages, **limit}


@functools.cache
def families() -> dict[str, dict]:
    """Return `configs.json`: family -> its targets, programs that sum parameters' gradients, rows per kernel.

    A target is a compute capability that the rows were compiled for, with the bytes of shared memory that a program may
    have there and the bytes of registers that it may spill: the rows were chosen for the family's own capability.
    """
    return json.loads(_FILE.read_text(encoding="utf-8"))


@functools.cache
def tiles(kernel: str, family: str = FAMILY) -> tuple[Tile, ...]:
    """Return the rows of a kernel, smallest sizes first."""
    found = []
    for row in families()[family]["kernels"][kernel]:
        shape = {name: row[name] for name in ("block", "warps", "stages", "registers") if name in row}
        found.append(Tile({name: value for name, value in row.items() if name not in shape}, **shape))
    return tuple(found)


def tile(kernel: str, size: Mapping[str, int], family: str = FAMILY) -> Tile:
    """Return the first row of `kernel` that is large enough; `oversize` has checked before whether there is one."""
    return next(row for row in tiles(kernel, family) if _fits(row, size))


def oversize(op: str, size: Mapping[str, int], family: str = FAMILY) -> str | None:
    """Say that a kernel of `op` has no row large enough for these sizes, and which are the largest, or return None."""
    for kernel in families()[family]["kernels"]:
        rows = tiles(kernel, family)
        if kernel.startswith(op) and not any(_fits(row, size) for row in rows):
            largest = [row for row in rows if not any(_fits(other, row.size) for other in rows if other is not row)]
            allowed = " or ".join(_describe(row.size) for row in largest)
            return f"{_describe(size)} is more than the configurations allow: {allowed}"
    return None


def operand_bits(*dtypes: torch.dtype) -> int:
    """Return the bits of a product's operands on a GPU: 16 (bfloat16), 19 (tf32, for float16) or 32 (three tf32)."""
    return {frozenset({torch.bfloat16}): 16, frozenset({torch.float16}): 19}.get(frozenset(dtypes), 32)


def _fits(row: Tile, size: Mapping[str, int]) -> bool:
    return all(value <= row.size[name] for name, value in size.items())


def _describe(size: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in size.items())


def family_of(capability: tuple[int, int]) -> str | None:
    """Return the device family of a CUDA compute capability, or None if no table was compiled for it."""
    target = ".".join(map(str, capability))
    names = [name for name, family in families().items() if target in family["targets"]]
    return names[0] if names else None
