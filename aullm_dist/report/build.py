"""Builds a report of one or several runs: gathers the sections, then writes the folder, whole or not at all."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from aullm_dist import __version__
from aullm_dist.config import load_recorded, to_dict
from aullm_dist.data.protocols import read_folds
from aullm_dist.errors import UserError
from aullm_dist.evaluation.caveats import caveats, marks_of
from aullm_dist.evaluation.evaluate import read_run, unfinished
from aullm_dist.files import is_new_or_empty, read_json, staged_folder
from aullm_dist.log import get_logger
from aullm_dist.report import reasons, results, space, training_curves
from aullm_dist.report.model_views import Models
from aullm_dist.report.page import Part, write_page
from aullm_dist.report.sections import Gallery, Listing, Section, attempted
from aullm_dist.runs.paths import RunPaths
from aullm_dist.versions import library_versions

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Options:
    """How a report is made.

    Attributes:
        clips: example clips whose frames are shown; 0 shows none.
        models: whether checkpoints are loaded; without, features, evidence and graph are left out.
        bootstrap: resamples of subjects.
        seed: of t-SNE, resampling and the draw of clips.
    """

    clips: int = 3
    models: bool = True
    bootstrap: int = 1000
    seed: int = 0


def build_report(runs: Sequence[Path], out: Path, models: Models, options: Options = Options()) -> list[str]:
    """Write a folder with `index.html` and `figures/`, which opens from disk and loads nothing from anywhere else.

    Args:
        runs: run folders, finished or not.
        out: folder to write; new or empty.
        models: loads checkpoints.
        options: how the report is made.

    Returns:
        What is missing from it, one sentence each.

    Raises:
        UserError: a run folder does not exist, or `out` is in use or cannot be written.
    """
    for run in runs:
        if not run.is_dir():
            raise UserError(f"{run}: no such run folder")
    if len({os.path.realpath(run) for run in runs}) < len(runs):
        raise UserError("a run is given twice; give each once")
    if not is_new_or_empty(out):
        raise UserError(f"--out {out}: is not an empty folder; give a new one")
    names = _names(runs)
    try:
        with staged_folder(out, _publish) as folder:
            parts = []
            if len(runs) > 1:
                parts.append(Part("All runs", "runs", _together(names, folder, options)))
            for number, (name, run) in enumerate(names, start=1):
                logger.info("Report of %s", name)
                gallery = Gallery(folder, f"run{number}-" if len(runs) > 1 else "", marks_of(caveats([run])))
                parts.append(Part(name, f"run-{number}", _run_sections(run, name, gallery, models, options)))
            versions = {"aullm_dist": __version__, **library_versions()}
            write_page(folder, parts, [name for name, _ in names], versions, caveats(runs))
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); give a writable folder") from error
    said = [f"{part.title}: {text}" for part in parts for section in part.sections for text in section.missing]
    return list(dict.fromkeys(said))


def _publish(staging: Path, target: Path) -> None:
    os.replace(staging, target)


def _names(runs: Sequence[Path]) -> list[tuple[str, Path]]:
    """Name runs by their folder, and by as much of the path as tells them apart."""
    parts = [run.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-count:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return list(zip(names, runs, strict=True))


def _together(names: Sequence[tuple[str, Path]], folder: Path, options: Options) -> list[Section]:
    how = (options.bootstrap, options.seed)
    sections = [attempted(Section("Scores"), lambda section: results.overview(section, list(names), *how))]
    first_name, first = names[0]
    for number, (name, run) in enumerate(names[1:], start=2):
        gallery = Gallery(folder, f"run{number}-to-run1-", marks_of(caveats([first, run])))
        title = f"{name} minus {first_name}"
        fill = partial(
            results.differences, gallery=gallery, pair=(first, run), names=(first_name, name),
            bootstrap=options.bootstrap, seed=options.seed,
        )  # fmt: skip
        sections.append(attempted(Section(title), fill))
    return sections


def _run_sections(run: Path, name: str, gallery: Gallery, models: Models, options: Options) -> list[Section]:
    how = (options.bootstrap, options.seed)
    sections = [
        attempted(Section("State of the run"), partial(_state, run=run)),
        attempted(
            Section("Results"),
            lambda section: results.methods(section, run, _model_name(run)),
            lambda section: results.tables(section, run, *how),
        ),
    ]
    baselines = RunPaths(run).baselines()
    for name, folder in baselines.items():
        fill = partial(
            results.differences, gallery=gallery, pair=(folder, run), names=(f"no LLM ({name})", _model_name(run)),
            bootstrap=options.bootstrap, seed=options.seed,
        )  # fmt: skip
        sections.append(attempted(Section(f"Difference to the no-LLM baseline {name}"), fill))
    # One of them shows its features next to the model's.
    baseline = next(iter(baselines.items()), None)
    fill = partial(training_curves.curves, gallery=gallery, run=run)
    sections.append(attempted(Section("Training curves"), fill))
    if options.models:
        sections += _model_sections(run, baseline, gallery, models, options)
    sections.append(
        attempted(Section("Settings and versions"), partial(_settings, run=run), partial(_environment, run=run))
    )
    return sections


def _model_name(run: Path) -> str:
    """Return what a run trains, for the rows of its tables; a run that does not say counts as the model."""
    network = _network(run)
    return f"no LLM ({network})" if network else "AULLM++"


def _network(run: Path) -> str:
    """Return the network of a run without an LLM; empty with an LLM, and where the run does not say."""
    try:
        model = load_recorded(RunPaths(run).config).model
    except UserError:
        return ""
    return model.network if model.llm == "none" else ""


def _model_sections(
    run: Path, baseline: tuple[str, Path] | None, gallery: Gallery, models: Models, options: Options
) -> list[Section]:
    how = (options.bootstrap, options.seed)
    features = Section("Features of the corpora")
    found: dict[str, Any] = {}  # `fold`, `clips`, `store` and `baseline`, as far as they could be read
    network = baseline[0] if baseline else _network(run)

    def load_model(section: Section) -> None:
        fold = models.fold_of(run)
        clips, store = models.explain(run, fold)
        found.update(fold=fold, clips=clips, store=store)
        where = found["clips"].checkpoint.relative_to(run).as_posix()
        section.paragraphs.append(
            f"From {where} (fold {fold.index}, {fold.name}), over {len(found['clips'].sample_ids)} clips. Other folds "
            "have models of their own; --fold chooses one."
        )

    def load_baseline(section: Section) -> None:
        if baseline is not None and found:
            found["baseline"] = models.explain(baseline[1], found["fold"], found["store"])[0]

    attempted(features, load_model, load_baseline)
    if "clips" not in found:
        return [features]
    clips, store, fold = found["clips"], found["store"], found["fold"]
    if "baseline" not in found and "hidden" in clips.steps:
        features.missing.append("no no-LLM baseline in this run; train one with training.baseline=true")
    attempted(features, lambda section: space.corpora(section, gallery, clips, found.get("baseline"), network, *how))
    sections = [
        features,
        attempted(Section("Feature evolution"), lambda section: space.evolution(section, gallery, clips, *how)),
        attempted(Section("AU graph"), lambda section: reasons.graph(section, gallery, clips)),
    ]
    if options.clips:
        draw = partial(
            reasons.evidence, gallery=gallery, clips=clips, store=store, fold=fold, count=options.clips,
            seed=options.seed,
        )  # fmt: skip
        sections.append(attempted(Section("Evidence on example clips"), draw))
    return sections


def _state(section: Section, run: Path) -> None:
    """Say how far the run is, and name the files of a run that are not there."""
    paths = RunPaths(run)
    for path in (paths.config, paths.environment, paths.folds_file):
        if not path.is_file():
            section.missing.append(f"{path}: not found")
    plan = read_folds(paths.folds_file)
    begun = sum(paths.fold(fold.index).folder.is_dir() for fold in plan.folds)
    section.paragraphs.append(
        f"Protocol {plan.protocol} on {', '.join(plan.corpora)}; AUs {', '.join(map(str, plan.aus))}; "
        f"seed {plan.seed}; folds begun: {begun} of {len(plan.folds)}."
    )
    files = read_run(run)[1]
    behind = unfinished(files, plan, load_recorded(RunPaths(run).config).training)
    section.paragraphs.append(f"Folds trained to their last step: {len(files) - len(behind)} of {len(plan.folds)}.")


def _environment(section: Section, run: Path) -> None:
    """Add what the run says of its machine and libraries."""
    text = json.dumps(read_json(RunPaths(run).environment), indent=1)
    section.listings.append(Listing("Machine, versions, commit and command of the run", text))


def _settings(section: Section, run: Path) -> None:
    text = yaml.safe_dump(to_dict(load_recorded(RunPaths(run).config)), sort_keys=False)
    section.listings.append(Listing("Resolved settings of the run", text))
