"""Executes a kernel's PTX on the CPU, all threads of a program at once, one program after the other.

What a GPU does and this does not: run warps in another order than statement by statement (what depends on their order
is refused, see `memory`; what depends on the order of threads in one warp is not seen), add up a matrix product in its
own order, and run what the assembler makes of the PTX. A copy to shared memory that the kernel does not wait for
arrives as late as may be.
"""

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from ptx import arithmetic, warps
from ptx.memory import GlobalMemory, SharedMemory
from ptx.program import Address, Program, Register, Statement, UnknownPtxError

_BITS_OF_SIZE = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass(frozen=True, slots=True)
class _Copy:
    """A copy from global to shared memory that has not arrived."""

    addresses: np.ndarray
    values: np.ndarray
    warps: np.ndarray


class Machine:
    """Runs one program of a launch.

    Args:
        program: the kernel.
        threads: of a program.
        shared: bytes of shared memory.
        memory: the tensors.
        parameters: values of the kernel's parameters, in order.
        place: number of this program in each of three dimensions.
        grid: programs in each of them.
    """

    def __init__(
        self,
        program: Program,
        threads: int,
        shared: int,
        memory: GlobalMemory,
        parameters: list[int | float],
        place: tuple[int, int, int],
        grid: tuple[int, int, int],
    ) -> None:
        self._program, self._threads, self._global = program, threads, memory
        self._shared = SharedMemory(shared)
        self._warps = np.arange(threads) // 32
        self._parameters = dict(zip(program.parameters, parameters, strict=True))
        self._registers: dict[str, np.ndarray] = {}
        self._names: dict[str, Any] = {"%tid.x": np.arange(threads, dtype=np.uint32), "global_smem": 0}
        for axis, here, size in zip("xyz", place, grid, strict=True):
            self._names |= {f"%ctaid.{axis}": here, f"%nctaid.{axis}": size}
        self._issued: list[_Copy] = []
        self._groups: list[list[_Copy]] = []

    def run(self) -> None:
        """Execute until the kernel returns.

        Raises:
            MemoryFaultError: see `memory`.
            UnknownPtxError: an instruction or a way to branch is not known here.
        """
        statements, at = self._program.statements, 0
        with np.errstate(all="ignore"):
            while at < len(statements):
                statement = statements[at]
                at += 1
                mask = self._mask(statement)
                if statement.opcode in ("bra", "bra.uni"):
                    if mask is not None and mask.any() != mask.all():
                        raise UnknownPtxError(f"{statement.text}: threads of one program part")
                    if mask is None or mask.all():
                        at = self._program.labels[statement.operands[0]]
                elif statement.opcode == "ret":
                    if mask is not None and not mask.all():
                        raise UnknownPtxError(f"{statement.text}: some threads end")
                    break
                else:
                    _handler(statement.opcode)(self, statement, mask)

    def _mask(self, statement: Statement) -> np.ndarray | None:
        if statement.guard is None:
            return None
        name, negated = statement.guard
        return ~self._registers[name] if negated else self._registers[name]

    def value(self, operand: Any, dtype: Any) -> np.ndarray:
        """Return an operand as numbers of a type."""
        if isinstance(operand, Register):
            held = self._held(operand)
            return held if held.dtype == dtype else held.view(dtype)
        if isinstance(operand, str):
            if operand not in self._names:
                raise UnknownPtxError(operand)
            operand = self._names[operand]
        if isinstance(operand, np.ndarray):
            return operand.view(dtype)
        if isinstance(operand, float):
            return np.float32(operand).view(dtype)
        if np.dtype(dtype).kind in "fb":
            return np.dtype(dtype).type(operand)
        bits = 8 * np.dtype(dtype).itemsize
        return np.array(operand % 2**bits, _BITS_OF_SIZE[bits // 8]).view(dtype)[()]

    def _held(self, register: Register) -> np.ndarray:
        """Return what a register holds: bits of a NaN where it was never written, as half of a pair may be."""
        found = self._registers.get(register.name)
        return np.full(self._threads, ~register.dtype(0)) if found is None else found

    def assign(self, register: Any, values: Any, mask: np.ndarray | None) -> None:
        """Write a register where `mask` is true."""
        if register == "_":
            return
        values = np.ascontiguousarray(values)
        if values.dtype != register.dtype:
            values = values.view(register.dtype)
        if values.shape != (self._threads,):
            values = np.broadcast_to(values, (self._threads,)).copy()
        if mask is not None:
            values = np.where(mask, values, self._held(register))
        self._registers[register.name] = values

    def compute(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Execute what looks at one thread alone."""
        function, types, result = arithmetic.find(statement.opcode)
        target, *operands = statement.operands
        # A wider register than the type that is read holds the number in its lower bits.
        found = function(*(self._narrow(o, t) for o, t in zip(operands, types, strict=False)))
        found = np.asarray(found).astype(result, copy=False)
        if found.dtype.kind in "iu" and found.dtype.itemsize < target.dtype().itemsize:
            found = found.astype(np.dtype(f"{found.dtype.kind}{target.dtype().itemsize}"))
        self.assign(target, found, mask)

    def _narrow(self, operand: Any, dtype: Any) -> np.ndarray:
        if isinstance(operand, Register) and operand.dtype().itemsize > np.dtype(dtype).itemsize and dtype != np.bool_:
            bits = self._held(operand)
            if bits.dtype == np.uint64 and dtype == np.float32:
                return bits.view(dtype)  # two of them in one register
            return bits.astype(_BITS_OF_SIZE[np.dtype(dtype).itemsize]).view(dtype)
        return self.value(operand, dtype)

    def move(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Copy a register, put registers together, or take one apart."""
        target, source = statement.operands
        if isinstance(source, list):
            parts = [self.value(part, part.dtype) for part in source]
            self.assign(target, np.stack(parts, axis=1).reshape(-1), mask)
        elif isinstance(target, list):
            dtype = next(part.dtype for part in target if part != "_")
            parts = self.value(source, source.dtype).view(dtype).reshape(self._threads, -1)
            for index, part in enumerate(target):
                self.assign(part, parts[:, index], mask)
        else:
            self.assign(target, self.value(source, target.dtype), mask)

    def addresses(self, address: Address, dtype: Any) -> np.ndarray:
        """Return the address of each thread."""
        base = self.value(address.base, dtype)
        return np.broadcast_to(base, (self._threads,)).astype(np.int64) + address.offset

    def load_parameter(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Read a parameter of the kernel."""
        target, address = statement.operands
        given = self._parameters[address.base]
        bits = np.float32(given).view(np.uint32) if isinstance(given, float) else given
        self.assign(target, self.value(int(bits), target.dtype), mask)

    def load(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Read from global or shared memory; threads without the guard keep what they had."""
        _, space, *vector, kind = statement.opcode.split(".")
        targets, address = statement.operands
        targets = targets if isinstance(targets, list) else [targets]
        dtype = arithmetic.TYPES[kind]
        size = np.dtype(dtype).itemsize * len(targets)
        active = np.ones(self._threads, bool) if mask is None else mask
        found = np.full((self._threads, size), 0xFF, np.uint8)
        if active.any():
            places = self.addresses(address, np.uint32 if space == "shared" else np.uint64)[active]
            shared = space == "shared"
            found[active] = (
                self._shared.load(places, size, self._warps[active]) if shared else self._global.load(places, size)
            )
        assert len(vector) == (len(targets) > 1), statement.text
        values = found.view(dtype)
        for index, target in enumerate(targets):
            # Numbers of 8 bits lie in registers of 16.
            part = np.ascontiguousarray(values[:, index])
            wide = part if part.dtype.itemsize == target.dtype().itemsize else part.astype(target.dtype)
            self.assign(target, wide, mask)

    def store(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Write to global or shared memory."""
        _, space, *_, kind = statement.opcode.split(".")
        address, sources = statement.operands
        sources = sources if isinstance(sources, list) else [sources]
        dtype = _BITS_OF_SIZE[np.dtype(arithmetic.TYPES[kind]).itemsize]
        parts = [np.broadcast_to(self._narrow(source, dtype), (self._threads,)) for source in sources]
        values = np.ascontiguousarray(np.stack(parts, axis=1)).view(np.uint8)
        active = np.ones(self._threads, bool) if mask is None else mask
        if not active.any():
            return
        places = self.addresses(address, np.uint32 if space == "shared" else np.uint64)[active]
        if space == "shared":
            self._shared.store(places, values[active], self._warps[active])
        else:
            self._global.store(places, values[active])

    def copy(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Begin a copy to shared memory; beyond the bytes that are read it writes zeros."""
        target, source, size, *given = statement.operands
        active = np.ones(self._threads, bool) if mask is None else mask
        if not active.any():
            return
        there, here = self.addresses(target, np.uint32)[active], self.addresses(source, np.uint64)[active]
        read = self.value(given[0], np.uint32) if given else np.uint32(size)
        read = np.broadcast_to(read, (self._threads,))[active]
        assert np.isin(read, (0, size)).all(), "all of it or nothing is read"
        values = np.zeros((len(here), size), np.uint8)
        values[read > 0] = self._global.load(here[read > 0], size)
        self._shared.claim(there, values, self._warps[active])
        self._issued.append(_Copy(there, values, self._warps[active]))

    def commit(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Make a group of the copies that were begun."""
        self._groups.append(self._issued)
        self._issued = []

    def wait(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Let all copies arrive but those of the last groups."""
        keep = statement.operands[0]
        while len(self._groups) > keep:
            for copy in self._groups.pop(0):
                self._shared.store(copy.addresses, copy.values, copy.warps)

    def nothing(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Do nothing."""

    def barrier(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Let every warp arrive."""
        if statement.operands != [0]:
            raise UnknownPtxError(f"{statement.text}: a barrier of a part of the warps")
        self._shared.barrier()

    def shuffle(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Exchange values within a warp, of which all threads take part."""
        target, source, other, clamp, members = statement.operands
        assert mask is None, statement.text
        assert (clamp, members) == (31, -1), statement.text
        how = warps.shuffle_butterfly if ".bfly." in statement.opcode else warps.shuffle_index
        self.assign(target, how(self.value(source, np.uint32), self.value(other, np.uint32)), mask)

    def reduce(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Give every thread of a warp the largest of what they hold."""
        target, source, members = statement.operands
        assert mask is None, statement.text
        assert (self.value(members, np.uint32) == 0xFFFFFFFF).all(), statement.text
        self.assign(target, warps.largest(self.value(source, np.float32)), mask)

    def load_matrices(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Read 8 x 8 matrices from shared memory into fragments."""
        targets, address = statement.operands
        rows = warps.row_addresses(self.addresses(address, np.uint32), len(targets))
        owners = np.repeat(np.arange(self._threads // 32), 8)
        for target, places in zip(targets, rows, strict=True):
            found = self._shared.load(places, 16, owners)
            self.assign(target, warps.spread_rows(found, ".trans." in statement.opcode), mask)

    def store_matrices(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Write fragments as 8 x 8 matrices to shared memory."""
        address, sources = statement.operands
        rows = warps.row_addresses(self.addresses(address, np.uint32), len(sources))
        owners = np.repeat(np.arange(self._threads // 32), 8)
        for source, places in zip(sources, rows, strict=True):
            values = warps.gather_rows(self.value(source, np.uint32), ".trans." in statement.opcode)
            self._shared.store(places, values, owners)

    def multiply(self, statement: Statement, mask: np.ndarray | None) -> None:
        """Multiply matrices of 16 rows and 8 columns."""
        targets, *parts = statement.operands
        kind = re.search(r"row\.col\.f32\.(\w+)\.\1\.f32", statement.opcode)
        if kind is None:
            raise UnknownPtxError(statement.text)
        a, b, c = ([np.broadcast_to(self.value(r, np.uint32), (self._threads,)) for r in part] for part in parts)
        for target, values in zip(targets, warps.multiply(kind[1], a, b, c), strict=True):
            self.assign(target, values, mask)


_HANDLERS: tuple[tuple[str, Callable], ...] = (
    ("ld.param.", Machine.load_parameter),
    ("ld.global.", Machine.load),
    ("ld.shared.", Machine.load),
    ("st.global.", Machine.store),
    ("st.shared.", Machine.store),
    ("cp.async.commit_group", Machine.commit),
    ("cp.async.wait_group", Machine.wait),
    ("cp.async.c", Machine.copy),
    ("bar.sync", Machine.barrier),
    # Threads of a warp run side by side here.
    ("bar.warp.sync", Machine.nothing),
    ("nop", Machine.nothing),
    ("shfl.sync.bfly.b32", Machine.shuffle),
    ("shfl.sync.idx.b32", Machine.shuffle),
    ("redux.sync.max.f32", Machine.reduce),
    ("ldmatrix.sync.aligned.m8n8.", Machine.load_matrices),
    ("stmatrix.sync.aligned.m8n8.", Machine.store_matrices),
    ("mma.sync.aligned.m16n8k", Machine.multiply),
    ("mov.", Machine.move),
)


@functools.cache
def _handler(opcode: str) -> Callable:
    return next((handler for start, handler in _HANDLERS if opcode.startswith(start)), Machine.compute)
