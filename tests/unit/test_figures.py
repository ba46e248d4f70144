"""Evidence maps and graph heat maps: the right cell in the right place, and no global state of matplotlib."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.collections import LineCollection, PathCollection

from aullm_dist.figures.confusion import draw_confusion
from aullm_dist.figures.evidence import draw_evidence
from aullm_dist.figures.graph import draw_graph
from aullm_dist.figures.style import new_figure, to_pixels
from aullm_dist.model.relations import build_relations, sample_structure_edit

GRID = (2, 9, 9)


@pytest.fixture
def ax():
    _, axes = new_figure(3, 3)
    return axes[0, 0]


def test_the_strongest_cell_is_where_the_model_looked(ax):
    weights = np.zeros(GRID)
    weights[:, 2, 7] = 0.5
    overlay = draw_evidence(ax, np.full((64, 64), 0.5), weights.reshape(-1), GRID, strength=1.0)
    picture = to_pixels(ax.figure).astype(int)
    coloured = np.ptp(picture, axis=-1) > 60
    x, y = np.mean(np.argwhere(coloured)[:, ::-1], axis=0)
    # Cells begin 5 pixels from the edge and are 6 pixels wide.
    data = ax.transData.inverted().transform((x, picture.shape[0] - y))
    assert np.allclose(data, (5 + 7.5 * 6, 5 + 2.5 * 6), atol=1.0)
    assert overlay.get_array().sum() == pytest.approx(1.0)


def test_evidence_scales_with_the_frame(ax):
    overlay = draw_evidence(ax, np.zeros((128, 128), np.uint8), np.ones(GRID), GRID, clip_size=64)
    assert overlay.get_extent() == [10, 118, 118, 10]


@pytest.mark.parametrize("weights", [np.ones(161), np.ones((9, 9, 2)), -np.ones(162), np.full(162, np.nan)])
def test_evidence_that_is_none_is_refused(ax, weights):
    with pytest.raises(ValueError, match="weights"):
        draw_evidence(ax, np.zeros((64, 64)), weights, GRID)


def test_an_edge_is_in_the_row_that_receives(ax):
    relations = build_relations((1, 2, 4, 12))
    edges = relations.describe()
    values = np.zeros(len(edges))
    edge = next(i for i, (target, source, *_) in enumerate(edges) if (target, source) == (4, 1))
    values[edge] = -2.0
    table = draw_graph(ax, relations.aus, edges, values).get_array()
    assert table[2, 0] == -2.0
    assert table[0, 2] == 0.0
    assert table.mask[3, 1], "AU12 and AU2 have no relation"


def test_an_edit_shows_what_was_cut_and_what_came(ax):
    relations = build_relations((1, 2, 4, 7, 12, 14, 15, 17))
    mask = sample_structure_edit(relations, 0.5, np.random.default_rng(0))
    cut, come = relations.prior_mask & ~mask, ~relations.prior_mask & mask
    assert cut.any()
    assert come.any()
    table = draw_graph(ax, relations.aus, relations.describe(), np.ones(relations.num_edges), mask=mask).get_array()
    assert table.mask[relations.target[cut], relations.source[cut]].all()
    assert not table.mask[relations.target[come], relations.source[come]].any()
    crosses = [shape for shape in ax.collections if isinstance(shape, LineCollection)]
    assert sum(len(shape.get_segments()) for shape in crosses) == cut.sum()


def test_types_differ_in_shape_and_colour(ax):
    relations = build_relations((1, 2, 4, 7, 12, 14, 15, 17))
    draw_graph(ax, relations.aus, relations.describe(), np.ones(relations.num_edges))
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["co-occur", "antagonist", "subset", "region", "self"]
    marks = {shape.get_label(): shape for shape in ax.collections if isinstance(shape, PathCollection)}
    assert set(marks) == set(names)
    assert len({marks[name].get_paths()[0].vertices.tobytes() for name in names if name != "self"}) == 4
    assert sum(len(shape.get_offsets()) for shape in marks.values()) == relations.prior_mask.sum()


def test_a_graph_with_values_that_do_not_fit_is_refused(ax):
    relations = build_relations((1, 2))
    edges = relations.describe()
    with pytest.raises(ValueError, match="edges"):
        draw_graph(ax, relations.aus, edges, np.zeros(len(edges) + 1))
    with pytest.raises(ValueError, match="finite"):
        draw_graph(ax, relations.aus, edges, np.full(len(edges), np.inf))


def test_a_confusion_counts_and_shades_by_label(ax):
    labels = np.array([[1, 0], [1, 0], [0, 0]])
    predicted = np.array([[1, 1], [0, 0], [0, 0]], dtype=bool)
    image = draw_confusion(ax, (4, 12), labels, predicted)
    np.testing.assert_allclose(image.get_array(), [[0.5, 0.5, 0, 1], [0, 0, 1 / 3, 2 / 3]])
    assert [text.get_text() for text in ax.texts] == ["1", "1", "0", "1", "0", "0", "1", "2"]


def test_pyplot_stays_out():
    code = (
        "import sys; import aullm_dist.figures.evidence, aullm_dist.figures.graph; "
        "assert 'matplotlib.pyplot' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_matplotlib_prints_by_itself_is_a_line_of_ours_or_none(tmp_path, caplog, recwarn):
    import logging

    from aullm_dist.figures import style
    from aullm_dist.report.sections import Gallery

    style._tell_of_missing_letters.cache_clear()
    gallery = Gallery(tmp_path)
    with caplog.at_level(logging.WARNING, "aullm_dist"):
        for number in range(2):
            figure, axes = style.new_figure(1, 1)
            axes[0, 0].set_title("\u9762\u90e8")
            gallery.add(figure, f"picture-{number}", "", "")
    assert [record.getMessage() for record in caplog.records if "no letters" in record.getMessage()] == [
        "The font of the figures has no letters for some names; boxes stand in their place"
    ]
    assert not list(recwarn)
    logger = logging.getLogger("matplotlib")
    with caplog.at_level(logging.WARNING, "matplotlib"):
        logger.warning("Matplotlib created a temporary cache directory at %s", "/tmp/x")
        logger.warning("something else")
    assert [record.getMessage() for record in caplog.records if record.name == "matplotlib"] == ["something else"]
