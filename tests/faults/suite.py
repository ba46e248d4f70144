"""Kills, damages and starves training runs, and checks that each ends as the run that nobody disturbed.

    python tests/faults/suite.py [--quick] [--seed N] [--markdown FILE]

Runs of two processes (DDP, CPU, tiny backbone) are killed with SIGKILL, resumed, and killed again: the resumed run is
the next victim. The table says for each fault how often it was tried, after how many the run ended with the same
weights and answers, bit for bit, and how many optimizer steps a kill cost.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from lives import Kill, begin, live, random_kill, wait
from safetensors.numpy import load_file
from training_runs import logits, newest_checkpoint, overrides

from aullm_dist.training.manifest import read_manifest
from aullm_dist.training.retention import find_newest_valid, list_checkpoints

SAVE_EVERY = 2
OPERATIONS = 28
"""File operations of a save and of letting go of the oldest checkpoint."""
_PREPARE = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
from aullm_dist.data.prepare import prepare
from aullm_dist.data.synthetic import SyntheticSpec, write_corpus
from aullm_dist.model.tiny import build_tiny_backbone
out = Path(sys.argv[2])
spec = SyntheticSpec(
    corpus="casme2", subjects=6, clips_per_subject=4, balance=1.0, num_frames=(8, 12), frame_size=(64, 64)
)
write_corpus(spec, out / "corpus")
prepare("casme2", out / "corpus", out / "dataset", size=64, num_workers=1)
build_tiny_backbone(out / "llm", hidden=32, layers=2, heads=2)
"""


@dataclass
class Row:
    """What became of one kind of fault."""

    tried: int = 0
    recovered: int = 0
    lost_steps: list[int] = field(default_factory=list)


class Suite:
    """The runs below one folder, and the rows of the table."""

    def __init__(self, folder: Path, seed: int, steps: int) -> None:
        self.folder, self.draw, self.steps = folder, random.Random(seed), steps
        self.rows: dict[str, Row] = {}
        subprocess.run([sys.executable, "-c", _PREPARE, str(Path(__file__).parents[1]), str(folder)], check=True)
        self.reference = folder / "reference"
        ended = live(self.settings(self.reference), folder / "life")
        assert ended.codes == [0, 0], ended.log
        self.expected = _final(self.reference, steps)

    def settings(self, run: Path) -> list[str]:
        """Return the arguments of a run that begins or goes on in `run`."""
        changes = {
            "training__global_batch": 8, "training__micro_batch": 2, "training__epochs": 99,
            "training__max_steps": self.steps, "training__save_every_steps": SAVE_EVERY,
            "training__evaluate_every_epochs": 2, "training__keep_checkpoints": 2, "monitor__log_every_steps": 5,
        }  # fmt: skip
        return [*overrides(self.folder / "dataset", self.folder / "llm", run, **changes), "--resume", "auto"]

    def chains(self, kills: list[Kill]) -> None:
        """Kill one run after the other until every kill was dealt."""
        self.draw.shuffle(kills)
        number = 0
        while kills:
            run = self.folder / f"chain{number}"
            number += 1
            kills = self._chain(run, kills)
            sys.stderr.write(f"run {number} ended as it should; {len(kills)} kills are left\n")
            shutil.rmtree(run)

    def _chain(self, run: Path, kills: list[Kill]) -> list[Kill]:
        dealt: list[str] = []
        late: list[Kill] = []
        while kills:
            kill = kills.pop()
            before = _newest(run)
            ended = live(self.settings(run), self.folder / "life", kill)
            if ended.killed_in is None:
                assert ended.codes == [0, 0], ended.log
                late.append(kill)  # it came too late: the run had ended
                break
            after = _newest(run)
            assert after >= before, f"a valid checkpoint was lost: step {before}, then {after}\n{ended.log}"
            who = "all ranks" if kill.everybody else "one rank"
            name = f"kill -9 of {who} in {ended.killed_in}"
            row = self.rows.setdefault(name, Row())
            row.tried += 1
            row.lost_steps.append(max(0, ended.step - after))
            dealt.append(name)
        self._end(run)
        for name in dealt:
            self.rows[name].recovered += 1
        return kills + late

    def _end(self, run: Path) -> None:
        """Let a run go on to its end, and compare."""
        ended = live(self.settings(run), self.folder / "life")
        assert ended.codes == [0, 0], ended.log
        assert _final(run, self.steps) == self.expected, f"{run} ended otherwise\n{ended.log}"

    def damage(self, every: int = 1) -> None:
        """Damage each file of the newest checkpoint in turn, in four ways; resume from the one before."""
        half = self.folder / "half"
        shutil.copytree(self.reference, half)
        shutil.rmtree(half / "fold-00" / "predictions")
        before, newest = list_checkpoints(half / "fold-00" / "checkpoints")
        cases = [
            (name, how) for name in sorted(os.listdir(newest)) for how in ("truncated", "flipped", "deleted", "doubled")
        ]
        for name, how in cases[::every]:
            run = self.folder / "damaged"
            shutil.copytree(half, run)
            _damage(run / newest.relative_to(half) / name, how)
            row = self.rows.setdefault(f"a file of the newest checkpoint {how}", Row())
            row.tried += 1
            wanted = newest if how == "doubled" else before
            found = find_newest_valid(run / "fold-00" / "checkpoints")
            assert found is not None
            assert found.name == wanted.name, f"{name} {how}: {found.name}"
            self._end(run)
            row.recovered += 1
            row.lost_steps.append(self.steps - int(found.name.removeprefix("step-")))
            shutil.rmtree(run)

    def full_disk(self) -> None:
        """Allow the main process files of a quarter of the optimizer's, then as large as they are."""
        size = (newest_checkpoint(self.reference) / "optimizer.safetensors").stat().st_size
        self._starve("disk full (file size limit)", {"limit": size // 4}, "could not be written")

    def no_permission(self) -> None:
        """Take the right to write into the folder of checkpoints away."""
        self._starve("no write permission", {"obedient": True}, "Permission denied")

    def _starve(self, name: str, how: dict[str, int], message: str) -> None:
        run = self.folder / "starved"
        first = live(self.settings(run), self.folder / "life", Kill("step", True, seconds=2.0))
        while _newest(run) == 0:
            first = live(self.settings(run), self.folder / "life", Kill("step", True, seconds=4.0))
        assert first is not None
        checkpoints, before = run / "fold-00" / "checkpoints", _newest(run)
        if "obedient" in how:
            checkpoints.chmod(0o555)
        row = self.rows.setdefault(name, Row())
        row.tried += 1
        ended = live(self.settings(run), self.folder / "life", **how)
        assert ended.codes[0] == 1, ended.log
        assert ended.log.count("train.py: error:") == 1, ended.log
        assert message in ended.log, ended.log
        assert _newest(run) == before
        checkpoints.chmod(0o755)
        self._end(run)
        row.recovered += 1
        row.lost_steps.append(SAVE_EVERY)
        shutil.rmtree(run)

    def two_runs(self) -> None:
        """Start a second run into the folder of one that is going on."""
        run = self.folder / "shared"
        row = self.rows.setdefault("second run into the same folder", Row())
        row.tried += 1
        pids = begin(self.settings(run), self.folder / "life")
        while not (run / ".fold-00.lock").exists():
            time.sleep(0.05)
        second = live(self.settings(run), self.folder / "second")
        assert second.codes[0] == 2, second.log
        assert "is being trained by another run" in second.log, second.log
        assert wait(pids, self.folder / "life").codes == [0, 0]
        assert _final(run, self.steps) == self.expected
        row.recovered += 1

    def table(self, seconds: float) -> str:
        """Return the rows as Markdown."""
        lines = ["| fault | tried | recovered | steps lost: mean / most |", "|---|---|---|---|"]
        for name, row in sorted(self.rows.items()):
            lost = f"{sum(row.lost_steps) / len(row.lost_steps):.1f} / {max(row.lost_steps)}" if row.lost_steps else "-"
            lines.append(f"| {name} | {row.tried} | {row.recovered} | {lost} |")
        kills = [row for name, row in self.rows.items() if name.startswith("kill")]
        lines.append(f"| all kills | {sum(r.tried for r in kills)} | {sum(r.recovered for r in kills)} | |")
        return "\n".join([*lines, "", f"{seconds:.0f} s"])


def planned(draw: random.Random, per_phase: int, every: int, repeats: int) -> Iterator[Kill]:
    """Yield the kills: random moments of load, step and evaluation, and the gaps between the operations of a save."""
    longest = {"load": 0.7, "step": 0.3, "evaluation": 0.3}
    for phase, seconds in longest.items():
        for index in range(per_phase):
            yield random_kill(phase, index % 2 == 0, draw, seconds)
    for repeat in range(repeats):
        for operation in range(1, OPERATIONS + 1, every):
            yield Kill("save", everybody=(operation + repeat) % 2 == 0, operation=operation)


def _newest(run: Path) -> int:
    found = find_newest_valid(run / "fold-00" / "checkpoints")
    return int(found.name.rsplit("-", 1)[1].split(".")[0]) if found else 0


def _final(run: Path, steps: int) -> dict[str, object]:
    folder = newest_checkpoint(run)
    assert folder.name == f"step-{steps:08d}", folder
    files = {name: folder / name for name in read_manifest(folder)["files"] if name.endswith(".safetensors")}
    tensors = {
        f"{name}:{key}": value.tobytes() for name, path in files.items() for key, value in load_file(path).items()
    }
    return {**tensors, "logits": logits(run)}


def _damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif how == "deleted":
        path.unlink()
    else:
        shutil.copy(path, path.with_name(f"{path.stem}-copy{path.suffix}"))


def main() -> int:
    """Run the suite and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small part of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        Path(folder).chmod(0o755)
        suite = Suite(Path(folder), args.seed, steps=6 if args.quick else 16)
        try:
            if args.quick:
                suite.chains(list(planned(suite.draw, 1, 14, 1)))
                suite.damage(every=22)
            else:
                suite.chains(list(planned(suite.draw, 16, 1, 2)))
                suite.damage()
            suite.full_disk()
            suite.no_permission()
            suite.two_runs()
        finally:
            # A fault that was not survived shows as tried and not recovered, and its traceback behind the table.
            table = suite.table(time.monotonic() - begun)
            sys.stdout.write(table + "\n")
            sys.stdout.flush()
    if args.markdown:
        args.markdown.write_text(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
