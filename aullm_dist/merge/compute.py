"""Computes a merge: from the bytes of a piece of the base to the bytes of the new file.

Threads compute pieces side by side, each in torch operations of one thread, on buffers that are used again and again:
what is allocated per piece would come back to the system late or never.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from aullm_dist.errors import UserError
from aullm_dist.llm.nf4 import BLOCK, Packer, block_maxima
from aullm_dist.llm.quantization import constants_of, make_packer, nf4_config, state_of, stored_state, unpack
from aullm_dist.llm.stored.conversion import Values
from aullm_dist.llm.stored.weight_files import WeightFiles
from aullm_dist.merge.adapter import Adapter, Factors, merge_rows
from aullm_dist.merge.plan import CHUNK, KEPT_GROUPS, Merged, Piece, Sizes, in_place


@dataclass(frozen=True, slots=True)
class Slot:
    """The buffers of one piece."""

    read: Tensor
    """uint8, as read."""
    write: Tensor
    """uint8, as written; empty where every piece is written from `read`."""


@dataclass(frozen=True, slots=True)
class State:
    """What all pieces of a weight share."""

    factors: Factors | None = None
    maxima: Tensor | None = None
    """float32 per block, by which weights are packed."""
    constants: Tensor | None = None
    """float32 per block, by which they are unpacked."""


def make_slots(sizes: Sizes) -> list[Slot]:
    """Return the buffers of a merge."""

    def empty(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    return [Slot(empty(sizes.slot_bytes), empty(sizes.out_bytes)) for _ in range(sizes.slots)]


class Arithmetic:
    """Computes pieces; threads may call it at once.

    Args:
        files: the base's.
        adapter: of the checkpoint.
        compute: dtype that the run computed in: weights are rounded to it before anything is added to them.
    """

    def __init__(self, files: WeightFiles, adapter: Adapter, compute: torch.dtype) -> None:
        self._files, self._adapter, self._compute = files, adapter, compute
        self._quantization = nf4_config(compute)
        self._scratch = threading.local()
        self._groups: dict[Values, tuple[Tensor, Tensor]] = {}
        self._grouping = threading.Lock()

    def prepare(self, tensor: Merged) -> State:
        """Return what the pieces of a weight share: LoRA's factors, and the constants of all its NF4 blocks.

        The blocks' constants are quantised in turn, less their mean over the weight: none is known before all are.

        Raises:
            UserError: packed weights without their state.
        """
        factors = None if tensor.delta is None else self._adapter.read(tensor.delta)
        if tensor.how == "round_trip" and tensor.group is not None:
            maxima, constants = self._of_group(tensor.group)
            blocks = slice(tensor.place // BLOCK, (tensor.place + tensor.numel) // BLOCK)
            return State(factors, maxima[blocks], constants[blocks])
        if tensor.how == "round_trip":
            maxima = torch.empty(tensor.numel // BLOCK)
            buffer = self._buffer("chunk", CHUNK * tensor.source.dtype.itemsize, torch.uint8)
            for first in range(0, tensor.numel, CHUNK):
                count = min(CHUNK, tensor.numel - first)
                part = buffer[: count * tensor.source.dtype.itemsize]
                self._files.read_into(part, tensor.name, tensor.skip + first)
                found = block_maxima(part.view(tensor.source.dtype).to(self._compute))
                maxima[first // BLOCK :][: len(found)] = found
            state = state_of(maxima, torch.Size(tensor.shape), self._compute, self._quantization)
            return State(factors, maxima, constants_of(state))
        if tensor.how == "unpack":
            return State(factors, None, self._stored_constants(tensor))
        return State(factors)

    def _of_group(self, group: Values) -> tuple[Tensor, Tensor]:
        """Return maxima and constants of all NF4 blocks of a parameter that several tensors of the base make."""
        with self._grouping:
            if group not in self._groups:
                maxima = torch.empty(group.numel // BLOCK)
                for first in range(0, group.numel, CHUNK):
                    values = group.read(self._files, first, min(first + CHUNK, group.numel))
                    found = block_maxima(values.to(self._compute))
                    maxima[first // BLOCK :][: len(found)] = found
                state = state_of(maxima, torch.Size(group.shape), self._compute, self._quantization)
                while len(self._groups) >= KEPT_GROUPS:
                    self._groups.pop(next(iter(self._groups)))
                self._groups[group] = maxima, constants_of(state)
            return self._groups[group]

    def compute(self, piece: Piece, state: "Future[State] | None", slot: Slot) -> memoryview:
        """Read a piece and return its bytes in the new file, which lie in the slot.

        Raises:
            UserError: a value that is not finite, or a file that was cut meanwhile.
        """
        tensor = piece.tensor
        shared = State() if state is None else state.result()
        source = self._read(piece, slot)
        if in_place(tensor):
            out = source
        else:
            out = slot.write[: piece.nbytes].view(tensor.dtype)
        if tensor.how == "verbatim":
            return source.view(torch.uint8).numpy().data
        for first in range(piece.first, piece.last, tensor.unit):
            count = min(tensor.unit, piece.last - first)
            place = slice(first - piece.first, first - piece.first + count)
            self._unit(tensor, shared, source, first, place, out[place])
        return out.view(torch.uint8).numpy().data

    def _unit(self, tensor: Merged, state: State, source: Tensor, first: int, place: slice, out: Tensor) -> None:
        """Compute one unit: weights `first` on of the tensor, `place` of the piece, into `out`."""
        blocks = slice(first // BLOCK, (first + len(out)) // BLOCK)
        if tensor.how == "unpack":
            per_element = 2 * source.dtype.itemsize
            packed = source[place.start // per_element : place.stop // per_element]
            values = unpack(packed, _known(state.constants)[blocks], self._compute)
        else:
            # A dtype that can hold no more than the run's needs no rounding to it, and no copy.
            values = source[place].to(self._compute)
        if tensor.how == "round_trip":
            packed = self._packer().pack(values, _known(state.maxima)[blocks])
            values = unpack(packed, _known(state.constants)[blocks], values.dtype)
        if state.factors is not None:
            rows, columns = len(out) // tensor.columns, tensor.columns
            weight = self._buffer("weight", tensor.unit, torch.float32)[: len(out)].copy_(values).view(rows, columns)
            product = self._buffer("product", tensor.unit, torch.float32)[: tensor.unit].view(-1, columns)
            values = merge_rows(weight, state.factors, (tensor.place + first) // columns, product).view(-1)
        if values.data_ptr() != out.data_ptr():
            out.copy_(values)
        # A sum over a value that is not finite is not finite; only then is it worth while to look at each.
        if tensor.called and not torch.isfinite(out.sum()) and not torch.isfinite(out).all():
            raise UserError(
                f"{tensor.source.file}: {tensor.name} has values that are not finite once merged in "
                f"{str(tensor.dtype).removeprefix('torch.')}; base or adapter are damaged, or the dtype is too narrow"
            )

    def _read(self, piece: Piece, slot: Slot) -> Tensor:
        """Return a piece's values as the base's file has them, in the slot."""
        dtype = piece.tensor.source.dtype
        per_element = 2 * dtype.itemsize if piece.tensor.how == "unpack" else 1
        first, last = piece.first // per_element, piece.last // per_element
        buffer = slot.read[: (last - first) * dtype.itemsize]
        self._files.read_into(buffer, piece.tensor.name, piece.tensor.skip + first)
        return buffer.view(dtype)

    def _stored_constants(self, tensor: Merged) -> Tensor:
        prefix = f"{tensor.name}."
        parts = {
            name.removeprefix(prefix): self._files.read(name).view(self._files[name].shape)
            for name in self._files.tensors
            if name.startswith(prefix)
        }
        try:
            state = stored_state(parts, torch.device("cpu"))
        except (KeyError, ValueError) as error:
            raise UserError(f"{tensor.source.file}: the quantisation state of {tensor.name} is incomplete") from error
        if state.blocksize != BLOCK or state.quant_type != "nf4":
            raise UserError(
                f"{tensor.source.file}: {tensor.name} is in {state.quant_type} blocks of {state.blocksize}; "
                f"allowed: nf4 blocks of {BLOCK}"
            )
        return constants_of(state)

    def _packer(self) -> Packer:
        """Return this thread's own packer."""
        if not hasattr(self._scratch, "packer"):
            self._scratch.packer = make_packer()
        return self._scratch.packer

    def _buffer(self, name: str, size: int, dtype: torch.dtype) -> Tensor:
        """Return this thread's own buffer of that name, at least of that size."""
        held = getattr(self._scratch, name, None)
        if held is None or len(held) < size:
            held = torch.empty(size, dtype=dtype)
            setattr(self._scratch, name, held)
        return held


def lazily(submit: Callable[..., Future], arithmetic: Arithmetic) -> Callable[[Merged], "Future[State] | None"]:
    """Return a function that has the state of each tensor computed once, when its first piece asks for it.

    The last one alone is kept: the pieces of a tensor follow each other.
    """

    @functools.lru_cache(maxsize=1)
    def state_of_tensor(tensor: Merged) -> "Future[State] | None":
        if tensor.delta is None and tensor.how in ("verbatim", "cast"):
            return None
        return submit(arithmetic.prepare, tensor)

    return state_of_tensor


def _known(values: Tensor | None) -> Tensor:
    """Return a part of a tensor's state that its way of being computed needs."""
    assert values is not None, "the state was prepared for another way of computing"
    return values
