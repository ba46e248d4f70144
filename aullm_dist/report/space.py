"""Shows where corpora lie in the features of a model: t-SNE, and the number that stands for the picture."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from aullm_dist.errors import UserError
from aullm_dist.evaluation.blocks import Block
from aullm_dist.figures.embedding import draw_embedding
from aullm_dist.figures.style import new_figure
from aullm_dist.prediction.explain import ExplainedClips
from aullm_dist.report.domain_gap import MOST_POINTS, domain_gap, embed
from aullm_dist.report.sections import Gallery, Section

EVOLUTION = {
    "high": "visual summary",
    "content": "content token (CT)",
    "instruction": "instruction token (IT)",
    "hidden": "final hidden state",
}
"""Fields of `Explanation` from the visual backbone to the answer."""


@dataclass(frozen=True, slots=True)
class Space:
    """One feature space over some clips: its name and values `[n, F]`."""

    name: str
    values: np.ndarray


def answered_from(clips: ExplainedClips, network: str) -> Space:
    """Return the features that a model's head reads: the final hidden state, or without an LLM the summary.

    Args:
        clips: what the model makes of them.
        network: name of a network without an LLM, should this be one.
    """
    if "hidden" in clips.steps:
        return Space("AULLM++, final hidden state", clips.steps["hidden"])
    return Space(f"no LLM ({network}), visual summary", clips.steps["high"])


def corpora(
    section: Section,
    gallery: Gallery,
    clips: ExplainedClips,
    baseline: ExplainedClips | None,
    network: str,
    bootstrap: int,
    seed: int,
) -> None:
    """Add a t-SNE by corpus of the baseline and of the model, and how well a classifier tells the corpora."""
    section.paragraphs.append(
        "High-level features are what the head reads. In a t-SNE only neighbourhoods mean something: distances between "
        "clusters, their sizes and the axes do not. The table measures what the picture suggests."
    )
    shown = [answered_from(part, network) for part in (baseline, clips) if part is not None]
    groups, kind = (clips.corpora, "corpus") if len(set(clips.corpora)) > 1 else (_active(clips), "label")
    for index, space in enumerate(shown):
        _picture(section, gallery, space, groups, kind, f"tsne-{index}", seed)
    gaps(section, shown, clips, bootstrap, seed, "How well the corpus of a clip can be recognised, in percent")


def evolution(section: Section, gallery: Gallery, clips: ExplainedClips, bootstrap: int, seed: int) -> None:
    """Add a t-SNE of each step from the visual backbone to the final hidden state, coloured by the commonest AU."""
    spaces = [Space(name, clips.steps[key]) for key, name in EVOLUTION.items() if key in clips.steps]
    if len(spaces) < 2:
        raise UserError(f"{clips.checkpoint}: a model without an LLM has one step, its visual summary")
    for index, space in enumerate(spaces):
        _picture(section, gallery, space, _active(clips), "label", f"evolution-{index}", seed)
    gaps(section, spaces, clips, bootstrap, seed, "How well the corpus can be recognised at each step, in percent")


def gaps(
    section: Section, spaces: Sequence[Space], clips: ExplainedClips, bootstrap: int, seed: int, title: str
) -> None:
    """Add a row per feature space with the balanced accuracy of a corpus classifier, and one for the labels alone.

    Raises:
        UserError: the clips are of one corpus alone, or a corpus has one subject.
    """
    rows = []
    for space in [*spaces, Space("true AU labels alone", clips.labels)]:
        gap = domain_gap(space.values, clips.corpora, clips.subjects, resamples=bootstrap, seed=seed)
        low_high = "-" if gap.ci is None else f"{100 * gap.ci[0]:.1f}-{100 * gap.ci[1]:.1f}"
        cells = (f"{100 * gap.balanced_accuracy:.1f}", low_high, f"{100 * gap.chance:.1f}")
        rows.append((space.name, *cells, str(space.values.shape[1]), str(gap.clips), str(gap.subjects)))
    note = (
        "Balanced accuracy of a logistic regression on frozen, standardised features, each clip answered without clips "
        "of its subject. Chance: features that say nothing of the corpus. The labels' row is what the corpora's AU "
        "proportions give away, which good features may keep. A low number alone is no merit: constant features have "
        "the lowest. The clips include those that the model was trained on."
    )
    header = ("features", "balanced accuracy", "95% CI", "chance", "dimensions", "clips", "subjects")
    section.tables.append(Block((title,), header, tuple(rows), (note,)))


def _picture(
    section: Section, gallery: Gallery, space: Space, groups: Sequence[str], kind: str, name: str, seed: int
) -> None:
    shown, places = embed(space.values, seed)
    figure, axes = new_figure(4.6, 4.2)
    draw_embedding(axes[0, 0], places, [groups[index] for index in shown], title=space.name)
    drawn = f", {MOST_POINTS} clips drawn of {len(groups)}" if len(shown) < len(groups) else ""
    caption = f"t-SNE of {space.name}, one point per clip, by {kind}{drawn}; seed {seed}."
    counts = ", ".join(f"{group}: {groups.count(group)} clips" for group in sorted(set(groups)))
    section.pictures.append(gallery.add(figure, name, caption, f"t-SNE scatter of {space.name} by {kind} ({counts})"))


def _active(clips: ExplainedClips) -> tuple[str, ...]:
    """Return for each clip whether the AU that is nearest to half of the clips is active."""
    shares = clips.labels.mean(axis=0)
    column = int(np.argmin(np.abs(shares - 0.5)))
    au = clips.aus[column]
    return tuple(f"AU{au}" if active else f"no AU{au}" for active in clips.labels[:, column] > 0)
