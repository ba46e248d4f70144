"""Kills, damages and starves training runs, and checks that each ends as the run that nobody disturbed.

    python tests/faults/suite.py [--quick] [--parts PART ...] [--seed N] [--markdown FILE]

Runs of two processes (CPU, tiny backbone; one fold under DDP, and three folds, two at once, under DDP and ZeRO-3) are
killed with SIGKILL, resumed, and killed again: the resumed run is the next victim. The table says for each fault how
often it was tried, after how many the run ended with the same weights and answers, bit for bit, and how many optimizer
steps a kill cost.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

from apart import apart
from lives import Kill, begin, live, random_kill, wait
from run_kinds import SAVE_EVERY, Runs, side_by_side, step_of
from training_runs import newest_checkpoint, partition_everything

from aullm_dist.checkpoint.retention import find_newest_valid, list_checkpoints

PARTS = ("kills", "folds", "damage", "disk", "permission", "second")
BOTH = (0, 1)
OPERATIONS = 28
"""File operations of a save and of letting go of the oldest checkpoint."""


@dataclass
class Row:
    """What became of one kind of fault."""

    tried: int = 0
    recovered: int = 0
    lost_steps: list[int] = field(default_factory=list)


class Suite:
    """The runs below one folder, and the rows of the table."""

    def __init__(self, folder: Path, seed: int, steps: int) -> None:
        self.folder, self.draw = folder, random.Random(seed)
        self.rows: dict[str, Row] = {}
        apart(_prepare, folder)
        self.reference, self.alone = folder / "reference", Runs(folder, steps)
        self.expected = self._undisturbed(self.alone, self.reference)

    def _undisturbed(self, runs: Runs, run: Path) -> dict[str, object]:
        ended = live(runs.settings(run), self.folder / "life")
        assert ended.codes == [0, 0], ended.log
        return runs.final(run)

    def side_by_side(self, steps: int, kills: Mapping[str, list[Kill]]) -> None:
        """Kill runs of several folds at once, of each strategy; they end alike, whichever it is."""
        engines = {"ddp": "ddp", "zero3": partition_everything(self.folder)}
        kinds = [side_by_side(self.folder, steps, strategy, engines[strategy]) for strategy in kills]
        expected = self._undisturbed(kinds[0], self.folder / "side")
        for runs, those in zip(kinds, kills.values(), strict=True):
            self.chains(runs, expected, those)

    def chains(self, runs: Runs, expected: dict[str, object], kills: list[Kill]) -> None:
        """Kill one run after the other until every kill was dealt."""
        self.draw.shuffle(kills)
        number = 0
        while kills:
            run = self.folder / f"chain{number}"
            number += 1
            kills = self._chain(runs, expected, run, kills)
            sys.stderr.write(f"run {number} ended as it should; {len(kills)} kills are left\n")
            shutil.rmtree(run)

    def _chain(self, runs: Runs, expected: dict[str, object], run: Path, kills: list[Kill]) -> list[Kill]:
        dealt: list[str] = []
        late: list[Kill] = []
        while kills:
            kill = kills.pop()
            before = runs.newest(run)
            ended = live(runs.settings(run), self.folder / "life", kill)
            if ended.killed_in is None:
                assert ended.codes == [0, 0], ended.log
                late.append(kill)  # it came too late: the run had ended
                break
            after = runs.newest(run)
            lost = [fold for fold in runs.folds if after[fold] < before[fold]]
            assert not lost, f"a valid checkpoint was lost: steps {before}, then {after}\n{ended.log}"
            who = "all ranks" if kill.everybody else "one rank"
            name = (f"{runs.kind}: " if runs.kind else "") + f"kill -9 of {who} in {ended.killed_in}"
            row = self.rows.setdefault(name, Row())
            row.tried += 1
            row.lost_steps.append(max(0, ended.step - after.get(ended.fold, 0)))
            dealt.append(name)
        self._end(runs, expected, run)
        for name in dealt:
            self.rows[name].recovered += 1
        return kills + late

    def _end(self, runs: Runs, expected: dict[str, object], run: Path) -> None:
        """Let a run go on to its end, and compare."""
        ended = live(runs.settings(run), self.folder / "life")
        assert ended.codes == [0, 0], ended.log
        final = runs.final(run)
        other = [name for name in {**expected, **final} if expected.get(name) != final.get(name)]
        assert not other, f"{run} ended otherwise: {', '.join(other)}\n{ended.log}"

    def _unfinished(self, name: str) -> Path:
        """Copy the reference without its answers, as if its processes had been killed after the last save."""
        run = self.folder / name
        shutil.copytree(self.reference, run)
        shutil.rmtree(run / "fold-00" / "predictions")
        return run

    def damage(self, every: int = 1) -> None:
        """Damage each file of the newest checkpoint in turn, in four ways; resume from the one before."""
        half = self._unfinished("half")
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
            self._end(self.alone, self.expected, run)
            row.recovered += 1
            row.lost_steps.append(self.alone.steps - step_of(found))
            shutil.rmtree(run)

    def full_disk(self) -> None:
        """Allow the main process files of a quarter of the optimizer's, then as large as they are."""
        size = (newest_checkpoint(self.reference) / "optimizer.safetensors").stat().st_size
        self._starve("disk full (file size limit)", {"limit": size // 4}, "could not be written")

    def no_permission(self) -> None:
        """Take the right to write into the folder of checkpoints away."""
        self._starve("no write permission", {"obedient": True}, "Permission denied")

    def _starve(self, name: str, how: dict[str, int], message: str) -> None:
        run = self._unfinished("starved")
        checkpoints = run / "fold-00" / "checkpoints"
        shutil.rmtree(list_checkpoints(checkpoints)[-1])
        before = self.alone.newest(run)
        assert 0 < before[0] < self.alone.steps
        if "obedient" in how:
            checkpoints.chmod(0o555)
        row = self.rows.setdefault(name, Row())
        row.tried += 1
        ended = live(self.alone.settings(run), self.folder / "life", **how)
        assert ended.codes[0] == 1, ended.log
        assert ended.log.count("train.py: error:") == 1, ended.log
        assert message in ended.log, ended.log
        assert self.alone.newest(run) == before
        checkpoints.chmod(0o755)
        self._end(self.alone, self.expected, run)
        row.recovered += 1
        row.lost_steps.append(SAVE_EVERY)
        shutil.rmtree(run)

    def two_runs(self) -> None:
        """Start a second run into the folder of one that is going on."""
        run = self.folder / "shared"
        row = self.rows.setdefault("second run into the same folder", Row())
        row.tried += 1
        pids = begin(self.alone.settings(run), self.folder / "life")
        lock = run / ".fold-00.lock"
        while not (lock.exists() and lock.stat().st_size):  # who holds it writes its name into it
            time.sleep(0.05)
        # It holds still, or it might end before the second comes to look.
        _signal(pids, signal.SIGSTOP)
        second = live(self.alone.settings(run), self.folder / "second")
        _signal(pids, signal.SIGCONT)
        assert second.codes[0] == 2, second.log
        assert "is being trained by another run" in second.log, second.log
        assert wait(pids, self.folder / "life").codes == [0, 0]
        assert self.alone.final(run) == self.expected
        row.recovered += 1

    def table(self, seconds: float) -> str:
        """Return the rows as Markdown."""
        lines = ["| fault | tried | recovered | steps lost: mean / most |", "|---|---|---|---|"]
        for name, row in sorted(self.rows.items()):
            lost = f"{sum(row.lost_steps) / len(row.lost_steps):.1f} / {max(row.lost_steps)}" if row.lost_steps else "-"
            lines.append(f"| {name} | {row.tried} | {row.recovered} | {lost} |")
        kills = [row for name, row in self.rows.items() if "kill -9" in name]
        lines.append(f"| all kills | {sum(r.tried for r in kills)} | {sum(r.recovered for r in kills)} | |")
        return "\n".join([*lines, "", f"{seconds:.0f} s"])


def _prepare(out: Path) -> None:
    from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
    from aullm_dist.data.synthetic import SyntheticSpec, write_corpus
    from aullm_dist.llm.tiny import build_tiny_backbone

    spec = SyntheticSpec(
        corpus="casme2", subjects=6, clips_per_subject=4, balance=1.0, num_frames=(8, 12), frame_size=(32, 32)
    )
    write_corpus(spec, out / "corpus")
    prepare("casme2", out / "corpus", out / "dataset", PrepareOptions(size=32, num_workers=1))
    build_tiny_backbone(out / "llm", hidden=32, layers=2, heads=2)


def planned(
    draw: random.Random, per_phase: int, every: int, repeats: int, savers: Sequence[int] = (0,)
) -> Iterator[Kill]:
    """Yield the kills: random moments of load, step and evaluation, and the gaps between the operations of a save.

    Args:
        draw: of the moments.
        per_phase: kills in load, in step and in evaluation.
        every: gaps of a save from one kill to the next.
        repeats: how often all those gaps.
        savers: processes that save.
    """
    longest = {"load": 0.7, "step": 0.15, "evaluation": 0.15}
    for phase, seconds in longest.items():
        for index in range(per_phase):
            yield random_kill(phase, index % 2 == 0, draw, seconds)
    for repeat in range(repeats):
        for index, operation in enumerate(range(1, OPERATIONS + 1, every)):
            yield Kill("save", everybody=(index + repeat) % 2 == 0, operation=operation, victim=draw.choice(savers))


def _signal(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


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


def _parts(suite: Suite, quick: bool) -> dict[str, Callable[[], None]]:
    """Return what does each of PARTS, a small part of it where it must be quick."""
    draw = suite.draw
    if quick:
        kills = list(planned(draw, 1, 14, 1))
        few = [random_kill("step", False, draw, 0.1), Kill("save", False, operation=9, victim=1)]
        beside = {"zero3": few}
    else:
        kills = list(planned(draw, 16, 1, 2))
        beside = {strategy: list(planned(draw, 4, 2, 1, BOTH)) for strategy in ("ddp", "zero3")}
    return {
        "kills": lambda: suite.chains(suite.alone, suite.expected, kills),
        "folds": lambda: suite.side_by_side(2 if quick else 6, beside),
        "damage": lambda: suite.damage(every=22 if quick else 1),
        "disk": suite.full_disk,
        "permission": suite.no_permission,
        "second": suite.two_runs,
    }


def main() -> int:
    """Run the suite and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small part of each kind")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of the suite (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    args = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        Path(folder).chmod(0o755)
        suite = Suite(Path(folder), args.seed, steps=6 if args.quick else 16)
        parts = _parts(suite, args.quick)
        try:
            for name in args.parts:
                parts[name]()
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
