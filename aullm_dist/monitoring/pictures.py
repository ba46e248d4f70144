"""Draws an evaluation: curves and confusions of each AU, the AU graph, evidence on faces, the projector."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from aullm_dist.config import Config
from aullm_dist.data.clips import ClipView
from aullm_dist.distributed.team import Processes
from aullm_dist.evaluation.answers import Answers, sigmoid
from aullm_dist.model.assembly import BuiltModel
from aullm_dist.model.networks import stream_of
from aullm_dist.monitoring.explained import ExplainedTwins, Explainer, choose_clips
from aullm_dist.monitoring.lora import norms_of_layers, update_norms
from aullm_dist.monitoring.projector import write_projector
from aullm_dist.monitoring.writer import Monitor


class Pictures:
    """Draws a fold's held-out clips at each evaluation.

    Args:
        accelerator: processes that train the fold together.
        config: the run's configuration.
        built: the model, as it was built.
        view: the held-out clips that are shown.
        aus: AU numbers.

    Attributes:
        explainer: of the clips that are shown.
    """

    def __init__(
        self, accelerator: Processes, config: Config, built: BuiltModel, view: ClipView, aus: tuple[int, ...]
    ) -> None:
        self._config, self._built, self._view, self._aus = config, built, view, aus
        monitor = config.monitor
        self._labels = view.labels(aus)
        self._drawn = min(monitor.clips, len(view))
        self._chosen = choose_clips(self._labels, self._drawn, max(self._drawn, monitor.projector_clips))
        self.explainer = Explainer(
            accelerator, config, built.relations, view, self._chosen, self._drawn, stream_of(built.model)
        )

    def show(
        self, model: nn.Module, answers: Answers, monitor: Monitor, step: int, tick: Callable[[], None] = lambda: None
    ) -> None:
        """Draw what an evaluation found; every process calls it.

        Args:
            model: as the engine wraps it.
            answers: of the shown clips.
            monitor: of the fold.
            step: optimizer steps that are done.
            tick: called after each micro-batch, may raise `Preempted`.
        """
        norms = update_norms(self._built.model)
        explained = self.explainer.explain(model, tick) if self._chosen else None
        if not monitor.works:
            return
        self._curves(answers, monitor, step)
        self._lora(norms, monitor, step)
        if explained is None:
            return
        if "evidence" in explained.factual and self._drawn and self._config.monitor.images:
            monitor.picture("evidence/onset_and_apex", self._evidence(explained), step)
        if "strengths" in explained.factual and self._drawn:
            monitor.picture("au_graph/factual_beside_counterfactual", self._graph(explained), step)
        self._projector(explained, monitor)

    def _curves(self, answers: Answers, monitor: Monitor, step: int) -> None:
        # Only the process that draws takes the time that matplotlib takes to import.
        from aullm_dist.figures.confusion import draw_confusion
        from aullm_dist.figures.style import new_figure, to_pixels

        probabilities = sigmoid(answers.logits)
        for column, au in enumerate(self._aus):
            monitor.curve(f"pr/AU{au}", answers.labels[:, column], probabilities[:, column], step)
        figure, axes = new_figure(4.2, 1.0 + 0.3 * len(self._aus))
        draw_confusion(axes[0, 0], self._aus, answers.labels, answers.logits > 0)
        axes[0, 0].set_title(f"threshold 0.5, {len(answers.labels)} held-out clips", fontsize=8)
        monitor.picture("confusion/per_au", to_pixels(figure), step)

    def _lora(self, norms: dict[str, dict[int, float]], monitor: Monitor, step: int) -> None:
        for kind, row in norms.items():
            monitor.histogram(f"lora_update/{kind}", np.array([row[layer] for layer in sorted(row)]), step)
        if norms:
            monitor.histogram("lora_update/layers", norms_of_layers(norms), step)

    def _evidence(self, explained: ExplainedTwins) -> np.ndarray:
        from aullm_dist.figures.evidence import draw_evidence
        from aullm_dist.figures.style import new_figure, to_pixels

        model: Any = self._built.model
        grid: tuple[int, int, int] = model.visual.cell_grid
        figure, axes = new_figure(3.6, 1.95 * self._drawn, self._drawn, 2)
        for place in range(self._drawn):
            onset, (late_frame, what) = self.explainer.frames(place)[0], self.explainer.late_frame(place)
            weights = explained.factual["evidence"][place].reshape(grid)
            # Cells of the clip's first half lie over its onset, the others over its apex.
            half = max(grid[0] // 2, 1)
            early, late = weights.copy(), weights.copy()
            early[half:], late[: half if grid[0] > 1 else 0] = 0.0, 0.0
            limit = max(early.sum(axis=0).max(), late.sum(axis=0).max())
            truth, said = self._names(place, explained)
            draw_evidence(axes[place, 0], onset, early, grid, title=f"onset; shows AU {truth}", limit=limit)
            draw_evidence(axes[place, 1], late_frame, late, grid, title=f"{what}; says {said}", limit=limit)
        return to_pixels(figure)

    def _names(self, place: int, explained: ExplainedTwins) -> tuple[str, str]:
        truth = self._labels[self._chosen[place]] != 0
        return _listed(self._aus, truth), _listed(self._aus, explained.factual["logits"][place] > 0)

    def _graph(self, explained: ExplainedTwins) -> np.ndarray:
        from aullm_dist.figures.graph import draw_graph
        from aullm_dist.figures.style import colour_bar, new_figure, to_pixels

        relations = self._built.relations
        assert relations is not None, "only a model with a graph draws one"
        edges = relations.describe()
        drawn = {name: values[: self._drawn].mean(axis=0) for name, values in explained.factual.items()}
        neutral, edited = (part["strengths"].mean(axis=0) for part in (explained.neutral, explained.edited))
        influence = explained.edited["influence"].mean(axis=0)
        prior = relations.prior_mask
        side = 0.9 + 0.26 * len(self._aus)
        figure, axes = new_figure(2 * side + 1.2, 2 * side + 0.8, 2, 2)
        limit = float(max(np.abs(drawn["strengths"][prior]).max(), np.abs(neutral[prior]).max())) or 1.0
        draw_graph(
            axes[0, 0], self._aus, edges, drawn["strengths"], title="strengths, factual", limit=limit, legend=False
        )
        image = draw_graph(
            axes[0, 1], self._aus, edges, neutral, title="strengths, without movement", limit=limit, legend=False
        )
        colour_bar(figure, image, axes[0].tolist(), "strength (no unit)")
        limit = float(max(np.abs(drawn["influence"]).max(), np.abs(influence).max())) or 1.0
        draw_graph(axes[1, 0], self._aus, edges, drawn["influence"], title="influence, factual", limit=limit)
        image = draw_graph(
            axes[1, 1],
            self._aus,
            edges,
            influence,
            title="influence, structure edited",
            limit=limit,
            mask=explained.mask,
        )
        colour_bar(figure, image, axes[1].tolist(), "influence (no unit)")
        return to_pixels(figure)

    def _projector(self, explained: ExplainedTwins, monitor: Monitor) -> None:
        shown = len(self._chosen) if self._config.monitor.projector_clips else 0
        if shown < 3:
            return
        named = {"content_token": "content", "final_hidden_state": "hidden"}
        vectors = {name: explained.factual[field] for name, field in named.items() if field in explained.factual}
        vectors = vectors or {"summary_vector": explained.factual["high"]}
        header = ["clip", "subject", "AUs", "answer", *(f"AU{au}" for au in self._aus)]
        samples = [self._view.samples[index] for index in self._chosen]
        rows = [
            [
                sample.sample_id,
                sample.subject,
                *self._names(place, explained),
                *(str(int(value)) for value in self._labels[self._chosen[place]]),
            ]
            for place, sample in enumerate(samples)
        ]
        frames = None
        if self._config.monitor.images:
            frames = np.stack(
                [self.explainer.frames(place)[self._config.data.num_frames // 2] for place in range(shown)]
            )
        try:
            write_projector(monitor.folder, vectors, header, rows, frames)
        except OSError as error:
            monitor.failed(f"{error.filename or monitor.folder}: {error.strerror or error}")


def _listed(aus: Sequence[int], which: np.ndarray) -> str:
    return " ".join(str(au) for au, one in zip(aus, which, strict=True) if one) or "none"
