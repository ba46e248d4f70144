"""Writes the model card and CITATION.cff of a release from what its run recorded."""

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from aullm_dist.evaluation.tables import render
from aullm_dist.facs import au_name
from aullm_dist.release.facts import Base, Scores, TrainingClips, corpus_licence, corpus_title
from aullm_dist.release.hub_results import METRIC_TYPES, TASK, model_index
from aullm_dist.release.layout import Format
from aullm_dist.release.origin import Origin

_PAPER = {
    "type": "article",
    "title": "AULLM++: Structural Reasoning with Large Language Models for Micro-Expression Recognition",
    "authors": [
        {"family-names": family, "given-names": given}
        for family, given in (
            ("Liu", "Zhishu"), ("Yuan", "Kaishen"), ("Zhao", "Bo"), ("Ma", "Hui"), ("Yu", "Zitong"),
        )
    ],
    "year": 2026,
    "url": "https://arxiv.org/abs/2603.08387",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class CardFacts:
    """What the card says of the run."""

    format: Format
    base: Base
    counts: Sequence[TrainingClips]
    """Training clips per corpus; empty where they are not known."""
    scores: Scores
    scores_preface: str
    """Which models these are the scores of."""
    training: Mapping[str, str]
    """Rows of the table of training."""
    commit: str | None
    """Of aullm-dist at the run, None where it is not known."""


def card_text(
    origin: Origin, facts: CardFacts, *, folder: str, merge_note: str | None = None, difference: float | None = None
) -> str:
    """Return the model card: metadata of the Hugging Face Hub, then text for people.

    Args:
        origin: the checkpoint.
        facts: of its run.
        folder: name of the release folder, for the examples.
        merge_note: what the merge says of itself.
        difference: largest difference of a logit between the merged and the trained model on the probe clips.
    """
    base, scores, aus = facts.base, facts.scores, origin.aus
    corpora, synthetic = origin.preparation.corpora, origin.preparation.synthetic
    config, thresholds = origin.config, origin.thresholds
    title = release_title(origin, base)
    data = ModelCardData(
        model_name=title,
        library_name="aullm-dist",
        pipeline_tag=TASK,
        license="other",
        license_name="base-and-corpora",
        license_link="README.md",
        tags=["facial-action-units", "facs", "micro-expressions", "aullm", facts.format],
        base_model=base.hub_name,
        base_model_relation=_relation(facts.format) if base.hub_name else None,
        metrics=sorted(set(METRIC_TYPES.values())) if scores.metrics else None,
        eval_results=model_index(scores.metrics, synthetic) if scores.metrics else None,
        ignore_metadata_errors=False,
    )
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string(files("aullm_dist.release").joinpath("card.md.jinja").read_text("utf-8"))
    text = template.render(
        title=title,
        folder=folder,
        format=facts.format,
        base=base,
        merge_note=merge_note,
        difference=None if difference is None else f"{difference:.1e}",
        synthetic=synthetic,
        num_frames=config.data.num_frames,
        size=config.data.size,
        crop=_crop_text(origin.preparation.crop),
        thresholds=_table(("AU", "threshold"), [(au_name(au), f"{thresholds.values[au]:.3f}") for au in aus]),
        threshold_policy=thresholds.policy,
        training=_table(("", ""), [("base LLM", base.title), *facts.training.items()]),
        counts=_counts_table(facts.counts, aus),
        corpora=", ".join(map(corpus_title, corpora)),
        tables=render(scores.metrics, "markdown").rstrip() if scores.metrics else "",
        scores_preface=facts.scores_preface,
        scores_missing=scores.missing,
        people=_people(facts.counts),
        base_licence=base.licence or "not recorded; see its makers",
        corpus_licences=[] if synthetic else [corpus_licence(name) for name in corpora],
        versions=", ".join(f"{name} {number}" for name, number in origin.manifest.versions.items()),
        commit=f"Commit {facts.commit}." if facts.commit else "",
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def release_title(origin: Origin, base: Base) -> str:
    """Return what the release is called: `AULLM++ on Qwen3-8B, CASME II`."""
    corpora = ", ".join(map(corpus_title, origin.preparation.corpora)) or "unknown corpora"
    drawn = "drawn faces like " if origin.preparation.synthetic else ""
    return f"AULLM++ on {base.title.rpartition('/')[2]}, {drawn}{corpora}"


def citation_text(title: str, base: Base, corpora: Sequence[str], authors: Sequence[str], date: datetime.date) -> str:
    """Return CITATION.cff (Citation File Format 1.2.0).

    Args:
        title: of the release.
        base: the LLM.
        corpora: names of the corpora.
        authors: names of people or groups; empty names nobody, as nothing here knows who they are.
        date: of the release.
    """
    also = ", ".join([base.title, *map(corpus_title, corpora)])
    content = {
        "cff-version": "1.2.0",
        "message": f"If you use this release, please cite it, the paper of AULLM++, and what it stands on: {also}.",
        "type": "software",
        "title": title,
        "authors": [{"name": name} for name in authors or ["The authors of this release"]],
        "date-released": date,
        "keywords": ["micro-expressions", "facial action units", "FACS"],
        "references": [_PAPER],
    }
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120)


def _relation(format: Format) -> str:
    return "adapter" if format == "adapter" else "finetune"


def _crop_text(crop: Mapping[str, Any] | None) -> str:
    if crop is None:
        return "not recorded, or not the same for all corpora"
    settings = ", ".join(f"{key} {value}" for key, value in crop.items() if key != "name")
    return f"`{crop.get('name', 'none')}`" + (f" ({settings})" if settings else "")


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, its columns but the first to the right where the header names them."""
    rule = ["---", *("---:" if name else "---" for name in header[1:])]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def _counts_table(counts: Sequence[TrainingClips], aus: Sequence[int]) -> str:
    header = ("corpus", "clips", "subjects", *(f"AU{au}" for au in aus))
    rows = [
        (corpus_title(row.corpus), *map(str, (row.clips, row.subjects, *(row.positives[au] for au in aus))))
        for row in counts
    ]
    return _table(header, rows) if rows else ""


def _people(counts: Sequence[TrainingClips]) -> str:
    if not counts:
        return "The corpora of this field hold some hundred clips of a few dozen people."
    return (
        f"It was trained on {sum(row.clips for row in counts)} clips of {sum(row.subjects for row in counts)} people."
    )
