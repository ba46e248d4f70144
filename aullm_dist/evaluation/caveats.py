"""Lists what limits the scores of a run, to be shown before its numbers: drawn faces, an LLM of random weights."""

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
_MARKS = {SYNTHETIC: "synthetic faces", RANDOM_LLM: "random LLM"}


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


def caveat_notes(sentences: Sequence[str]) -> tuple[str, ...]:
    """Return them as the notes of a table."""
    return tuple(f"Note: {sentence}." for sentence in sentences)


def marked(blocks: Sequence[Block], sentences: Sequence[str]) -> list[Block]:
    """Return tables whose titles name what is known, in a word or two: a table is copied without its notes."""
    marks = ", ".join(mark for sentence, mark in _MARKS.items() if sentence in sentences)
    if not marks:
        return list(blocks)
    return [dataclasses.replace(block, title=(f"{block.title[0]} ({marks})", *block.title[1:])) for block in blocks]


def _is_drawn(run: Path, config: Config) -> bool:
    if not config.data.train:
        return True
    # The generator's own constants; what it imports is not wanted here.
    from aullm_dist.data.records import read_report
    from aullm_dist.data.synthetic.layouts import SPEC_FILE

    for recorded in (*config.data.train, *config.data.test):
        folder = find_recorded(recorded, config.training.output, run.absolute() / "any")
        try:
            report = read_report(folder or Path(recorded))
        except UserError:
            continue  # a dataset that is gone says nothing
        if report and "root" in report and (Path(report["root"]) / SPEC_FILE).is_file():
            return True
    return False


def _is_random(run: Path, config: Config) -> bool:
    from aullm_dist.llm.tiny import RECIPE_FILE

    llm = config.model.llm
    if llm in ("tiny", "none"):
        return llm == "tiny"
    folder = find_recorded(llm, config.training.output, run.absolute() / "any")
    return folder is not None and (folder / RECIPE_FILE).is_file()
