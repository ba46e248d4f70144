"""Overlaps reading, computing and writing of a merge, within the memory that was given.

Pieces go to threads in order; each reads and computes its own. The main thread takes them in the same order and writes
them while another one hashes them; a third forces to disk what is written and notes it in the journal. Torch, hashing,
reading and writing all let other threads run meanwhile.
"""

import ctypes
import errno
import itertools
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch

from aullm_dist.llm.pieces.loading import progress
from aullm_dist.merge.compute import Arithmetic, Slot, lazily, make_slots
from aullm_dist.merge.journal import Journal
from aullm_dist.merge.plan import OutputFile, Plan, Sizes, pieces

_MOST_WORKERS = 16
"""More cores than these compute faster than one of them hashes."""
_FLUSH_BYTES = 2**26
"""What is written between two lines of the journal, at most but for one piece."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a run of the merge wrote."""

    sha256: dict[str, str]
    """Of each file."""
    resumed: int
    """Bytes that a killed merge had written before."""


def num_workers() -> int:
    """Return how many threads compute: one for each core, and one more that may wait for the disk."""
    return min(len(os.sched_getaffinity(0)) + 1, _MOST_WORKERS)


def run_merge(plan: Plan, sizes: Sizes, arithmetic: Arithmetic, journal: Journal) -> Done:
    """Write the files of a plan into the journal's folder, resuming where a killed merge was.

    Raises:
        UserError: a value that is not finite, or a file of the base that was cut meanwhile.
        OSError: the disk refuses.
    """
    kept = {file.name: journal.kept(file.name) for file in plan.files}
    resumed = sum(size for size, _ in kept.values())
    with ExitStack() as stack:
        stack.enter_context(_one_thread_each())
        bar = stack.enter_context(progress("Merging the LLM", plan.size))
        bar.initial = bar.n = resumed
        hasher, flusher = (stack.enter_context(_pool(1)) for _ in range(2))
        crew = _Crew(stack.enter_context(_pool(sizes.slots - 2)), sizes, arithmetic)
        stream = crew.computed([(file, kept[file.name][0]) for file in plan.files])
        with _Writer(journal, hasher, flusher) as writer:
            for file, parts in itertools.groupby(stream, key=lambda part: part.file):
                writer.start(file, *kept[file.name])
                for part in parts:
                    writer.write(part.view)
                    bar.update(len(part.view))
                writer.finish()
    return Done({name: digest.hexdigest() for name, (_, digest) in kept.items()}, resumed)


@dataclass(frozen=True, slots=True)
class _Part:
    """Bytes that follow each other in a file; they last until the next part is asked for."""

    file: OutputFile
    view: memoryview


class _Crew:
    """Computes pieces ahead of the one that is written, as many as there are slots."""

    def __init__(self, pool: ThreadPoolExecutor, sizes: Sizes, arithmetic: Arithmetic) -> None:
        self._pool, self._sizes, self._arithmetic = pool, sizes, arithmetic
        self._state_of = lazily(pool.submit, arithmetic)
        self._free: SimpleQueue[Slot] = SimpleQueue()
        for slot in make_slots(sizes):
            self._free.put(slot)
        self._ahead: deque[tuple[OutputFile, Slot | None, Future[memoryview]]] = deque()

    def computed(self, todo: Sequence[tuple[OutputFile, int]]) -> Iterator[_Part]:
        """Yield what is missing of files from a byte on, one after the other."""
        for file, begin in todo:
            if begin == 0:
                header: Future[memoryview] = Future()
                header.set_result(memoryview(file.header))
                self._ahead.append((file, None, header))
            for piece in pieces(file, begin, self._sizes.piece):
                while self._free.empty():
                    yield from self._taken()
                slot = self._free.get()
                state = self._state_of(piece.tensor)
                self._ahead.append((file, slot, self._pool.submit(self._arithmetic.compute, piece, state, slot)))
        while self._ahead:
            yield from self._taken()

    def _taken(self) -> Iterator[_Part]:
        file, slot, future = self._ahead.popleft()
        yield _Part(file, future.result())
        if slot is not None:
            self._free.put(slot)


class _Writer:
    """Writes files one after the other, and has them forced to disk behind its back."""

    def __init__(self, journal: Journal, hasher: ThreadPoolExecutor, flusher: ThreadPoolExecutor) -> None:
        self._journal, self._hasher, self._flusher = journal, hasher, flusher
        self._flushes: deque[Future[None]] = deque()
        self._open = ExitStack()

    def __enter__(self) -> "_Writer":
        return self

    def start(self, file: OutputFile, begin: int, digest: Any) -> None:
        """Continue a file at byte `begin`; `digest` is that of the bytes before, and is updated."""
        self._file, self._end, self._noted, self._digest = file, begin, begin, digest
        self._descriptor = os.open(self._journal.files / file.name, os.O_WRONLY | os.O_CREAT, 0o666)
        self._open.callback(os.close, self._descriptor)
        reserve(self._descriptor, file.size)

    def write(self, view: memoryview) -> None:
        """Append bytes."""
        hashed = self._hasher.submit(self._digest.update, view)
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], self._end + done)
        hashed.result()
        self._end += len(view)
        if self._end - self._noted >= _FLUSH_BYTES:
            self._flush()

    def finish(self) -> None:
        """End the file that was started last."""
        assert self._end == self._file.size, f"{self._file.name}: {self._end} bytes of {self._file.size}"
        if self._noted < self._end:
            self._flush()

    def _flush(self) -> None:
        arguments = (self._descriptor, self._file.name, self._noted, self._end, self._digest.hexdigest())
        self._noted = self._end
        self._flushes.append(self._flusher.submit(self._force, *arguments))
        if len(self._flushes) > 2:  # no more than the disk can follow
            self._flushes.popleft().result()

    def _force(self, descriptor: int, name: str, begin: int, end: int, sha256: str) -> None:
        os.fdatasync(descriptor)
        # The next bytes then go where these were. Otherwise a large LLM drives everything else out of the page cache,
        # and memory that the system must find first is several times slower to write to.
        os.posix_fadvise(descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)
        self._journal.note(name, end, sha256)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._open:
            wait(self._flushes)
        if kind is None:
            for future in self._flushes:
                future.result()


def reserve(descriptor: int, size: int) -> None:
    """Give a file its size and, where the file system can, its place on the disk.

    Appending to a file that is being forced to disk waits for its journal again and again.

    Raises:
        OSError: there is no room.
    """
    os.ftruncate(descriptor, size)
    # Not `os.posix_fallocate`: where the file system has no such call it writes to every block instead.
    libc = ctypes.CDLL(None, use_errno=True)
    if size and libc.fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
        number = ctypes.get_errno()
        if number == errno.ENOSPC:
            raise OSError(number, os.strerror(number))


@contextmanager
def _pool(size: int) -> Iterator[ThreadPoolExecutor]:
    """Give threads that stop after what they are doing when the block is left by an exception."""
    pool = ThreadPoolExecutor(size)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let torch compute with one thread per thread of ours; there are as many of these as cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
