"""The configurations that ship: `configs.json` holds, per device family and kernel, the tiles for each size.

Nothing is tuned at run time: all processes of a run take the same tiles, and `aullm_kernels.aot` compiles exactly what
can run. A size takes the first row of the table that is large enough.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

_FILE = Path(__file__).with_name("configs.json")
FAMILY = "hopper"
"""The family whose tiles the interpreter takes as well."""


@dataclass(frozen=True, slots=True)
class Tile:
    """One row of the table.

    Attributes:
        size: Largest size that the row is for, by name: rows, channels, bytes of an element, features, degree.
        block: Cells or nodes of a tile.
        warps: Warps of a program.
        stages: Stages of software pipelining.
    """

    size: dict[str, int]
    block: int
    warps: int
    stages: int


@functools.cache
def families() -> dict[str, dict]:
    """Return `configs.json`: family -> compute capability, largest sizes, rows per kernel."""
    return json.loads(_FILE.read_text(encoding="utf-8"))


@functools.cache
def tiles(kernel: str, family: str = FAMILY) -> tuple[Tile, ...]:
    """Return the rows of a kernel, smallest sizes first."""
    found = []
    for row in families()[family]["kernels"][kernel]:
        size = {name: value for name, value in row.items() if name not in ("block", "warps", "stages")}
        found.append(Tile(size, row["block"], row["warps"], row["stages"]))
    return tuple(found)


def tile(kernel: str, family: str = FAMILY, **size: int) -> Tile:
    """Return the first row of `kernel` that is large enough; `oversize` has told before whether there is one."""
    return next(t for t in tiles(kernel, family) if all(value <= t.size[name] for name, value in size.items()))


def oversize(op: str, family: str = FAMILY, **size: int) -> str | None:
    """Say which size of `op` is above what its configurations allow, or None."""
    for name, value in size.items():
        limit = families()[family]["limits"][op][name]
        if value > limit:
            return f"{name} is {value}, the configurations for {family} allow up to {limit}"
    return None


def family_of(capability: tuple[int, int]) -> str | None:
    """Return the device family of a CUDA compute capability, or None if no table was made for it."""
    names = [name for name, family in families().items() if tuple(family["capability"]) == capability]
    return names[0] if names else None
