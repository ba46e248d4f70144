"""What the instructions of PTX compute that look at one thread alone: bits in, bits out, for all threads at once."""

import functools
import operator
import re
from collections.abc import Callable

import numpy as np
from ptx.program import UnknownPtxError

TYPES = {
    "u8": np.uint8, "u16": np.uint16, "u32": np.uint32, "u64": np.uint64, "b8": np.uint8, "b16": np.uint16,
    "b32": np.uint32, "b64": np.uint64, "s8": np.int8, "s16": np.int16, "s32": np.int32, "s64": np.int64,
    "f16": np.float16, "f32": np.float32, "f32x2": np.float32, "pred": np.bool_,
}  # fmt: skip
WIDE = {"s32": np.int64, "u32": np.uint64, "s16": np.int32, "u16": np.uint32}
_COMPARISONS: dict[str, Callable] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Return float32 values of the bits of bfloat16."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the bits of bfloat16, rounded to the nearest and to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _shift_left(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * x.dtype.itemsize
    return np.where(by < bits, x << np.minimum(by, bits - 1).astype(x.dtype), x.dtype.type(0))


def _shift_right(x: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * x.dtype.itemsize
    far = x.dtype.type(0) if x.dtype.kind == "u" else x >> x.dtype.type(bits - 1)
    return np.where(by < bits, x >> np.minimum(by, bits - 1).astype(x.dtype), far)


def _bit_field(x: np.ndarray, first: np.ndarray, length: np.ndarray) -> np.ndarray:
    bits = 8 * x.dtype.itemsize
    first, length = int(np.max(first)), int(np.max(length))
    assert 0 < length <= bits - first, "fields are given as numbers and lie within"
    left = bits - first - length
    return (x << x.dtype.type(left)) >> x.dtype.type(bits - length)


def _permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Put a number together of four bytes of two; each half byte of the selector names one."""
    both = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    found = np.uint32(0)
    for place in range(4):
        chosen = (selector >> np.uint32(4 * place)) & np.uint32(15)
        assert (chosen < 8).all(), "bytes are taken as they are, none is filled with its sign"
        byte = (both >> (chosen.astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        found = found | (byte.astype(np.uint32) << np.uint32(8 * place))
    return found


def _largest(*values: np.ndarray) -> np.ndarray:
    """Of two, and on Blackwell of three; a NaN is passed over."""
    return functools.reduce(lambda a, b: np.fmax(a, b), values)


def _smallest(*values: np.ndarray) -> np.ndarray:
    return functools.reduce(lambda a, b: np.fmin(a, b), values)


def _fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Round once: a product of two float32 is exact in float64, and their sum as good as."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


_PLAIN: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "mul.lo": operator.mul, "and": operator.and_,
    "or": operator.or_, "xor": operator.xor, "not": operator.invert, "neg": operator.neg, "abs": np.abs,
    "shl": _shift_left, "shr": _shift_right, "bfe": _bit_field, "max": _largest, "min": _smallest,
    "prmt": _permute, "mad.lo": lambda a, b, c: a * b + c, "fma.rn": _fused, "div.full": operator.truediv,
    "div.rn": operator.truediv,
    "ex2.approx": np.exp2, "ex2.approx.ftz": np.exp2, "rcp.approx": np.reciprocal, "mov": lambda a: a,
    "add.rn": operator.add, "sub.rn": operator.sub, "mul.rn": operator.mul,
}  # fmt: skip


_MIXED: dict[str, Callable] = {"add.rn.f32": operator.add, "sub.rn.f32": operator.sub}
_HALVES: dict[str, Callable] = {"bf16": bf16_to_f32, "f16": lambda bits: bits.view(np.float16).astype(np.float32)}


def _compare(name: str, kind: str) -> Callable:
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if kind.startswith("f") and name in ("ltu", "leu", "gtu", "geu", "equ", "neu"):
        ordered = _COMPARISONS[name[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    compared = _COMPARISONS.get(name)
    if compared is None:
        raise UnknownPtxError(f"setp.{name}")
    if kind.startswith("f") and name == "ne":
        # `ne` is false where a number is none, unlike numpy's.
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return compared


@functools.cache
def find(opcode: str) -> tuple[Callable, list, type]:
    """Return what an instruction computes, the types of its operands and that of its result."""
    name, _, kind = opcode.rpartition(".")
    if name.startswith("setp."):
        return _compare(name[5:], kind), [TYPES[kind]] * 2, np.bool_
    if name == "selp":
        return lambda a, b, p: np.where(p, a, b), [TYPES[kind]] * 2 + [np.bool_], TYPES[kind]
    if name in ("mul.wide", "mad.wide"):
        wide = WIDE[kind]
        add = (lambda a, b, c: a.astype(wide) * b.astype(wide) + c) if name == "mad.wide" else None
        return add or (lambda a, b: a.astype(wide) * b.astype(wide)), [TYPES[kind]] * 2 + [wide], wide
    if name in ("shl", "shr", "bfe"):
        return _PLAIN[name], [TYPES[kind], np.uint32, np.uint32], TYPES[kind]
    if name.startswith("cvt"):
        return _conversion(opcode)
    if name in _MIXED and kind in _HALVES:
        # The first operand is of the lower precision.
        return lambda a, b: _MIXED[name](_HALVES[kind](a), b), [np.uint16, np.float32], np.float32
    if name not in _PLAIN or kind not in TYPES:
        raise UnknownPtxError(opcode)
    return _PLAIN[name], [TYPES[kind]] * 3, TYPES[kind]


def _pair(to_bits: Callable) -> Callable:
    """The first operand goes into the upper half."""
    return lambda a, b: (to_bits(a).astype(np.uint32) << 16) | to_bits(b).astype(np.uint32)


def _half_bits(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float16).view(np.uint16)


def _to_tf32(bits: np.ndarray) -> np.ndarray:
    """To the nearest, and away from zero where two are as near."""
    return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


_FLOATS: dict[str, tuple[Callable, list, type]] = {
    "cvt.rn.bf16x2.f32": (_pair(f32_to_bf16), [np.float32] * 2, np.uint32),
    "cvt.rn.f16x2.f32": (_pair(_half_bits), [np.float32] * 2, np.uint32),
    "cvt.rn.bf16.f32": (f32_to_bf16, [np.float32], np.uint16),
    "cvt.rn.f16.f32": (_half_bits, [np.float32], np.uint16),
    "cvt.f32.bf16": (bf16_to_f32, [np.uint16], np.float32),
    "cvt.f32.f16": (lambda a: a.astype(np.float32), [np.float16], np.float32),
    "cvt.rna.tf32.f32": (_to_tf32, [np.uint32], np.uint32),
}


def _conversion(opcode: str) -> tuple[Callable, list, type]:
    if opcode in _FLOATS:
        return _FLOATS[opcode]
    found = re.fullmatch(r"cvt(?:\.rn|\.rzi|\.sat)?\.(\w+)\.(\w+)", opcode)
    if found is None or not {found[1], found[2]} <= TYPES.keys() or ".sat" in opcode:
        raise UnknownPtxError(opcode)
    target = TYPES[found[1]]
    return lambda a: a.astype(target), [TYPES[found[2]]], target
