"""Shows what led to the answers: where on the face the evidence was, and what the edges of the AU graph carried."""

import numpy as np

from aullm_dist.data.clips import ClipStore
from aullm_dist.data.protocols import Fold
from aullm_dist.errors import UserError
from aullm_dist.evaluation.blocks import Block
from aullm_dist.figures.evidence import draw_evidence
from aullm_dist.figures.graph import draw_graph
from aullm_dist.figures.relations import draw_relations
from aullm_dist.figures.style import FONT_POINTS, bare, colour_bar, new_figure
from aullm_dist.model.relations import AURelations
from aullm_dist.prediction.explain import ExplainedClips, frames_of
from aullm_dist.report.sections import Gallery, Picture, Section

_COLUMNS = 4


def choose_clips(clips: ExplainedClips, fold: Fold, count: int, seed: int) -> list[int]:
    """Return the indices of example clips, drawn by the seed and not by looking: test clips of different subjects.

    Clips with an active AU come first; where there are too few subjects, a subject comes again.
    """
    tested = set(fold.test) or set(fold.inner)
    known = [index for index, name in enumerate(clips.sample_ids) if name in tested] or list(range(len(clips.subjects)))
    order = np.random.default_rng(seed).permutation(known).tolist()
    order.sort(key=lambda index: not clips.labels[index].any())
    first: list[int] = []
    again: list[int] = []
    seen: set[str] = set()
    for index in order:
        (again if clips.subjects[index] in seen else first).append(index)
        seen.add(clips.subjects[index])
    return [*first, *again][:count]


def evidence(
    section: Section, gallery: Gallery, clips: ExplainedClips, store: ClipStore, fold: Fold, count: int, seed: int
) -> None:
    """Add the evidence maps of example clips over their middle frame.

    Raises:
        UserError: the model has no evidence attention.
    """
    if "evidence" not in clips.steps:
        raise UserError(f"{clips.checkpoint}: this model has no evidence attention")
    chosen = choose_clips(clips, fold, count, seed)
    shown = ", ".join(sorted({clips.corpora[index] for index in chosen}))
    section.paragraphs.append(
        f"The pictures below are frames of the corpus: {shown}. Those of a licensed corpus may be shown and passed on "
        "only as its licence allows; a report made with --clips 0 has none."
    )
    section.paragraphs.append(
        "Clips were drawn by the seed, not chosen. Colour: share of the attention on a cell, added up over time, the "
        "strongest of each map in the strongest colour. Attention says where a head looked, not why it answered so."
    )
    frames = frames_of(store, [clips.sample_ids[index] for index in chosen], clips.num_frames)
    for number, (index, views) in enumerate(zip(chosen, frames, strict=True)):
        section.pictures.append(_evidence_picture(gallery, clips, index, views[len(views) // 2], number))


def _evidence_picture(gallery: Gallery, clips: ExplainedClips, index: int, frame: np.ndarray, number: int) -> Picture:
    heads = clips.steps["evidence"][index]
    maps = [(f"head {head + 1}", weights) for head, weights in enumerate(heads)]
    active = [column for column in range(len(clips.aus)) if clips.labels[index, column]]
    if "gaze" in clips.steps:
        maps += [(f"AU{clips.aus[column]} node", clips.steps["gaze"][index, column]) for column in active[:3]]
    rows = -(-(len(maps) + 1) // _COLUMNS)
    figure, axes = new_figure(5.2, 1.5 * rows + 0.3, rows, _COLUMNS)
    places = axes.ravel()
    places[0].imshow(frame, cmap="gray", vmin=0, vmax=1)
    places[0].set_title("frame", fontsize=FONT_POINTS)
    for ax, (title, weights) in zip(places[1:], maps, strict=False):
        draw_evidence(ax, frame, weights, clips.cell_grid, title=title)
    for ax in places:
        bare(ax)
    said = 1 / (1 + np.exp(-clips.steps["logits"][index]))
    labelled = ", ".join(f"AU{clips.aus[column]}" for column in active) or "no AU"
    found = ", ".join(f"AU{au} {100 * p:.0f}%" for au, p in zip(clips.aus, said, strict=True) if p > 0.5) or "no AU"
    name = clips.sample_ids[index]
    return gallery.add(
        figure, f"evidence-{number}", f"{name}: labelled {labelled}; answered {found} (probability above 50%).",
        f"Middle frame of clip {name} of {clips.corpora[index]} and where {len(maps)} attention maps look on it",
    )  # fmt: skip


def graph(section: Section, gallery: Gallery, clips: ExplainedClips) -> None:
    """Add strengths and influence of the graph's edges, mean over the clips, per edge and per relation.

    Raises:
        UserError: the model has no AU graph.
    """
    if clips.relations is None:
        raise UserError(f"{clips.checkpoint}: this model has no AU graph")
    section.paragraphs.append(
        "Strength: what is learned of an edge before the softmax over a node's edges. Influence: what an edge weighs "
        "in the last layer, with the sign of its relation's gate. Both are means over the clips and have no unit."
    )
    for key in ("strengths", "influence"):
        section.pictures += _graph_pictures(gallery, clips, key)
        section.tables.append(_relation_table(clips.relations, key, clips.steps[key]))


def _graph_pictures(gallery: Gallery, clips: ExplainedClips, key: str) -> list[Picture]:
    assert clips.relations is not None, "only a model with a graph has strengths"
    edges, values = clips.relations.describe(), clips.steps[key].mean(axis=0)
    figure, axes = new_figure(4.6, 4.6)
    image = draw_graph(axes[0, 0], clips.aus, edges, values, title=f"mean {key}")
    colour_bar(figure, image, axes[0, 0], f"{key} (no unit)")
    strongest = max(range(len(edges)), key=lambda edge: abs(values[edge]) if edges[edge][3] else -1.0)
    target, source, kind, _ = edges[strongest]
    caption = f"Mean {key} of each edge of the prior over {len(clips.sample_ids)} clips."
    said = f"{caption} Heat map, AU by AU; the largest is {values[strongest]:.2f}, {kind}, AU{source} to AU{target}."
    pictures = [gallery.add(figure, f"graph-{key}", caption, said)]
    figure, axes = new_figure(4.6, 3.0)
    draw_relations(axes[0, 0], edges, values, ylabel=f"mean {key} (no unit)")
    caption = f"Mean {key} by type of relation, a point per edge; the bars are the means of the types."
    return [*pictures, gallery.add(figure, f"relations-{key}", caption, f"{caption} A table below has the numbers.")]


def _relation_table(relations: AURelations, key: str, values: np.ndarray) -> Block:
    """Return the values `[n, E]` of the prior's edges by type of relation."""
    means, deviations, rows = values.mean(axis=0), values.std(axis=0), []
    for number, name in enumerate(relations.names):
        own = relations.prior_mask & (relations.relation == number)
        if own.any():
            cells = (means[own].mean(), means[own].min(), means[own].max())
            rows.append((name, str(own.sum()), *(f"{cell:+.3f}" for cell in cells), f"{deviations[own].mean():.3f}"))
    note = "Over the edges of a type, each a mean over clips; sd: standard deviation over clips, mean over the edges."
    title = f"{key[0].upper()}{key[1:]} by type of relation, no unit"
    return Block((title,), ("relation", "edges", "mean", "least", "most", "sd"), tuple(rows), (note,))
