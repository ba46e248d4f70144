"""Compares the arms of an ablation with the full model, on the same clips, subjects and seeds.

Runs are sorted by what they are: the arm from their configuration, the test side from their folds, the seed. An arm is
compared with the full model of the same test side and seed, on the same resamples of the subjects, and the differences
are averaged. Shapes: A action units, R resamples.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aullm_dist.config import Config, load_recorded
from aullm_dist.data.protocols import FoldPlan
from aullm_dist.errors import UserError
from aullm_dist.evaluation.bootstrap import interval, mean_defined, resample
from aullm_dist.evaluation.caveats import caveats
from aullm_dist.evaluation.compare import check_same_clips, scores_of
from aullm_dist.evaluation.evaluate import read_run, unfinished
from aullm_dist.evaluation.ladder import earlier_answers
from aullm_dist.evaluation.metrics import HEADLINE_THRESHOLD, logit_of
from aullm_dist.report.arms import FULL, NAMES, Arm, arm_of, name_of, other_differences
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runs.predictions import Pooled, PredictionFile

SCORES = ("f1_macro", "auc")


@dataclass(frozen=True, slots=True)
class ArmRun:
    """One trained run of an ablation.

    Attributes:
        path: the run folder.
        config: as it was trained.
        arm: what it leaves out.
        side: its test side, such as `casme2->samm` or `grouped casme2`.
        family: what sides are averaged over: the cross-domain pairs together, each other side alone.
        aus: AU numbers.
        rows: its pooled test clips.
        stages: the same clips as the earlier stages of an answer in stages left them; empty without stages.
    """

    path: Path
    config: Config
    arm: Arm
    side: str
    family: str
    aus: tuple[int, ...]
    rows: Pooled
    stages: Mapping[str, Pooled]

    @property
    def place(self) -> tuple[str, int]:
        """Test side and seed: what an arm and the full model must share to be paired."""
        return self.side, self.config.training.seed


def ablation(runs: Sequence[Path | str], *, bootstrap: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Compare the arms of an ablation with the full model.

    Args:
        runs: run folders of any arms, test sides and seeds; one that cannot be read or has no partner is named under
            `notes` and left out.
        bootstrap: resamples of subjects; 0 leaves the intervals out.
        seed: of the resampling.

    Returns:
        `families`: per family `sides`, `seeds`, `arms` with their scores and differences, and `ladder` with the scores
        of each stage of the arms that answer in stages, in fractions; `notes`.

    Raises:
        UserError: no run of the full model is among them, or nothing could be paired with it.
    """
    if bootstrap < 0 or seed < 0:
        raise UserError(f"bootstrap {bootstrap}, seed {seed}: both must be at least 0")
    notes: list[str] = []
    placed = _placed(_readable(runs, notes), notes)
    full = placed.pop(FULL, {})
    if not full:
        none = f"none of the {len(runs)} runs is a finished run of the full model; arms are compared with it"
        raise UserError("; ".join([none, *notes[:3]]))
    paired = {arm: _paired(full, found, notes) for arm, found in placed.items()}
    paired = {arm: found for arm, found in paired.items() if found}
    if not paired:
        raise UserError("; ".join(["no run could be paired with the full model of its test side and seed", *notes[:3]]))
    samples = _samples([*full.values(), *(run for found in paired.values() for run in found.values())], bootstrap, seed)
    order = [arm for arm in NAMES if arm in paired] + [arm for arm in paired if arm not in NAMES]
    families = {}
    for family in dict.fromkeys(run.family for run in full.values()):
        here = {place: run for place, run in full.items() if run.family == family}
        arms = {name_of(FULL): _own_scores(here)}
        ladder = {name_of(FULL): _stages(list(here.values()))}
        for arm in order:
            pairs = [(here[place], run) for place, run in paired[arm].items() if place in here]
            if pairs:
                arms[name_of(arm)] = _compared(pairs, samples)
                ladder[name_of(arm)] = _stages([run for _, run in pairs])
                if len(pairs) < len(here):
                    notes.append(f"{name_of(arm)}, {family}: {len(pairs)} of the {len(here)} runs of the full model")
        families[family] = {
            "sides": sorted({run.side for run in here.values()}),
            "seeds": sorted({run.config.training.seed for run in here.values()}),
            "arms": arms,
            "ladder": {name: stages for name, stages in ladder.items() if stages},
        }
    said = caveats([run.path for found in (full, *paired.values()) for run in found.values()])
    return {
        "unit": "fraction",
        "resamples": bootstrap,
        "seed": seed,
        "families": families,
        "notes": notes,
        "caveats": said,
    }


def problem_of(path: Path) -> str | None:
    """Return why a run cannot be compared, or None where it is finished in all folds."""
    try:
        return _problem(path, *read_run(path)[:2], _config(path))
    except UserError as error:
        return str(error)


def _config(path: Path) -> Config:
    file = RunPaths(path).config
    if not file.is_file():
        raise UserError(f"{path}: no {file.name}; give the folder of a run")
    return load_recorded(file)


def _problem(path: Path, plan: FoldPlan, files: Mapping[int, PredictionFile], config: Config) -> str | None:
    missing = [fold.name for fold in plan.folds if fold.test and fold.index not in files]
    if missing:
        return f"{path}: no predictions of {len(missing)} of {len(plan.folds)} folds, first {missing[0]}"
    notes = unfinished(files, plan, config.training)
    return f"{path}: {notes[0]}" if notes else None


def _readable(runs: Sequence[Path | str], notes: list[str]) -> Iterable[ArmRun]:
    for path in map(Path, dict.fromkeys(map(str, runs))):
        try:
            config, (plan, files, rows) = _config(path), read_run(path)
            if problem := _problem(path, plan, files, config):
                raise UserError(problem)
        except UserError as error:
            notes.append(f"left out, {error}")
            continue
        cross = plan.protocol == "cross"
        side = plan.folds[0].name if cross else f"{plan.protocol} {'+'.join(plan.corpora)}"
        stages = earlier_answers(path, files, rows)
        yield ArmRun(path, config, arm_of(config), side, "cross-domain" if cross else side, plan.aus, rows, stages)


def _placed(runs: Iterable[ArmRun], notes: list[str]) -> dict[Arm, dict[tuple[str, int], ArmRun]]:
    placed: dict[Arm, dict[tuple[str, int], ArmRun]] = defaultdict(dict)
    for run in runs:
        first = placed[run.arm].setdefault(run.place, run)
        if first is not run:
            notes.append(f"left out, {run.path}: the same arm, test side and seed as {first.path}")
    return placed


def _paired(
    full: dict[tuple[str, int], ArmRun], found: dict[tuple[str, int], ArmRun], notes: list[str]
) -> dict[tuple[str, int], ArmRun]:
    """Return the runs of an arm that have a full model to be compared with, equal in all but the arm."""
    kept = {}
    for place, run in found.items():
        if place not in full:
            notes.append(f"left out, {run.path}: no full model on {place[0]} with seed {place[1]}")
            continue
        other = full[place]
        try:
            if run.aus != other.aus:
                raise UserError(f"{run.path}: AUs {list(run.aus)}; {other.path} has {list(other.aus)}")
            check_same_clips(other.path, other.rows, run.path, run.rows)
            if differences := other_differences(other.config, run.config):
                raise UserError(f"{run.path}: differs from {other.path} in {', '.join(differences)} as well")
        except UserError as error:
            notes.append(f"left out, {error}")
            continue
        kept[place] = run
    return kept


def _samples(runs: Sequence[ArmRun], bootstrap: int, seed: int) -> dict[Path, dict[str, np.ndarray]] | None:
    """Return the mean scores `[R]` of each run; runs that test the same subjects share their resamples.

    Different sets of subjects get draws of their own, as they have nothing to do with each other.
    """
    if bootstrap == 0:
        return None
    sets = sorted({tuple(sorted(set(run.rows.subjects))) for run in runs})
    if any(len(names) < 2 for names in sets):
        return None
    samples = {}
    for run in runs:
        rows, own = run.rows, sets.index(tuple(sorted(set(run.rows.subjects))))
        predicted = rows.logits > logit_of(HEADLINE_THRESHOLD)
        drawn = resample(
            rows.labels, rows.logits, predicted, rows.subjects, resamples=bootstrap, seed=seed + 1_000_003 * own
        )
        assert drawn is not None, "there are resamples, and two subjects or more"
        samples[run.path] = {name: mean_defined(drawn[name]) for name in SCORES}
    return samples


def _mean_score(rows: Pooled, aus: Sequence[int], name: str) -> float:
    value = scores_of(rows, aus)["mean"][name]
    return float("nan") if value is None else value


def _own_scores(runs: dict[tuple[str, int], ArmRun]) -> dict[str, Any]:
    return {
        "runs": len(runs),
        **{name: {"score": _mean([_mean_score(run.rows, run.aus, name) for run in runs.values()])} for name in SCORES},
    }


def _stages(runs: Sequence[ArmRun]) -> dict[str, dict[str, float | None]]:
    """Return the mean scores of every stage, the answer last, or nothing where a run has no stages."""
    if not all(run.stages for run in runs):
        return {}
    answers = [{**run.stages, "deduction": run.rows} for run in runs]
    return {
        stage: {
            name: _mean([_mean_score(found[stage], run.aus, name) for found, run in zip(answers, runs, strict=True)])
            for name in SCORES
        }
        for stage in answers[0]
        if all(stage in found for found in answers)
    }


def _compared(
    pairs: Sequence[tuple[ArmRun, ArmRun]], samples: dict[Path, dict[str, np.ndarray]] | None
) -> dict[str, Any]:
    result: dict[str, Any] = {"runs": len(pairs)}
    for name in SCORES:
        changes = [_mean_score(run.rows, run.aus, name) - _mean_score(full.rows, full.aus, name) for full, run in pairs]
        spread = None
        if samples is not None:
            drawn = np.stack([samples[run.path][name] - samples[full.path][name] for full, run in pairs])
            spread = interval(mean_defined(drawn.T))
        groups: dict[str, list[Any]] = {
            "by_seed": [run.place[1] for _, run in pairs],
            "by_side": [run.place[0] for _, run in pairs],
        }
        result[name] = {
            "score": _mean([_mean_score(run.rows, run.aus, name) for _, run in pairs]),
            "difference": _mean(changes),
            "ci": spread,
            **{
                key: {
                    str(label): _mean([change for change, own in zip(changes, labels, strict=True) if own == label])
                    for label in sorted(set(labels))
                }
                for key, labels in groups.items()
            },
        }
    return result


def _mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else None
