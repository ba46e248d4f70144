"""The memories of a GPU for one launch, which refuse what goes beside a tensor and what depends on a race."""

from collections.abc import Iterable

import numpy as np
import torch

FIRST_ADDRESS = 1 << 40
_GAP = 256
_NOBODY, _SEVERAL = -1, -2


class MemoryFaultError(Exception):
    """A kernel reads or writes where it must not."""


class GlobalMemory:
    """Holds the storages of tensors, with gaps between them that belong to nobody.

    Args:
        tensors: what the kernel is given; those that share memory share it here.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._storages = {}
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._storages.setdefault(storage.data_ptr(), storage)
        self._starts, size = {}, _GAP
        for place, storage in self._storages.items():
            self._starts[place] = size
            size += -(-(storage.nbytes() + _GAP) // _GAP) * _GAP
        self._bytes = np.full(size, 0xFF, np.uint8)
        self._owned = np.zeros(size, bool)
        self._writer = np.full(size, _NOBODY, np.int32)
        for place, start in self._starts.items():
            values = _bytes_of(self._storages[place])
            self._bytes[start : start + len(values)] = values
            self._owned[start : start + len(values)] = True
        self.program = 0
        """Number of the program that runs."""

    def address(self, tensor: torch.Tensor) -> int:
        """Return where a tensor begins."""
        offset = tensor.storage_offset() * tensor.element_size()
        return FIRST_ADDRESS + self._starts[tensor.untyped_storage().data_ptr()] + offset

    def load(self, addresses: np.ndarray, size: int) -> np.ndarray:
        """Return `size` bytes from each of `addresses`, `[threads, size]`."""
        return self._bytes[self._places(addresses, size)]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        """Write `values` `[threads, size]`; no other program, and no thread with another value, may write there."""
        places = self._places(addresses, values.shape[1])
        self._bytes[places] = values
        if not np.array_equal(self._bytes[places], values):
            raise MemoryFaultError("two threads write different values to one place")
        before = self._writer[places]
        if ((before != _NOBODY) & (before != self.program)).any():
            raise MemoryFaultError("two programs write to one place")
        self._writer[places] = self.program

    def copy_back(self) -> None:
        """Give the tensors what was written."""
        for place, start in self._starts.items():
            values = _bytes_of(self._storages[place])
            values[:] = self._bytes[start : start + len(values)]

    def _places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        first = addresses.astype(np.int64) - FIRST_ADDRESS
        if (first % size).any():
            raise MemoryFaultError(f"an address is not aligned to {size} bytes")
        places = first[:, None] + np.arange(size)
        if (places < 0).any() or (places >= len(self._bytes)).any() or not self._owned[places].all():
            raise MemoryFaultError("an address is in no tensor")
        return places


def _bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


class SharedMemory:
    """What the warps of one program share, full of NaN at first.

    Between two barriers nobody knows which warp is first: there no warp may read what another writes, and none may
    write another value where one did.

    Args:
        size: bytes that the kernel asked for.
    """

    def __init__(self, size: int) -> None:
        self._bytes = np.full(size, 0xFF, np.uint8)
        self._written, self._read = np.full(size, _NOBODY), np.full(size, _NOBODY)

    def barrier(self) -> None:
        """Let every warp arrive."""
        self._written[:] = self._read[:] = _NOBODY

    def load(self, addresses: np.ndarray, size: int, warps: np.ndarray) -> np.ndarray:
        """Return `size` bytes from each of `addresses`, read by `warps`."""
        places, warps = self._places(addresses, size), warps[:, None]
        written = self._written[places]
        if ((written != _NOBODY) & (written != warps)).any():
            raise MemoryFaultError("a warp reads what another writes, without a barrier between them")
        before = self._read[places]
        self._read[places] = np.where((before != _NOBODY) & (before != warps), _SEVERAL, warps)
        several = self._read[places] != warps
        self._read[places[several]] = _SEVERAL
        return self._bytes[places]

    def claim(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        """Refuse that `warps` write `values` `[threads, size]` now, where that depends on which warp is first."""
        places, warps = self._places(addresses, values.shape[1]), warps[:, None]
        read, written = self._read[places], self._written[places]
        if ((read != _NOBODY) & (read != warps)).any():
            raise MemoryFaultError("a warp writes what another reads, without a barrier between them")
        if ((written != _NOBODY) & (written != warps) & (self._bytes[places] != values)).any():
            raise MemoryFaultError("two warps write different values to one place, without a barrier between them")

    def store(self, addresses: np.ndarray, values: np.ndarray, warps: np.ndarray) -> None:
        """Write `values` `[threads, size]`."""
        self.claim(addresses, values, warps)
        places = self._places(addresses, values.shape[1])
        self._bytes[places] = values
        if not np.array_equal(self._bytes[places], values):
            raise MemoryFaultError("two threads write different values to one place of shared memory")
        self._written[places] = warps[:, None]

    def _places(self, addresses: np.ndarray, size: int) -> np.ndarray:
        first = addresses.astype(np.int64)
        if (first % size).any():
            raise MemoryFaultError(f"an address of shared memory is not aligned to {size} bytes")
        places = first[:, None] + np.arange(size)
        if (places < 0).any() or (places >= len(self._bytes)).any():
            raise MemoryFaultError("an address is outside of the shared memory that the kernel asked for")
        return places
