"""Lists what limits the scores of a run and the answers of a model: drawn faces, an LLM of random weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from aullm_dist.config import Config, load_recorded
from aullm_dist.errors import UserError
from aullm_dist.evaluation.blocks import Block
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runs.recorded import find_recorded

SYNTHETIC = "the faces are synthetic: the scores show that the machinery works and say nothing about real faces"
RANDOM_LLM = "the LLM is the tiny one, whose weights are random: the scores say nothing about a pretrained LLM"
KNOWN_CAVEATS = (SYNTHETIC, RANDOM_LLM)
_SYNTHETIC_MARK, _RANDOM_MARK = "synthetic faces", "random LLM"
_MARKS = {SYNTHETIC: _SYNTHETIC_MARK, RANDOM_LLM: _RANDOM_MARK}
_OF_MODELS = {
    _SYNTHETIC_MARK: "the model was trained on synthetic faces: its answers say nothing about real faces",
    _RANDOM_MARK: "the model's LLM has random weights: its answers say nothing about a pretrained LLM",
}


def caveats(runs: Sequence[Path | str]) -> list[str]:
    """Return what holds of any of some runs, as sentences without a full stop; empty for a run that does not say."""
    found: list[str] = []
    for run in map(Path, runs):
        file = RunPaths(run).config
        if not file.exists():
            continue
        try:
            config = load_recorded(file)
        except UserError as error:
            found.append(f"what was trained is not known: {error}")
            continue
        found += [SYNTHETIC] if _is_drawn(run, config) else []
        found += [RANDOM_LLM] if _is_random(run, config) else []
    return list(dict.fromkeys(found))


def model_marks(*, synthetic: bool, random_llm: bool) -> list[str]:
    """Return what holds of a model in a word or two each, as a release records it."""
    return [mark for mark, holds in ((_SYNTHETIC_MARK, synthetic), (_RANDOM_MARK, random_llm)) if holds]


def model_caveats(marks: Sequence[str]) -> tuple[str, ...]:
    """Return what limits the answers of a model, as sentences without a full stop.

    Args:
        marks: from `model_marks`; one that a later version recorded stands for itself.
    """
    return tuple(_OF_MODELS.get(mark, f"recorded with the model: {mark}") for mark in marks)


def caveat_notes(sentences: Sequence[str]) -> tuple[str, ...]:
    """Return them as the notes of a table."""
    return tuple(f"Note: {sentence}." for sentence in sentences)


def marks_of(sentences: Sequence[str]) -> str:
    """Return what is known in a word or two each, for a title; empty where nothing is."""
    return ", ".join(mark for sentence, mark in _MARKS.items() if sentence in sentences)


def in_title(sentences: Sequence[str]) -> str:
    """Return the same in parentheses, to follow a title."""
    marks = marks_of(sentences)
    return f" ({marks})" if marks else ""


def marked(blocks: Sequence[Block], sentences: Sequence[str]) -> list[Block]:
    """Return tables whose titles name what is known: a table is copied without its notes."""
    known = {"title": in_title(sentences), "mark": marks_of(sentences)}
    return [
        dataclasses.replace(block, title=(block.title[0] + known["title"], *block.title[1:]), mark=known["mark"])
        for block in blocks
    ]


def _is_drawn(run: Path, config: Config) -> bool:
    if not config.data.train:
        return True
    from aullm_dist.data.records import is_synthetic, read_report

    for recorded in (*config.data.train, *config.data.test):
        folder = find_recorded(recorded, config.training.output, run.absolute() / "any")
        try:
            report = read_report(folder or Path(recorded))
        except UserError:
            continue  # a dataset that is gone says nothing
        if report and is_synthetic(report):
            return True
    return False


def _is_random(run: Path, config: Config) -> bool:
    from aullm_dist.llm.tiny import is_tiny

    llm = config.model.llm
    if llm == "none":
        return False
    return is_tiny(str(find_recorded(llm, config.training.output, run.absolute() / "any") or llm))
