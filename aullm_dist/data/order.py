"""Computes sample order and random keys from (seed, epoch, consumed samples) alone, the same for every world size.

The samples of a run form one endless stream, epoch after epoch, each a permutation keyed by (seed, epoch). Optimizer
step s takes positions `s * G .. (s + 1) * G - 1` for a global batch of G clips, whatever the number of processes, so
that every step has exactly G clips and nothing depends on how they are spread.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np


def generator(seed: int, *keys: int | str) -> np.random.Generator:
    """Return a generator keyed by `seed` and `keys`; text is keyed by its CRC-32."""
    numbers = [key if isinstance(key, int) else zlib.crc32(key.encode("utf-8", "surrogateescape")) for key in keys]
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *numbers])))


@lru_cache(maxsize=4)
def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    return generator(seed, "order", epoch).permutation(num_samples)


def total_steps(num_clips: int, epochs: int, global_batch: int, max_steps: int | None) -> int:
    """Return the optimizer steps of a fold with `num_clips` training clips."""
    steps = math.ceil(epochs * num_clips / global_batch)
    return min(steps, max_steps or steps)


@dataclass(frozen=True, slots=True)
class SampleStream:
    """The endless stream of sample indices of one training fold."""

    num_samples: int
    seed: int

    def at(self, position: int) -> tuple[int, int]:
        """Return (epoch, sample index) at `position`."""
        epoch, offset = divmod(position, self.num_samples)
        return epoch, int(_permutation(self.num_samples, self.seed, epoch)[offset])


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """How the stream is cut into micro-batches for one of several processes."""

    global_batch: int
    micro_batch: int
    processes: int
    rank: int

    @property
    def accumulation(self) -> int:
        """Micro-batches per optimizer step of one process."""
        return self.global_batch // (self.micro_batch * self.processes)

    def positions(self, step: int) -> Iterator[list[int]]:
        """Yield the stream positions of each micro-batch of this process in optimizer step `step` (from 0)."""
        for micro in range(self.accumulation):
            first = step * self.global_batch + (micro * self.processes + self.rank) * self.micro_batch
            yield list(range(first, first + self.micro_batch))
