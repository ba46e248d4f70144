"""Reads training curves from the TensorBoard event files of a run."""

import logging
from pathlib import Path

import numpy as np

from aullm_dist.errors import UserError
from aullm_dist.figures.curves import Curve, draw_curves, median_curve
from aullm_dist.figures.style import new_figure
from aullm_dist.monitoring.writer import LOSS
from aullm_dist.report.sections import Gallery, Section
from aullm_dist.runs.paths import RunPaths

TAGS = {
    "loss/loss": ("training loss (no unit)", "training loss", 1.0),
    "heldout/f1_macro": ("f1_macro on held-out clips (%)", "held-out f1_macro", 100.0),
    "heldout/auc": ("auc on held-out clips (%)", "held-out auc", 100.0),
    "train/grad_norm": ("norm of the gradient (no unit)", "gradient norm", 1.0),
}
"""Scalar -> quantity with unit, its name in captions, and what a value is multiplied by."""


def read_scalars(folder: Path) -> dict[str, Curve]:
    """Return every scalar of a fold's event files: tag -> (steps `[n]`, values `[n]`).

    Of values written twice for a step, as by a run that was resumed, the last one counts. Losses are named `loss/...`,
    as older runs wrote them.
    """
    from tensorboard.backend.event_processing import event_accumulator

    # It speaks up about every file that a killed run left unfinished.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    # One of each kind that no curve is drawn of: 0 would keep all.
    kinds = dict.fromkeys(event_accumulator.DEFAULT_SIZE_GUIDANCE, 1)
    events = event_accumulator.EventAccumulator(str(folder), size_guidance={**kinds, event_accumulator.SCALARS: 0})
    events.Reload()
    values: dict[str, dict[int, float]] = {}
    for tag in events.Tags()[event_accumulator.SCALARS]:
        name = tag.replace(f"{LOSS}/", "loss/", 1) if tag.startswith(f"{LOSS}/") else tag
        values[name] = values.get(name, {}) | {event.step: event.value for event in events.Scalars(tag)}
    return {
        name: (np.array(sorted(own)), np.array([own[step] for step in sorted(own)])) for name, own in values.items()
    }


def curves(section: Section, gallery: Gallery, run: Path) -> None:
    """Add a figure for each scalar of `TAGS` with a curve per fold, and one of the loss's parts.

    Raises:
        UserError: the run has no event files.
    """
    paths = RunPaths(run)
    folders = [path for path in (fold.tensorboard for fold in paths.folds().values()) if path.is_dir()]
    scalars = {folder.name: read_scalars(folder) for folder in folders}
    empty = [name for name, found in scalars.items() if not found]
    if len(empty) == len(scalars):
        raise UserError(
            f"{paths.tensorboard}: no event files with scalars; monitor.tensorboard was off, or nothing ran"
        )
    section.missing += [f"{paths.tensorboard}/{name}: no scalars" for name in empty]
    for tag, (ylabel, name, factor) in TAGS.items():
        own = {fold: (found[tag][0], factor * found[tag][1]) for fold, found in scalars.items() if tag in found}
        if not own:
            section.missing.append(f"{paths.tensorboard}: no scalar {tag}")
            continue
        figure, axes = new_figure(4.6, 3.0)
        draw_curves(axes[0, 0], own, ylabel=ylabel)
        last = ", ".join(f"{fold} {values[-1]:.3g}" for fold, (_, values) in own.items())
        section.pictures.append(
            gallery.add(
                figure,
                f"curve-{tag.replace('/', '-')}",
                f"{name[0].upper()}{name[1:]} of {_counted(len(own))}.",
                f"{name} over optimizer steps; last values: {last}",
            )  # fmt: skip
        )
    _loss_parts(section, gallery, scalars)


def _loss_parts(section: Section, gallery: Gallery, scalars: dict[str, dict[str, Curve]]) -> None:
    tags = dict.fromkeys(tag for found in scalars.values() for tag in found if tag.startswith("loss/"))
    parts = {
        tag.removeprefix("loss/"): median_curve({fold: found[tag] for fold, found in scalars.items() if tag in found})
        for tag in tags
        if tag != "loss/loss"
    }
    if not parts:
        return
    figure, axes = new_figure(4.6, 3.0)
    draw_curves(axes[0, 0], dict(list(parts.items())[:8]), ylabel="part of the loss, unweighted (no unit)")
    axes[0, 0].set_yscale("symlog", linthresh=1e-3)
    section.pictures.append(
        gallery.add(
            figure,
            "curve-loss-parts",
            f"Parts of the loss, median of {_counted(len(scalars))}, before their weights; "
            "the scale is logarithmic above 0.001.",
            "parts of the loss over optimizer steps: " + ", ".join(parts),
        )  # fmt: skip
    )


def _counted(folds: int) -> str:
    return f"{folds} fold{'' if folds == 1 else 's'}"
