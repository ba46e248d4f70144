"""Reads generated inputs of a prediction and annotation sheets, many of them damaged, and counts what goes wrong.

    python tests/faults/predict_inputs.py [--inputs 2000] [--sheets 4000] [--seed N]

An input goes wrong when something is raised that is no line for the user, when frames are missing or show something
else without a word, when nothing is wrong with it and it is refused, or when it takes longer than `SLOW` seconds. A
sheet goes wrong when a label is prepared that does not stand in it.
"""

# ruff: noqa: T201 - this is the script's own output.

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[1] / "unit")]
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

from clip_inputs import judge
from corpus_fixtures import make_casme2
from test_sheets_fuzz import check_csv, check_xlsx

SLOW = 10.0


def count_wrong(name: str, seeds: range, attempt: Callable[[int, Path], str]) -> int:
    """Try each seed in a folder of its own, print what goes wrong, and return how often it does."""
    wrong, slowest = 0, 0.0
    for seed in seeds:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                problem = attempt(seed, Path(folder))
            except (Exception, AssertionError):
                problem = traceback.format_exc()
        seconds = time.monotonic() - started
        slowest = max(slowest, seconds)
        if seconds > SLOW:
            problem = problem or f"took {seconds:.0f} s"
        if problem:
            wrong += 1
            print(f"{name} {seed}: {problem}", flush=True)
    print(f"{name}: {wrong} of {len(seeds)} went wrong; the slowest took {slowest:.1f} s", flush=True)
    return wrong


def main() -> int:
    """Return 1 if anything went wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=2000, help="folders and videos (default: %(default)s)")
    parser.add_argument("--sheets", type=int, default=4000, help="sheets, one in four an .xlsx (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first (default: %(default)s)")
    args = parser.parse_args()
    first = args.seed
    wrong = count_wrong("input", range(first, first + args.inputs), judge)
    with tempfile.TemporaryDirectory() as top:
        frames = make_casme2(Path(top)) / "CASME2_RAW_selected"

        def sheet(seed: int, _: Path) -> str:
            (check_xlsx if seed % 4 == 0 else check_csv)(seed, frames)
            return ""

        wrong += count_wrong("sheet", range(first, first + args.sheets), sheet)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
