"""One process of benchmarks/folds.py: the main job, with a look at its clock, its memory and the bytes it gathers.

    folds_worker.py FOLDER [arguments of train.py]

Writes FOLDER/rank<k>.json when the job is over. What is counted begins when the model is loaded.
"""

import inspect
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

PERIOD_SECONDS = 0.02
GATHERS = ("all_gather", "all_gather_into_tensor")


class Facts:
    """What one process has seen."""

    def __init__(self) -> None:
        self.counts = False
        self.gathered = self.packed = self.peak = 0
        self.began = self.ended = 0.0

    def begin(self) -> None:
        """Begin to count."""
        self.began, self.counts = time.perf_counter(), True
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        threading.Thread(target=self._sample, daemon=True).start()

    def end(self) -> None:
        """Stop counting."""
        self.ended, self.counts = time.perf_counter(), False
        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()

    def watch(self, name: str) -> None:
        """Count the bytes that this process receives by a collective; what it sends to itself is not among them."""
        collective = getattr(torch.distributed, name, None)
        if collective is None:
            return

        signature = inspect.signature(collective)

        def counted(*args: Any, **kwargs: Any) -> Any:
            if self.counts:
                output, given = signature.bind(*args, **kwargs).args[:2]
                received = _nbytes(output) - _nbytes(given)
                self.gathered += received
                # Packed weights are stored as bfloat16, what is trained as float32.
                if given.dtype == torch.bfloat16:
                    self.packed += received
            return collective(*args, **kwargs)

        setattr(torch.distributed, name, counted)

    def _sample(self) -> None:
        while self.counts and not torch.cuda.is_available():
            status = Path("/proc/self/status").read_text().splitlines()
            kib = sum(int(line.split()[1]) for line in status if line.startswith(("RssAnon", "RssShmem")))
            self.peak = max(self.peak, kib * 1024)
            time.sleep(PERIOD_SECONDS)


def _nbytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in (tensors if isinstance(tensors, list) else [tensors]))


def main(folder: Path, arguments: list[str]) -> None:
    """Run the job and write what was seen."""
    facts = Facts()
    for name in GATHERS:
        facts.watch(name)
    from aullm_dist.commands.train import main as train
    from aullm_dist.runs.lifecycle import Life
    from aullm_dist.runtime.exits import crash, leave

    sys.excepthook = crash
    begins, ends = Life.begins, Life.ends

    def begin(life: Life) -> None:
        begins(life)
        facts.begin()

    def end(life: Life) -> None:
        facts.end()
        ends(life)

    Life.begins, Life.ends = begin, end  # type: ignore[method-assign]
    code = train(arguments)
    if code == 0:
        seen = {
            "seconds": facts.ended - facts.began,
            "gathered": facts.gathered,
            "packed": facts.packed,
            "peak": facts.peak,
        }
        (folder / f"rank{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
    leave(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
