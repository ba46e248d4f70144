"""Stores the predictions of one fold and epoch as JSON lines, always joined by sample id and never by position.

A file starts with a header `{"aus", "epoch", "step"}` and holds one object per clip. `StoredPrediction` lists
the keys.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from aullm_dist.errors import UserError
from aullm_dist.files import read_text, write_text
from aullm_dist.runs.paths import RunPaths

ROLES = ("test", "inner")


Role = Literal["test", "inner"]
"""On which side of a fold a clip was held out."""


@dataclass(frozen=True, slots=True)
class StoredPrediction:
    """One clip's labels and logits, each in the order of the file's AUs."""

    sample_id: str
    subject: str
    corpus: str
    fold: int
    role: Role
    labels: tuple[int, ...]
    logits: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class PredictionFile:
    """A whole file: AU numbers in column order, where training stood, and the clips."""

    path: Path
    aus: tuple[int, ...]
    epoch: int
    step: int
    rows: tuple[StoredPrediction, ...]


@dataclass(frozen=True, slots=True)
class Pooled:
    """Clips of any folds, ordered by sample id: names and folds of n clips, labels and logits `[n, A]`."""

    sample_ids: tuple[str, ...]
    subjects: tuple[str, ...]
    corpora: tuple[str, ...]
    folds: tuple[int, ...]
    labels: np.ndarray
    logits: np.ndarray


def write_predictions(
    path: Path, rows: Iterable[StoredPrediction], *, aus: Sequence[int], epoch: int, step: int
) -> None:
    """Write one file, whole or not at all.

    Raises:
        UserError: If a logit is not finite, which means that training has diverged.
    """
    lines = [json.dumps({"aus": list(aus), "epoch": epoch, "step": step})]
    for row in rows:
        assert len(row.labels) == len(row.logits) == len(aus), f"{row.sample_id}: {len(row.logits)} logits"
        if not all(map(math.isfinite, row.logits)):
            raise UserError(f"{path}: logits of {row.sample_id} are not finite; the training has diverged")
        lines.append(json.dumps(asdict(row)))
    write_text(path, "\n".join(lines) + "\n")


def read_predictions(path: Path) -> PredictionFile:
    """Read and check one file.

    Raises:
        UserError: If the file is missing or malformed, naming the line and the key.
    """
    lines = read_text(path).splitlines()
    if not lines:
        raise UserError(f"{path}: empty; the first line must be a header with aus, epoch and step")
    header = _parse_line(path, 1, lines[0], {"aus": list, "epoch": int, "step": int})
    aus = tuple(header["aus"])
    if not aus or not all(_is_int(au) for au in aus) or len(set(aus)) != len(aus):
        raise UserError(f"{path}: line 1: key aus: {header['aus']}; must list different AU numbers")
    rows = tuple(_parse_row(path, number, line, aus) for number, line in enumerate(lines[1:], start=2) if line.strip())
    return PredictionFile(path, aus, header["epoch"], header["step"], rows)


def find_predictions(run_dir: Path, epoch: int | None = None) -> dict[int, Path]:
    """Return each fold's file of `epoch`, or of its highest epoch if None.

    Raises:
        UserError: If the folder or any predictions are missing, or a fold has predictions but not of `epoch`.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run folder")
    found: dict[int, Path] = {}
    for number, fold in RunPaths(run_dir).folds().items():
        epochs = fold.epochs()
        if not epochs:
            continue
        wanted = max(epochs) if epoch is None else epoch
        if wanted not in epochs:
            have = ", ".join(map(str, sorted(epochs)))
            raise UserError(f"{fold.folder}/predictions: no epoch {wanted}; allowed are last and {have}")
        found[number] = epochs[wanted]
    if not found:
        raise UserError(f"{run_dir}: no fold-*/predictions/epoch-*.jsonl; train first, or name the run folder itself")
    return found


def pool(rows: Iterable[StoredPrediction]) -> Pooled:
    """Stack rows, ordered by sample id, so that neither file order nor fold order can matter.

    Raises:
        UserError: If a sample id occurs twice.
    """
    ordered = sorted(rows, key=lambda row: row.sample_id)
    for first, second in zip(ordered, ordered[1:], strict=False):
        if first.sample_id == second.sample_id:
            raise UserError(f"clip {first.sample_id} is predicted twice, in folds {first.fold} and {second.fold}")
    return Pooled(
        sample_ids=tuple(row.sample_id for row in ordered),
        subjects=tuple(row.subject for row in ordered),
        corpora=tuple(row.corpus for row in ordered),
        folds=tuple(row.fold for row in ordered),
        labels=np.array([row.labels for row in ordered], dtype=np.int64),
        logits=np.array([row.logits for row in ordered], dtype=np.float64),
    )


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse_line(path: Path, number: int, line: str, keys: dict[str, type]) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: line {number}: not JSON ({error})") from None
    for key, kind in keys.items():
        if not isinstance(record, dict) or key not in record:
            raise UserError(f"{path}: line {number}: key {key} is missing; needed are {', '.join(keys)}")
        if not isinstance(record[key], kind) or isinstance(record[key], bool):
            raise UserError(f"{path}: line {number}: key {key}: {record[key]!r} is not of type {kind.__name__}")
    return record


_ROW_KEYS = {"sample_id": str, "subject": str, "corpus": str, "fold": int, "role": str, "labels": list, "logits": list}


def _parse_row(path: Path, number: int, line: str, aus: tuple[int, ...]) -> StoredPrediction:
    record = _parse_line(path, number, line, _ROW_KEYS)
    where = f"{path}: line {number} ({record['sample_id']})"
    if record["role"] not in ROLES:
        raise UserError(f"{where}: role {record['role']!r}; allowed are {', '.join(ROLES)}")
    for key in ("labels", "logits"):
        if len(record[key]) != len(aus):
            raise UserError(f"{where}: key {key} has {len(record[key])} values for {len(aus)} AUs")
    for au, label, logit in zip(aus, record["labels"], record["logits"], strict=True):
        if not _is_int(label) or label not in (0, 1):
            raise UserError(f"{where}: label of AU{au} is {label!r}; allowed are 0 and 1")
        if isinstance(logit, bool) or not isinstance(logit, int | float) or not math.isfinite(logit):
            raise UserError(f"{where}: logit of AU{au} is {logit!r}; it must be a finite number")
    values = {key: record[key] for key in _ROW_KEYS}
    return StoredPrediction(
        **{**values, "labels": tuple(record["labels"]), "logits": tuple(map(float, record["logits"]))}
    )
