"""The picture of a prediction: everything is named, and what a model does not have is left out."""

import dataclasses

import numpy as np
import pytest
from matplotlib.colors import to_hex

from aullm_dist.facs import AU_NAMES
from aullm_dist.figures.prediction import PredictionPicture, draw_prediction, render_parts, render_prediction
from aullm_dist.figures.style import BLUE
from aullm_dist.model.relations import build_relations

AUS = (1, 2, 4, 12)


@pytest.fixture(scope="module")
def picture() -> PredictionPicture:
    rng = np.random.default_rng(0)
    edges = build_relations(AUS).describe()
    return PredictionPicture(
        clip="corpus/" + "long/" * 20 + "clip",
        frames=rng.integers(0, 255, (2, 96, 96), dtype=np.uint8),
        numbers=(3, 9, 14),
        other="Apex",
        aus=AUS,
        names=tuple(AU_NAMES[au] for au in AUS),
        probabilities=np.array([0.1, 0.7, 0.4, 0.9]),
        active=np.array([False, True, True, False]),
        thresholds=np.array([0.5, 0.5, 0.3, 0.95]),
        policy="fixed 0.5",
        model="run/fold-00",
        clip_size=64,
        grid=(2, 9, 9),
        evidence=rng.dirichlet(np.ones(162)),
        edges=edges,
        strengths=rng.normal(size=len(edges)),
    )


def axes_of(picture: PredictionPicture) -> list:
    figure = draw_prediction(picture)
    return figure.get_axes() + [ax for part in figure.subfigs for ax in part.get_axes()]


def test_every_axis_says_what_it_shows(picture):
    axes = axes_of(picture)
    for ax in axes:
        is_picture = not (ax.get_xticklabels() or ax.get_yticklabels())
        named = ax.get_title() if is_picture else ax.get_xlabel() or ax.get_ylabel()
        assert named, f"an axes of {ax.get_position()} has no name"
    titles = {ax.get_title() for ax in axes}
    assert {"Onset: frame 3", "Apex: frame 9", "Where the evidence was taken", "2 of 4 action units active"} <= titles


def test_bars_are_coloured_by_the_decision_and_not_by_the_probability(picture):
    bars = next(ax for ax in axes_of(picture) if ax.get_xlabel() == "probability")
    coloured = [to_hex(bar.get_facecolor()).upper() == BLUE for bar in bars.patches]
    assert coloured == [False, True, True, False]
    assert [label.get_text() for label in bars.get_yticklabels()][3] == "Lip Corner Puller  AU12"
    lowest, highest = bars.get_ylim()
    assert lowest > highest, "the first AU is on top"
    limits = sorted(line.get_xdata()[0] for line in bars.lines)
    assert limits == [0.3, 0.5, 0.5, 0.95]


def test_what_a_model_does_not_have_is_left_out(picture):
    bare = dataclasses.replace(picture, grid=None, evidence=None, edges=(), strengths=None)
    titles = [ax.get_title() for ax in axes_of(bare)]
    assert "Where the evidence was taken" not in titles
    assert "What the AUs tell each other" not in titles


def test_what_limits_the_model_stands_at_the_foot(picture):
    foot = draw_prediction(dataclasses.replace(picture, caveats=("drawn faces", "random LLM"))).get_supxlabel()
    assert "\nDrawn faces.\nRandom LLM.\nProbabilities are not calibrated" in foot
    assert "\nModel: run/fold-00\nProbabilities" in draw_prediction(picture).get_supxlabel()


def test_maps_stand_alone_for_a_page(picture):
    parts = render_parts(picture)
    assert list(parts) == ["change", "evidence", "graph"]
    assert all(b"<svg" in svg for svg in parts.values())
    bare = dataclasses.replace(picture, grid=None, evidence=None, edges=(), strengths=None)
    assert list(render_parts(bare)) == ["change"]


def test_noise_is_not_coloured_as_movement(picture):
    still = np.full((96, 96), 100, np.uint8)
    calm = dataclasses.replace(picture, frames=np.stack([still, still + 1]))
    change = next(ax for ax in axes_of(calm) if ax.get_title() == "Change between the two").images[0]
    assert change.get_clim() == (-8.0, 8.0)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".PDF", b"%PDF")])
def test_pictures_are_written_in_three_formats(picture, suffix, start):
    small = dataclasses.replace(picture, grid=None, evidence=None, edges=(), strengths=None)
    assert render_prediction(small, suffix).startswith(start)
