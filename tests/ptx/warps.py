"""What the instructions of PTX compute that look at the 32 threads of a warp together.

Registers come as `[threads]`. Fragments lie as in the PTX manual, "Matrix fragments for mma.m16n8k16" and "m16n8k8".
"""

import numpy as np
from ptx.arithmetic import bf16_to_f32

LANES = np.arange(32)
_GROUP, _IN_GROUP = LANES // 4, LANES % 4


def shuffle_butterfly(values: np.ndarray, lane_mask: np.ndarray) -> np.ndarray:
    """Give each thread what the thread holds whose number differs in the bits of the mask."""
    return values.reshape(-1, 32)[:, LANES ^ int(np.max(lane_mask))].reshape(-1)


def shuffle_index(values: np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """Give each thread what the thread `lanes` of its warp holds."""
    chosen = np.broadcast_to(lanes, values.shape).reshape(-1, 32).astype(np.int64) % 32
    return np.take_along_axis(values.reshape(-1, 32), chosen, axis=1).reshape(-1)


def largest(values: np.ndarray) -> np.ndarray:
    """Give each thread the largest number of its warp; a NaN is passed over."""
    return np.fmax.reduce(values.reshape(-1, 32), axis=1).repeat(32)


def row_addresses(addresses: np.ndarray, matrices: int) -> np.ndarray:
    """Return the addresses of the rows of 8 x 8 matrices that the threads of a warp give, `[matrices, warps * 8]`."""
    given = addresses.reshape(-1, 32)
    return np.stack([given[:, 8 * i : 8 * i + 8].reshape(-1) for i in range(matrices)])


def spread_rows(rows: np.ndarray, transposed: bool) -> np.ndarray:
    """Return what each thread gets of a matrix of 8 x 8 numbers of 16 bits; `rows` are bytes, `[warps * 8, 16]`."""
    matrix = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, 8, 8)
    if transposed:
        matrix = matrix.swapaxes(1, 2)
    return np.ascontiguousarray(matrix).view(np.uint32).reshape(-1)


def gather_rows(values: np.ndarray, transposed: bool) -> np.ndarray:
    """Return the rows of a matrix, as bytes `[warps * 8, 16]`, from what each thread holds of it."""
    matrix = np.ascontiguousarray(values).view(np.uint16).reshape(-1, 8, 8)
    if transposed:
        matrix = matrix.swapaxes(1, 2)
    return np.ascontiguousarray(matrix).view(np.uint8).reshape(-1, 16)


def multiply(kind: str, a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray]) -> list[np.ndarray]:
    """Return the fragments of `A @ B + C` in float32; A and B are `bf16` or `tf32`, 16 rows and 8 columns.

    Products are exact and are added up in float64, then rounded once. A GPU adds in an order of its own and drops bits.
    """
    left, right = (_bf16(a, b) if kind == "bf16" else _tf32(a, b)) if kind in ("bf16", "tf32") else (None, None)
    assert left is not None, kind
    out = left.astype(np.float64) @ right + _accumulator(c)
    parts = out.astype(np.float32)
    upper, lower = parts[:, _GROUP], parts[:, _GROUP + 8]
    pick = lambda rows, column: rows[:, LANES, 2 * _IN_GROUP + column].reshape(-1).view(np.uint32)  # noqa: E731
    return [pick(upper, 0), pick(upper, 1), pick(lower, 0), pick(lower, 1)]


def _accumulator(c: list[np.ndarray]) -> np.ndarray:
    warps = len(c[0]) // 32
    matrix = np.empty((warps, 16, 8))
    for index, values in enumerate(c):
        matrix[:, _GROUP + 8 * (index // 2), 2 * _IN_GROUP + index % 2] = values.view(np.float32).reshape(-1, 32)
    return matrix


def _bf16(a: list[np.ndarray], b: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    warps = len(a[0]) // 32
    left, right = np.empty((warps, 16, 16), np.float32), np.empty((warps, 16, 8), np.float32)
    for index, register in enumerate(a):
        for half, values in enumerate(_halves(register)):
            left[:, _GROUP + 8 * (index % 2), 2 * _IN_GROUP + half + 8 * (index // 2)] = values
    for index, register in enumerate(b):
        for half, values in enumerate(_halves(register)):
            right[:, 2 * _IN_GROUP + half + 8 * index, _GROUP] = values
    return left, right


def _halves(register: np.ndarray) -> list[np.ndarray]:
    pairs = np.ascontiguousarray(register).view(np.uint16).reshape(-1, 32, 2)
    return [bf16_to_f32(pairs[:, :, half]) for half in (0, 1)]


def _tf32(a: list[np.ndarray], b: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A GPU does not look at the 13 lowest bits of an operand."""
    warps = len(a[0]) // 32
    left, right = np.empty((warps, 16, 8), np.float32), np.empty((warps, 8, 8), np.float32)
    for index, register in enumerate(a):
        left[:, _GROUP + 8 * (index % 2), _IN_GROUP + 4 * (index // 2)] = _shortened(register)
    for index, register in enumerate(b):
        right[:, _IN_GROUP + 4 * index, _GROUP] = _shortened(register)
    return left, right


def _shortened(register: np.ndarray) -> np.ndarray:
    return (register & np.uint32(0xFFFFE000)).view(np.float32).reshape(-1, 32)
