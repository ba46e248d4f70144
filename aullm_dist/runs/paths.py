"""Names every file of a run folder; no other module writes such a name.

The layout, with what writes the rarer ones:

    RUN/config.yaml, folds.json, environment.json, deepspeed.json, stratification.json, job.json, PREEMPTED
    RUN/fold-00/checkpoints/step-..., predictions/epoch-0003.jsonl, zeroed/content.jsonl
    RUN/fold-00/sensitivity.json, thresholds.json
    RUN/tensorboard/fold-00, all-folds
    RUN/metrics.json, table.md, table.csv      (`aullm-dist evaluate`; with `--epoch 3`: metrics-epoch-0003.json, ...)
    RUN/baselines/led_cnn                      (a run folder of its own; RUN/baseline in older runs)
    RUN/corpus, dataset, backbone, smollm2     (what a run without data or LLM of its own has generated)
"""

import re
from dataclasses import dataclass
from pathlib import Path

FOLDS_FILE = "folds.json"
CONFIG_FILE = "config.yaml"
ENVIRONMENT_FILE = "environment.json"
CHECKPOINTS = "checkpoints"
"""Folder of a fold's checkpoints."""
_FOLD = re.compile(r"fold-(\d+)")
_EPOCH = re.compile(r"epoch-(\d+)\.jsonl")


def fold_name(fold: int) -> str:
    """Return `fold-00`, the name of a fold's folder and its name in tables."""
    return f"fold-{fold:02d}"


def fold_number(name: str) -> int | None:
    """Return the fold that a folder's name stands for; None for other names."""
    match = _FOLD.fullmatch(name)
    return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class FoldPaths:
    """Paths of one fold of a run; nothing needs to exist.

    Attributes:
        run: the run folder.
        fold: the fold's number.
    """

    run: Path
    fold: int

    @property
    def folder(self) -> Path:
        """`RUN/fold-00`."""
        return self.run / fold_name(self.fold)

    @property
    def checkpoints(self) -> Path:
        """Folder of the fold's checkpoints."""
        return self.folder / CHECKPOINTS

    @property
    def tensorboard(self) -> Path:
        """Folder of the fold's event files."""
        return RunPaths(self.run).tensorboard / fold_name(self.fold)

    @property
    def lock(self) -> Path:
        """The file that a process which trains the fold keeps locked."""
        return self.run / f".{fold_name(self.fold)}.lock"

    @property
    def sensitivity(self) -> Path:
        """How far the answers move without each soft token, at the last evaluation."""
        return self.folder / "sensitivity.json"

    @property
    def thresholds(self) -> Path:
        """Thresholds chosen on the fold's inner subjects."""
        return self.folder / "thresholds.json"

    def predictions(self, epoch: int) -> Path:
        """Return `RUN/fold-00/predictions/epoch-0003.jsonl`."""
        return self.folder / "predictions" / f"epoch-{epoch:04d}.jsonl"

    def zeroed(self, token: str) -> Path:
        """Return `RUN/fold-00/zeroed/content.jsonl`: the last evaluation's answers with all tokens of a kind zeroed."""
        return self.folder / "zeroed" / f"{token}.jsonl"

    def stage(self, stage: str) -> Path:
        """Return `RUN/fold-00/stages/evidence.jsonl`: the last evaluation's answers of an earlier stage."""
        return self.folder / "stages" / f"{stage}.jsonl"

    def epochs(self) -> dict[int, Path]:
        """Return the prediction files that exist, by epoch."""
        files = sorted(self.predictions(0).parent.glob("epoch-*.jsonl"))
        return {int(match[1]): path for path in files if (match := _EPOCH.fullmatch(path.name))}


@dataclass(frozen=True, slots=True)
class RunPaths:
    """Paths of a run folder; nothing needs to exist.

    Attributes:
        root: the run folder.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration; it marks a folder as a run."""
        return self.root / CONFIG_FILE

    @property
    def folds_file(self) -> Path:
        """All folds of the run, also those that other jobs train."""
        return self.root / FOLDS_FILE

    @property
    def environment(self) -> Path:
        """Versions, machine, commit and the hash of the data."""
        return self.root / ENVIRONMENT_FILE

    @property
    def deepspeed(self) -> Path:
        """The resolved DeepSpeed configuration of a ZeRO run."""
        return self.root / "deepspeed.json"

    @property
    def stratification(self) -> Path:
        """How positives spread over folds and sides."""
        return self.root / "stratification.json"

    @property
    def tensorboard(self) -> Path:
        """Folder of the event files of all folds."""
        return self.root / "tensorboard"

    @property
    def overview(self) -> Path:
        """Folder of the event files that show all folds in one view."""
        return self.tensorboard / "all-folds"

    def baseline(self, name: str) -> Path:
        """Return the run folder of a baseline: `RUN/baselines/led_cnn`; a user's own network goes by its class."""
        return self.root / "baselines" / name.rpartition(":")[2]

    def baselines(self) -> dict[str, Path]:
        """Return the baselines that were begun on the same folds, by name; `RUN/baseline` is led_cnn of older runs."""
        found = {"led_cnn": self.root / "baseline"}
        found |= {path.name: path for path in sorted(self.root.glob("baselines/*"))}
        # Whatever is in a folder, it was begun: who reads it says what it lacks.
        return {name: path for name, path in found.items() if path.is_dir() and any(path.iterdir())}

    @property
    def corpora(self) -> Path:
        """Folder of synthetic corpora, as releases on disk."""
        return self.root / "corpus"

    @property
    def datasets(self) -> Path:
        """Folder of the datasets prepared from them."""
        return self.root / "dataset"

    @property
    def backbone(self) -> Path:
        """Folder of the tiny backbone."""
        return self.root / "backbone"

    @property
    def smollm2(self) -> Path:
        """Folder of SmolLM2, where a run has written it."""
        return self.root / "smollm2"

    def metrics(self, epoch: int | None = None) -> Path:
        """Return the metrics of the last epochs (None), or of one epoch."""
        return self.root / f"metrics{_suffix(epoch)}.json"

    def table(self, extension: str, epoch: int | None = None) -> Path:
        """Return the table as `md` or `csv`, of the last epochs (None) or of one epoch."""
        return self.root / f"table{_suffix(epoch)}.{extension}"

    def fold(self, fold: int) -> FoldPaths:
        """Return the paths of one fold."""
        return FoldPaths(self.root, fold)

    def folds(self) -> dict[int, FoldPaths]:
        """Return the folds that have a folder, by number."""
        if not self.root.is_dir():
            return {}
        numbers = (fold_number(path.name) for path in self.root.iterdir() if path.is_dir())
        return {number: self.fold(number) for number in sorted(n for n in numbers if n is not None)}

    def locks(self) -> list[Path]:
        """Return the lock files of all folds that exist."""
        return sorted(self.root.glob(".fold-*.lock"))

    def results(self) -> list[Path]:
        """Return what training and evaluation have written, without corpora, datasets and backbone."""
        written = [self.config, self.folds_file, self.deepspeed, self.stratification, self.tensorboard]
        written += [self.root / "baseline", self.root / "baselines"]
        for pattern in ("metrics*.json", "table*.md", "table*.csv"):
            written += self.root.glob(pattern)
        return [path for path in [*written, *(fold.folder for fold in self.folds().values())] if path.exists()]


def _suffix(epoch: int | None) -> str:
    return "" if epoch is None else f"-epoch-{epoch:04d}"
