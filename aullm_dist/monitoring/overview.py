"""Shows all folds of a run in one view: pooled scores as folds come in, and the run's hyperparameters with them.

It is rebuilt from the predictions on disk whenever a fold ends, so that it does not matter which job trained which
fold, in which order, or how often a run was resumed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from aullm_dist.config import Config, to_dict
from aullm_dist.data.protocols import read_folds
from aullm_dist.errors import UserError
from aullm_dist.evaluation.caveats import caveat_notes, caveats
from aullm_dist.evaluation.metrics import summarise
from aullm_dist.evaluation.scores import Metric, Scores
from aullm_dist.log import get_logger
from aullm_dist.monitoring.writer import Monitor
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runs.predictions import StoredPrediction, find_predictions, pool, read_predictions

logger = get_logger(__name__)

_KEPT = 4
"""Older files that stay: a TensorBoard that is open must find the file that it was reading, or it never moves on."""
_METRICS: tuple[Metric, ...] = ("f1_macro", "f1_binary", "auc")


def write_overview(run: Path, config: Config) -> None:
    """Write the view over the folds that have answers; whatever is wrong with it is a warning and no more.

    The main process alone calls it.

    Args:
        run: the run folder.
        config: the run's configuration.
    """
    paths = RunPaths(run)
    try:
        answers = _answers(run)
        older = sorted(paths.overview.glob("events.out.tfevents.*"))
        monitor = Monitor(paths.overview, active=True, purge_step=0)
        _write(monitor, config, answers, len(read_folds(paths.folds_file).folds), caveat_notes(caveats([run])))
        if monitor.close():
            for path in older[:-_KEPT]:
                path.unlink(missing_ok=True)
    except (UserError, OSError) as error:
        logger.warning("TensorBoard: the view over all folds is not written: %s", error)


def _answers(run: Path) -> dict[int, tuple[tuple[int, ...], list[StoredPrediction]]]:
    """Return AUs and answers of each fold on its test clips, or on its inner ones where nothing is tested."""
    found = {}
    for fold, path in find_predictions(run).items():
        file = read_predictions(path)
        role = "test" if any(row.role == "test" for row in file.rows) else "inner"
        found[fold] = (file.aus, [row for row in file.rows if row.role == role])
    return found


def _write(
    monitor: Monitor,
    config: Config,
    answers: Mapping[int, tuple[tuple[int, ...], list[StoredPrediction]]],
    num_folds: int,
    known: Sequence[str],
) -> None:
    lines = ["| fold | clips | f1_macro | f1_binary | auc |", "|---|---:|---:|---:|---:|"]
    rows: dict[str, StoredPrediction] = {}
    summary: Scores | None = None
    for place, (fold, (aus, own)) in enumerate(sorted(answers.items()), start=1):
        alone = _score(own, aus)["mean"]
        # Inner clips of a run without a test side may be held out in several folds; the last answer stands.
        rows |= {row.sample_id: row for row in own}
        summary = _score(list(rows.values()), aus)
        monitor.groups(
            {
                "pooled": {name: summary["mean"][name] for name in _METRICS},
                "fold_alone": {name: alone[name] for name in _METRICS},
                "pooled_f1_macro": {au: row["f1_macro"] for au, row in summary["per_au"].items()},
                "progress": {"folds_done": place, "folds_in_all": num_folds},
            },
            place,
        )
        cells = (_percent(alone[name]) for name in _METRICS)
        lines.append(f"| {fold} | {len(own)} | {' | '.join(cells)} |")
    if summary:
        cells = (_percent(summary["mean"][name]) for name in _METRICS)
        lines.append(f"| pooled | {len(rows)} | {' | '.join(cells)} |")
        monitor.hyperparameters(flat_settings(config), {n: summary["mean"][n] for n in _METRICS}, len(answers))
    note = (
        "\n\nThe steps of this run count folds. The score of one fold is that of a few clips: it is here to find a "
        "fold that went wrong. What counts is pooled."
    )
    note += "".join(f"\n\n**{text}**" for text in known)
    monitor.text("folds", "\n".join(lines) + note, len(answers))


def flat_settings(config: Config) -> dict[str, str | float | bool]:
    """Return the settings that may change what is trained, as `group.key`; lists as text, paths left out."""
    flat: dict[str, str | float | bool] = {}
    for group in ("model", "data", "counterfactual", "training"):
        for key, value in to_dict(config)[group].items():
            if isinstance(value, list):
                value = ", ".join(map(str, value))
            if isinstance(value, str | int | float | bool) and (group, key) != ("training", "output"):
                flat[f"{group}.{key}"] = value
    return flat


def _score(rows: list[StoredPrediction], aus: Sequence[int]) -> Scores:
    pooled = pool(rows)
    return summarise((pooled.labels, pooled.logits), aus)


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"
