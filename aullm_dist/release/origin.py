"""Collects facts on a checkpoint in addition to its tensors: its run, its thresholds, how its clips were made.

A checkpoint that was copied out of its run folder still loads; what only the run knows is then missing, and said to be.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aullm_dist.checkpoint.atomic import step_of
from aullm_dist.checkpoint.entries import Manifest
from aullm_dist.checkpoint.manifest import read_manifest
from aullm_dist.config import Config
from aullm_dist.data.protocols import FoldPlan, read_folds
from aullm_dist.data.records import is_synthetic, read_report
from aullm_dist.errors import UserError
from aullm_dist.evaluation.caveats import model_marks
from aullm_dist.evaluation.evaluate import THRESHOLD_POLICY
from aullm_dist.evaluation.metrics import HEADLINE_THRESHOLD, probability_of
from aullm_dist.evaluation.thresholds import choose_thresholds
from aullm_dist.llm.identity import BaseIdentity
from aullm_dist.llm.tiny import is_tiny
from aullm_dist.log import get_logger
from aullm_dist.runs.paths import RunPaths, fold_number
from aullm_dist.runs.predictions import pool, read_predictions
from aullm_dist.runs.recorded import find_recorded
from aullm_dist.training.trained import find_trained

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """From which probability on an AU counts as active."""

    values: Mapping[int, float]
    """Probability, 0 to 1, by AU number."""
    policy: str
    """How they were chosen, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preparation:
    """How the clips of the training corpora were prepared."""

    corpora: tuple[str, ...]
    crop: Mapping[str, Any] | None
    """`{"name": ...}` and whatever settings the preparation recorded with it; None where it is not known, or where the
    corpora were cropped in different ways."""
    folders: tuple[Path, ...]
    """The training datasets that are still there."""
    synthetic: bool
    """Whether a corpus among them is known to be drawn by `aullm-dist synthesize`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A checkpoint and what is known of it without loading its LLM."""

    folder: Path
    config: Config
    """As the run had it, but for where the LLM is."""
    manifest: Manifest
    aus: tuple[int, ...]
    home: "Home | None"
    preparation: Preparation
    thresholds: Thresholds

    @property
    def base(self) -> BaseIdentity:
        """The LLM of a checkpoint that has one."""
        assert self.manifest.base is not None, "the baseline has no LLM, and no release"
        return self.manifest.base


@dataclass(frozen=True, slots=True)
class Home:
    """The run and fold that a checkpoint lies in."""

    run: Path
    fold: int
    plan: FoldPlan


def find_origin(path: Path, llm: str | None) -> Origin:
    """Return what is known of a checkpoint.

    Args:
        path: a checkpoint, or a fold, of which the newest valid one is taken.
        llm: where its LLM is, None for where the run found it.

    Raises:
        UserError: there is no checkpoint, or what describes it cannot be read.
    """
    trained = find_trained(path, [] if llm is None else [f"model.llm={json.dumps(llm)}"], processes=1)
    config = trained.config
    home = find_home(trained.folder)
    return Origin(
        folder=trained.folder,
        config=config,
        manifest=read_manifest(trained.folder),
        aus=trained.aus,
        home=home,
        preparation=find_preparation(config, home),
        thresholds=choose_release_thresholds(trained.folder, trained.aus, home),
    )


def find_home(checkpoint: Path) -> Home | None:
    """Return where `RUN/fold-NN/checkpoints/step-N` lies, None for a checkpoint that was copied out of its run."""
    fold = checkpoint.resolve().parent.parent
    number, paths = fold_number(fold.name), RunPaths(fold.parent)
    if number is None or not paths.folds_file.is_file():
        return None
    plan = read_folds(paths.folds_file)
    return Home(fold.parent, number, plan) if number < len(plan.folds) else None


def choose_release_thresholds(checkpoint: Path, aus: Sequence[int], home: Home | None) -> Thresholds:
    """Return the thresholds of one checkpoint: chosen on its fold's inner subjects, else 0.5 and why.

    Only answers that this very checkpoint gave count: those of another step are another model's.
    """
    fixed = dict.fromkeys(aus, HEADLINE_THRESHOLD)
    rule = f"fixed {HEADLINE_THRESHOLD} on sigmoid(logit)"
    if home is None:
        return Thresholds(values=fixed, policy=f"{rule}: the checkpoint lies in no run folder")
    step = step_of(checkpoint.name)
    files = (
        read_predictions(path) for _, path in sorted(RunPaths(home.run).fold(home.fold).epochs().items(), reverse=True)
    )
    match = next((file for file in files if file.step == step and file.aus == tuple(aus)), None)
    if match is None:
        return Thresholds(values=fixed, policy=f"{rule}: no stored answers of step {step} to choose by")
    rows = [row for row in match.rows if row.role == "inner"]
    if not rows:
        return Thresholds(values=fixed, policy=f"{rule}: the fold has no inner held-out subjects")
    inner = pool(rows)
    chosen = probability_of(choose_thresholds(inner.labels, inner.logits))
    return Thresholds(
        values=dict(zip(aus, chosen.tolist(), strict=True)),
        policy=f"{THRESHOLD_POLICY} ({len(rows)} clips, subjects: {len(set(inner.subjects))})",
    )


def find_preparation(config: Config, home: Home | None) -> Preparation:
    """Return how the training clips were prepared: from the checkpoint, and from the reports that are still there."""
    folders = [_now(folder, config, home) for folder in config.data.train]
    if not folders and home is not None:
        # A synthetic corpus lies below the run that generated it.
        folders = sorted(RunPaths(home.run).datasets.glob("*"))
    found = {folder: report for folder in folders if (report := _read_report(folder)) is not None}
    crops: list[Mapping[str, Any] | None]
    crops = [{"name": name} for name in config.data.crops] or [_crop_of(report) for report in found.values()]
    known = bool(config.data.crops) or (bool(found) and len(found) == len(folders))
    same = known and all(crop == crops[0] for crop in crops)
    return Preparation(
        corpora=_training_corpora(list(found.values()), home),
        crop=crops[0] if same else None,
        folders=tuple(found),
        synthetic=not config.data.train or any(map(is_synthetic, found.values())),
    )


def find_marks(config: Config, preparation: Preparation) -> list[str]:
    """Return what is known to limit the answers of a checkpoint (`evaluation.caveats.model_marks`).

    Args:
        config: with the LLM where it is.
        preparation: of the clips that it was trained on.
    """
    return model_marks(synthetic=preparation.synthetic, random_llm=is_tiny(config.model.llm))


def _now(folder: str, config: Config, home: Home | None) -> Path:
    found = find_recorded(folder, config.training.output, home.run) if home is not None else None
    return found or Path(folder)


def _training_corpora(reports: Sequence[Mapping[str, Any]], home: Home | None) -> tuple[str, ...]:
    """A run knows which clips this fold trained on; without it, the datasets say what they hold."""
    if home is not None:
        fold = home.plan.folds[home.fold]
        return tuple(sorted({sample_id.partition("/")[0] for sample_id in fold.train}))
    return tuple(sorted({str(report["corpus"]) for report in reports}))


def _read_report(folder: Path) -> dict[str, Any] | None:
    try:
        return read_report(folder)
    except UserError as error:
        logger.warning("how its clips were prepared is not known: %s", error)
        return None


def _crop_of(report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    crop = report.get("crop")
    return {"name": crop} if isinstance(crop, str) else crop
