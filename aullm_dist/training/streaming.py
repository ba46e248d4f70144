"""Streams training clips from Parquet files in shuffled order: no index of frames, no random access, bounded memory.

Each epoch is one pass over the files through `datasets`: clips of the fold alone, shuffled by files and in a buffer,
and split among the processes by `split_dataset_by_node`. The order depends on (seed, epoch, number of processes)
alone, and a resumed run skips to its place; unlike the ordinary order (`order.py`) it is not the same for every number
of processes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from aullm_dist.data.clips import clip_of_row
from aullm_dist.data.order import BatchPlan, generator
from aullm_dist.data.tables import read_rows
from aullm_dist.errors import UserError
from aullm_dist.training.batches import ClipRecipe, Sample, sample_of_clip

__all__ = ["StreamedBatches", "stream_epoch"]


def stream_epoch(
    files: Sequence[Path], names: frozenset[str], *, seed: int, epoch: int, buffer: int, processes: int, rank: int
) -> Iterator[dict]:
    """Yield this process's rows of one epoch.

    Args:
        files: Parquet files, the same on every process.
        names: Sample ids that may be yielded; other rows are passed over.
        seed: Key of the order.
        epoch: Key of the order.
        buffer: Clips that are shuffled together, and held in memory.
        processes: Number of processes.
        rank: This one.
    """
    import datasets
    from datasets.distributed import split_dataset_by_node

    # Not `load_dataset("parquet")`: it reads the frames of clips that are passed over, and in datasets 5.2 a shuffled
    # pass over it ends with five seconds of sleep. Nor `shuffle`: inside a loader process its order is another one.
    order = generator(seed, "stream", epoch).permutation(len(files))
    paths = [str(files[position]) for position in order.tolist()]
    rows = datasets.IterableDataset.from_generator(read_rows, gen_kwargs={"files": paths, "names": names})
    share = split_dataset_by_node(rows, rank=rank, world_size=processes)
    yield from _shuffled(share, buffer, generator(seed, "stream buffer", epoch, rank))


def _shuffled(rows: Iterable[dict], buffer: int, rng: np.random.Generator) -> Iterator[dict]:
    """Yield one of the last `buffer` rows at random whenever another arrives, then what is left."""
    held: list[dict] = []
    for row in rows:
        if len(held) < buffer:
            held.append(row)
            continue
        position = int(rng.integers(buffer))
        yield held[position]
        held[position] = row
    for position in rng.permutation(len(held)).tolist():
        yield held[position]


class StreamedBatches(IterableDataset):
    """The micro-batches of one process, optimizer step after optimizer step, as lists of samples.

    Args:
        files: Parquet files that hold the fold's training clips, among others.
        labels: Label row `[A]` of each training clip by sample id; no other clip is ever yielded.
        recipe: How clips become tensors.
        plan: Which micro-batches are this process's.
        steps: First step (included) and last (excluded).
        seed: Key of the order.
        buffer: Clips that are shuffled together.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Mapping[str, np.ndarray],
        recipe: ClipRecipe,
        plan: BatchPlan,
        steps: tuple[int, int],
        *,
        seed: int,
        buffer: int,
    ) -> None:
        self.files, self.labels, self.recipe, self.plan, self.steps = tuple(files), dict(labels), recipe, plan, steps
        self.seed, self.buffer = seed, buffer

    def __iter__(self) -> Iterator[list[Sample]]:
        worker = get_worker_info()
        # `datasets` divides a stream among loader processes by files, which would leave the order to their number.
        assert worker is None or worker.num_workers == 1, "a stream is read by one loader process"
        per_step = self.plan.accumulation
        first, last = (step * per_step for step in self.steps)
        rows = self._rows()
        for number in range(last):
            taken = [next(rows) for _ in range(self.plan.micro_batch)]
            if number >= first:
                yield [
                    sample_of_clip(clip_of_row(row), self.labels[row["sample_id"]], self.recipe, epoch)
                    for epoch, row in taken
                ]

    def _rows(self) -> Iterator[tuple[int, dict]]:
        """Yield (epoch, row) without end.

        Raises:
            UserError: An epoch has no clip for this process.
        """
        names = frozenset(self.labels)
        epoch = 0
        while True:
            options = {"seed": self.seed, "epoch": epoch, "buffer": self.buffer}
            rows = stream_epoch(self.files, names, **options, processes=self.plan.processes, rank=self.plan.rank)
            count = 0
            for count, row in enumerate(rows, start=1):  # noqa: B007 - whether there was any is asked below
                yield epoch, row
            if not count:
                raise UserError(
                    f"data.streaming: {len(names)} training clips leave none for process {self.plan.rank} of "
                    f"{self.plan.processes}; start fewer processes, or set data.streaming=false"
                )
            epoch += 1
