"""Reads the PTX that Triton's compiler writes: one kernel of a file, as statements."""

import re
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BITS = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}
"""What registers hold, by the letters of their names; a number is its bits, whatever its type."""
_STATEMENT = re.compile(r"(?:@(!?)%(p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_PARAMETER = re.compile(r"\.param \.(\w+)[^,\n]*?(\w+_param_\d+)")


class UnknownPtxError(Exception):
    """The kernel says something that this machine does not know."""


@dataclass(frozen=True, slots=True)
class Register:
    """A register by its name without `%`, such as `rd12`."""

    name: str
    dtype: Any


@dataclass(frozen=True, slots=True)
class Address:
    """A place in memory: what a register, a parameter or the start of shared memory holds, and an offset."""

    base: Any
    offset: int


@dataclass(slots=True)
class Statement:
    """One instruction.

    Attributes:
        guard: predicate register without which it does nothing, and whether that is negated; None for always.
        opcode: such as `add.s32`.
        operands: registers, numbers, names of special registers, addresses, and lists of these.
        text: as it was written.
    """

    guard: tuple[str, bool] | None
    opcode: str
    operands: list[Any]
    text: str


@dataclass(slots=True)
class Program:
    """A kernel.

    Attributes:
        parameters: name -> type, in order.
        statements: of its body.
        labels: name -> index of the statement that follows.
    """

    parameters: dict[str, str]
    statements: list[Statement] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def read(ptx: str) -> Program:
    """Return the only kernel of a text."""
    text = re.sub(r"//[^\n]*", "", ptx)
    head, _, body = text[text.index(".entry") :].partition("\n{")
    program = Program({name: kind for kind, name in _PARAMETER.findall(head)})
    for line in body[: body.rindex("}")].splitlines():
        if label := re.fullmatch(r"\s*(\$\w+):\s*", line):
            program.labels[label[1]] = len(program.statements)
            continue
        for part in filter(None, map(str.strip, line.split(";"))):
            if part.startswith(".") or part in ("{", "}"):
                continue
            program.statements.append(_statement(part))
    return program


def _statement(text: str) -> Statement:
    found = _STATEMENT.fullmatch(text)
    if found is None:
        raise UnknownPtxError(text)
    negated, predicate, opcode, operands = found.groups()
    guard = (predicate, bool(negated)) if predicate else None
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands)
    return Statement(guard, opcode, [_operand(part) for part in parts], text)


def _operand(text: str) -> Any:
    text = text.strip()
    if text[0] == "{":
        return [_operand(part) for part in text[1:-1].split(",")]
    if text[0] == "[":
        base, _, offset = text[1:-1].replace(" ", "").partition("+")
        return Address(_operand(base), int(offset, 0) if offset else 0)
    if found := re.fullmatch(r"%(p|rs|rd|r)(\d+)", text):
        return Register(text[1:], BITS[found[1]])
    if text.startswith("0f"):
        return struct.unpack(">f", bytes.fromhex(text[2:]))[0]
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.removesuffix("U"), 0)
    return text
