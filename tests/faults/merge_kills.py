"""Kills merges with SIGKILL at random moments, starts them again, and compares what they end in.

    python tests/faults/merge_kills.py [--kills N] [--seed N]

Each trial kills one merge after another in the same folder, lets the last one end, and compares every byte with the
merge that nobody disturbed. A merge is forked from a process that has imported everything and computed nothing: then it
can be forked, and a life costs a fraction of a second.
"""

# ruff: noqa: T201 - a command's own output.

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import peft  # noqa: F401  for the children
import transformers.models.llama.modeling_llama  # noqa: F401
from apart import apart

from aullm_dist.errors import UserError
from aullm_dist.merge import pipeline as merge_run
from aullm_dist.merge import plan as merge_plan
from aullm_dist.merge.merge import merge_llm

MAX_RAM = 2**30
PER_TRIAL = 3
"""Merges that are killed in one folder before one is left to end."""


def main(kills: int, seed: int) -> int:
    """Run the trials; return 1 if one of them ended in other bytes."""
    # Small pieces and notes: a tiny LLM takes as many steps as a large one.
    merge_plan.UNIT_WEIGHTS = merge_plan.LARGEST_PIECE = 2**14
    merge_run._FLUSH_BYTES = 2**17
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="aullm-merge-kills-") as name:
        folder = Path(name)
        apart(_prepare, folder)
        expected, seconds = {}, {}
        for kind in ("bf16", "nf4"):
            whole = folder / f"{kind}-whole"
            started = time.monotonic()
            life(folder / kind / "step-00000001", whole, None)
            seconds[kind], expected[kind] = time.monotonic() - started, contents(whole)
        done = after_start = failed = 0
        while done < kills:
            kind = draw.choice(("bf16", "nf4"))
            out = folder / "out"
            for _ in range(min(PER_TRIAL, kills - done)):
                if not life(folder / kind / "step-00000001", out, draw.uniform(0, seconds[kind])):
                    break  # it was through before
                done += 1
                after_start += (folder / "out.partial").exists()
            life(folder / kind / "step-00000001", out, None)
            if contents(out) != expected[kind] or (folder / "out.partial").exists():
                failed += 1
                print(f"{kind}, kill {done}: ended in other bytes", file=sys.stderr)
            shutil.rmtree(out)
    print(f"{done} kills, {after_start} left an unfinished merge, {failed} trials ended in other bytes")
    return int(bool(failed))


def _prepare(out: Path) -> None:
    from merge_samples import write_checkpoint

    from aullm_dist.llm.tiny import build_tiny_backbone

    llm = build_tiny_backbone(out / "llm", hidden=256, layers=4)
    for kind, nf4 in (("bf16", False), ("nf4", True)):
        write_checkpoint(out / kind, llm, nf4=nf4)


def life(checkpoint: Path, out: Path, kill_after: float | None) -> bool:
    """Merge in a forked process, kill it after some seconds, and return whether it was not through then."""
    if contents(out) and not out.with_name("out.partial").exists():
        return False
    pid = os.fork()
    if pid == 0:
        # A child never returns into the driver, which would clear up.
        code = 1
        try:
            merge_llm(checkpoint, out, max_ram=MAX_RAM)
            code = 0
        except (UserError, OSError, AssertionError) as error:
            sys.stderr.write(f"{error}\n")
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    killed = os.WIFSIGNALED(status) and kill_after is not None
    assert killed or status == 0, f"a merge ended with {status}"
    return killed


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder, nothing if it is not there."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--kills", type=int, default=50, help="merges that are killed (50)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sys.exit(main(options.kills, options.seed))
