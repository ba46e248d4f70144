"""Formats the scores of a release for the Hugging Face Hub: the card's model index, and `.eval_results`."""

import datetime
from collections.abc import Iterator
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml

from aullm_dist.evaluation.caveats import RANDOM_LLM, SYNTHETIC
from aullm_dist.evaluation.scores import Metric, Metrics
from aullm_dist.evaluation.tables import METRICS
from aullm_dist.release.facts import corpus_title

TASK = "video-classification"
METRIC_TYPES = {"f1_binary": "f1", "f1_macro": "f1", "auc": "roc_auc"}


def model_index(metrics: Metrics, synthetic: bool) -> list[EvalResult]:
    """Return the means over AUs in the form of the Hub's model index, in fractions."""
    return [
        EvalResult(
            task_type=TASK,
            task_name="AU detection in micro-expression clips",
            dataset_type=_corpora_id(metrics),
            dataset_name=_tested_on(metrics, synthetic),
            metric_type=METRIC_TYPES[name],
            metric_name=f"{name}, mean over {len(metrics['aus'])} AUs, threshold {metrics['threshold']}",
            metric_value=value,
            metric_args={"floor": floor, "ci95": interval},
        )
        for name, value, floor, interval in _means(metrics)
    ]


def eval_results_text(
    metrics: Metrics, synthetic: bool, *, benchmark: str | None, date: datetime.date, others: bool = False
) -> str:
    """Return the same means as the entries of a file in `.eval_results/`, the newer form of the Hub.

    Args:
        metrics: of the run.
        synthetic: whether the faces that the model was trained on are drawn.
        benchmark: id of the Hub's dataset whose leaderboard shows the entries; None names the corpora, of which the Hub
            has no dataset, and no leaderboard shows the entries then.
        date: of the evaluation.
        others: whether the scores are those of another run's models.
    """
    entries = []
    for name, value, floor, interval in _means(metrics):
        notes = [
            f"mean over {len(metrics['aus'])} AUs, threshold {metrics['threshold']}",
            _tested_on(metrics, synthetic),
        ]
        if floor is not None:
            notes.append(f"floor {floor}")
        if interval is not None:
            notes.append(f"95% CI {interval[0]} to {interval[1]}")
        if others:
            notes.append("scores of the models of another run")
        entries.append(
            EvalResultEntry(
                dataset_id=benchmark or _corpora_id(metrics),
                task_id=name,
                value=value,
                date=date.isoformat(),
                notes="; ".join(notes),
            )
        )
    content: list[dict[str, Any]] = eval_result_entries_to_yaml(entries)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def _means(metrics: Metrics) -> Iterator[tuple[Metric, float, float | None, list[float] | None]]:
    """Yield name, mean, floor and interval of each score that there is, rounded."""
    for name in METRICS:
        value, floor = metrics["mean"][name], metrics["floors"][name]
        interval = metrics["ci"]["mean"][name] if metrics["ci"] else None
        if value is not None:
            rounded = None if interval is None else [round(end, 4) for end in interval]
            yield name, round(value, 4), None if floor is None else round(floor, 4), rounded


def _corpora_id(metrics: Metrics) -> str:
    return "-".join(metrics["corpora"])


def _tested_on(metrics: Metrics, synthetic: bool) -> str:
    where = metrics["direction"] or ", ".join(map(corpus_title, metrics["corpora"]))
    # Scores may come from another run than the model's own.
    drawn = "drawn faces in the layout of " if synthetic or SYNTHETIC in metrics["caveats"] else ""
    llm = ", an LLM of random weights" if RANDOM_LLM in metrics["caveats"] else ""
    return f"{drawn}{where}, held-out subjects of protocol {metrics['protocol']}{llm}"
