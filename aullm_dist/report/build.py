"""A report of one or several runs: gather the sections, then write the folder, whole or not at all."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from aullm_dist import __version__
from aullm_dist.config import load, to_dict
from aullm_dist.data.protocols import read_folds
from aullm_dist.errors import UserError
from aullm_dist.evaluation.evaluate import read_run, unfinished
from aullm_dist.files import staged_folder
from aullm_dist.report import reasons, results, space, training_curves
from aullm_dist.report.model_views import Models
from aullm_dist.report.page import Part, write_page
from aullm_dist.report.sections import Gallery, Listing, Section, attempted
from aullm_dist.training.manifest import library_versions
from aullm_dist.training.workspace import CONFIG_FILE, ENVIRONMENT_FILE, FOLDS_FILE


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
    if len({run.resolve() for run in runs}) < len(runs):
        raise UserError("a run is given twice; give each once")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: is not an empty folder; give a new one")
    names = _names(runs)
    try:
        with staged_folder(out, _publish) as folder:
            parts = []
            if len(runs) > 1:
                parts.append(Part("All runs", "runs", _together(names, folder, options)))
            for number, (name, run) in enumerate(names, start=1):
                gallery = Gallery(folder, f"run{number}-" if len(runs) > 1 else "")
                parts.append(Part(name, f"run-{number}", _run_sections(run, name, gallery, models, options)))
            versions = {"aullm_dist": __version__, **library_versions()}
            write_page(folder, parts, [name for name, _ in names], versions)
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
        gallery = Gallery(folder, f"run{number}-to-run1-")
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
    baseline = results.baseline_of(run)
    if baseline is not None:
        fill = partial(
            results.differences, gallery=gallery, pair=(baseline, run), names=("no LLM (led_cnn)", _model_name(run)),
            bootstrap=options.bootstrap, seed=options.seed,
        )  # fmt: skip
        sections.append(attempted(Section("Difference to the no-LLM baseline"), fill))
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
    try:
        return "no LLM (led_cnn)" if load(run / CONFIG_FILE).model.llm == "none" else "AULLM++"
    except UserError:
        return "AULLM++"


def _model_sections(
    run: Path, baseline: Path | None, gallery: Gallery, models: Models, options: Options
) -> list[Section]:
    how = (options.bootstrap, options.seed)
    features = Section("Features of the corpora")
    found = {}

    def load_model(section: Section) -> None:
        fold = models.fold_of(run)
        found["fold"] = fold
        found["clips"], found["store"] = models.explain(run, fold)
        where = found["clips"].checkpoint.relative_to(run).as_posix()
        section.paragraphs.append(
            f"From {where} (fold {fold.index}, {fold.name}), over {len(found['clips'].sample_ids)} clips. Other folds "
            "have models of their own; --fold chooses one."
        )

    def load_baseline(section: Section) -> None:
        if baseline is not None and found:
            found["baseline"] = models.explain(baseline, found["fold"], found["store"])[0]

    attempted(features, load_model, load_baseline)
    if "clips" not in found:
        return [features]
    clips, store, fold = found["clips"], found["store"], found["fold"]
    if "baseline" not in found and "hidden" in clips.steps:
        features.missing.append("no no-LLM baseline beside this run; train one with training.baseline=true")
    attempted(features, lambda section: space.corpora(section, gallery, clips, found.get("baseline"), *how))
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
    for name in (CONFIG_FILE, ENVIRONMENT_FILE, FOLDS_FILE):
        if not (run / name).is_file():
            section.missing.append(f"{run}/{name}: not found")
    plan = read_folds(run / FOLDS_FILE)
    begun = sum((run / f"fold-{fold.index:02d}").is_dir() for fold in plan.folds)
    section.paragraphs.append(
        f"Protocol {plan.protocol} on {', '.join(plan.corpora)}; AUs {', '.join(map(str, plan.aus))}; "
        f"seed {plan.seed}; folds begun: {begun} of {len(plan.folds)}."
    )
    files = read_run(run)[1]
    behind = unfinished(files, plan, load(run / CONFIG_FILE).training)
    section.paragraphs.append(f"Folds trained to their last step: {len(files) - len(behind)} of {len(plan.folds)}.")


def _environment(section: Section, run: Path) -> None:
    """Add what the run says of its machine and libraries."""
    file = run / ENVIRONMENT_FILE
    try:
        text = json.dumps(json.loads(file.read_text(encoding="utf-8")), indent=1)
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from None
    section.listings.append(Listing("Machine, versions, commit and command of the run", text))


def _settings(section: Section, run: Path) -> None:
    text = yaml.safe_dump(to_dict(load(run / CONFIG_FILE)), sort_keys=False)
    section.listings.append(Listing("Resolved settings of the run", text))
