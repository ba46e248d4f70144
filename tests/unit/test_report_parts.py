"""The parts of a report: the domain gap, curves from event files, example clips, figures and the page itself."""

from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.colors import to_hex

from aullm_dist.data.protocols import Fold
from aullm_dist.errors import UserError
from aullm_dist.evaluation.blocks import Block
from aullm_dist.figures.curves import draw_curves, median_curve
from aullm_dist.figures.differences import draw_differences
from aullm_dist.figures.embedding import draw_embedding
from aullm_dist.figures.relations import draw_relations
from aullm_dist.figures.style import new_figure
from aullm_dist.model.relations import build_relations
from aullm_dist.monitoring.writer import LOSS, Monitor
from aullm_dist.prediction.explain import ExplainedClips
from aullm_dist.report.domain_gap import domain_gap, embed
from aullm_dist.report.page import Part, write_page
from aullm_dist.report.reasons import choose_clips
from aullm_dist.report.sections import Gallery, Listing, Picture, Section, attempted
from aullm_dist.report.training_curves import read_scalars


def clips_of(subjects=6, clips=5, corpora=("casme2", "samm")):
    """Return (corpora, subjects) of clips, as many of each corpus."""
    rows = [(c, f"{c}/s{s}") for c in corpora for s in range(subjects) for _ in range(clips)]
    return [row[0] for row in rows], [row[1] for row in rows]


def test_the_gap_is_wide_between_shifted_corpora_and_none_between_equal_ones():
    corpora, subjects = clips_of(10)
    noise = np.random.default_rng(0).normal(size=(len(corpora), 6))
    shifted = noise + 4.0 * np.array([name == "samm" for name in corpora])[:, None]
    far, near = (domain_gap(values, corpora, subjects, resamples=300) for values in (shifted, noise))
    assert far.balanced_accuracy > 0.95
    assert near.ci[0] < 0.5 < near.ci[1]
    assert near.chance == 0.5
    assert (far.clips, far.subjects) == (100, 20)
    assert domain_gap(noise, corpora, subjects, resamples=0).ci is None


def test_the_gap_cannot_be_told_by_recognising_people():
    """Features that name the subject, and nothing else, say nothing of the corpus of a person not met before."""
    corpora, subjects = clips_of(8)
    names = sorted(set(subjects))
    people = np.random.default_rng(1).normal(size=(len(names), 40))
    values = people[[names.index(name) for name in subjects]]
    assert domain_gap(values, corpora, subjects, resamples=0).balanced_accuracy < 0.8


def test_a_corpus_of_two_people_is_always_there_to_learn_from():
    corpora, subjects = (sum(pair, []) for pair in zip(clips_of(2, 9, ("a",)), clips_of(9, 2, ("b",)), strict=True))
    values = np.array([[1.0] if name == "a" else [-1.0] for name in corpora])
    for seed in range(8):
        assert domain_gap(values, corpora, subjects, resamples=0, seed=seed).balanced_accuracy == 1.0


@pytest.mark.parametrize(
    ("subjects", "corpora", "text"), [(6, ("samm",), "one corpus"), (1, ("a", "b"), "one subject")]
)
def test_a_gap_that_cannot_be_measured_is_refused(subjects, corpora, text):
    where, who = clips_of(subjects, corpora=corpora)
    with pytest.raises(UserError, match=text):
        domain_gap(np.zeros((len(where), 3)), where, who)


def test_the_embedding_is_seeded_and_keeps_clusters_together(monkeypatch):
    monkeypatch.setattr("aullm_dist.report.domain_gap.MOST_POINTS", 40)
    values = np.random.default_rng(0).normal(size=(60, 8)) + 30.0 * (np.arange(60) % 2)[:, None]
    shown, places = embed(values, seed=3)
    again = embed(values, seed=3)
    assert np.array_equal(shown, again[0])
    assert np.array_equal(places, again[1])
    assert places.shape == (40, 2)
    odd = places[shown % 2 == 1]
    even = places[shown % 2 == 0]
    inside = max(np.ptp(odd, axis=0).max(), np.ptp(even, axis=0).max())
    assert np.linalg.norm(odd.mean(0) - even.mean(0)) > 0.5 * inside
    with pytest.raises(UserError, match="too few"):
        embed(values[:5])


def test_scalars_of_a_resumed_fold_are_read_once_per_step(tmp_path):
    # Older versions wrote the group in small letters; a run may have been resumed by a newer one.
    for group, first, value in (("loss", None, 1.0), (LOSS, 3, 5.0)):
        monitor = Monitor(tmp_path, True, first)
        for step in range(first or 1, 5):
            monitor.scalars(group, {"loss": value}, step)
        monitor.close()
    steps, values = read_scalars(tmp_path)["loss/loss"]
    assert steps.tolist() == [1, 2, 3, 4]
    assert values.tolist() == [1.0, 1.0, 5.0, 5.0]


def test_a_damaged_event_file_gives_what_lies_before_the_damage(tmp_path):
    monitor = Monitor(tmp_path, True, None)
    for step in (1, 2):
        monitor.scalars("loss", {"loss": 0.5}, step)
    monitor.close()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-5] + b"rubbish")
    assert read_scalars(tmp_path)["loss/loss"][0].tolist()[:1] == [1]
    file.write_bytes(b"not an event file at all, but long enough for a header")
    assert read_scalars(tmp_path) == {}


def test_example_clips_are_test_clips_of_different_people():
    _, subjects = clips_of(4, 3, ("samm",))
    names = tuple(f"{subject}/{index}" for index, subject in enumerate(subjects))
    labels = np.zeros((12, 2))
    labels[[0, 1, 3, 6, 9]] = 1
    clips = ExplainedClips(None, (1, 4), names, tuple(subjects), ("samm",) * 12, labels, {}, None, (2, 9, 9), 6)
    fold = Fold(0, "x", names[9:], (), names[:9])
    chosen = choose_clips(clips, fold, 3, seed=0)
    assert {subjects[index] for index in chosen} == {"samm/s0", "samm/s1", "samm/s2"}
    assert all(labels[index].any() for index in chosen)
    assert chosen == choose_clips(clips, fold, 3, seed=0)
    assert len(choose_clips(clips, fold, 99, seed=0)) == 9


def test_many_folds_are_drawn_with_their_median():
    curves = {f"fold-{k:02d}": (np.array([1, 2]), np.array([k, 2.0 * k])) for k in range(9)}
    assert median_curve(curves)[1].tolist() == [4.0, 8.0]
    few, many = new_figure(4, 3)[1][0, 0], new_figure(4, 3)[1][0, 0]
    draw_curves(few, {"fold-00": curves["fold-08"]}, ylabel="loss (no unit)")
    draw_curves(many, curves, ylabel="loss (no unit)")
    assert len(few.lines) == 1
    assert len(many.lines) == 10
    assert many.lines[-1].get_ydata().tolist() == [4.0, 8.0]
    assert many.get_xlabel() == "optimizer step"
    with pytest.raises(ValueError, match="2 steps for 1"):
        draw_curves(few, {"a": (np.array([1, 2]), np.array([1]))}, ylabel="x")


def test_a_difference_whose_interval_leaves_zero_out_is_filled():
    ax = new_figure(4, 3)[1][0, 0]
    draw_differences(ax, [("AU1", 3.0, (1.0, 5.0)), ("AU4", 1.0, (-1.0, 3.0)), ("AU9", None, None)], xlabel="points")
    points = [line for line in ax.lines if line.get_marker() == "o"]
    assert [to_hex(point.get_markerfacecolor()) == "#ffffff" for point in points] == [False, True]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["AU1", "AU4", "AU9"]
    assert ax.get_ylim() == (2.5, -0.5)


def test_groups_differ_in_shape_and_axes_say_that_they_have_no_unit():
    ax = new_figure(4, 3)[1][0, 0]
    draw_embedding(ax, np.arange(8.0).reshape(4, 2), ["b", "a", "b", "b"])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a (1)", "b (3)"]
    first, second = (points.get_paths()[0].vertices for points in ax.collections)
    assert first.shape != second.shape
    assert "(no unit)" in ax.get_xlabel()
    with pytest.raises(ValueError, match="finite"):
        draw_embedding(ax, np.full((1, 2), np.nan), ["a"])


def test_edges_stand_above_their_relation_and_candidates_do_not():
    relations = build_relations((1, 2, 4, 7, 12))
    values = np.where(relations.prior_mask, np.arange(relations.num_edges), 1000.0)
    ax = new_figure(4, 3)[1][0, 0]
    draw_relations(ax, relations.describe(), values, ylabel="strength (no unit)")
    drawn = np.concatenate([line.get_ydata() for line in ax.lines if line.get_marker() != "None"])
    assert sorted(drawn) == sorted(values[relations.prior_mask])
    names = [text.get_text().split("\n")[0] for text in ax.get_xticklabels()]
    assert names[:2] == ["co-occur", "antagonist"]


class _Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.tags, self.without_alt = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append(tag)
        self.found += [given[key] for key in ("src", "href") if key in given]
        self.without_alt += tag == "img" and not given.get("alt")


def test_the_page_escapes_what_runs_say_and_asks_for_nothing_from_outside(tmp_path):
    evil = "<script>alert('AU1 & \"AU2\"')</script>"
    section = Section(
        evil, [evil], [Block((evil, evil), (evil, "b"), ((evil, "1"),), (evil,))], [Picture("a", evil, evil)],
        [Listing(evil, evil)], [evil],
    )  # fmt: skip
    page = write_page(tmp_path, [Part(evil, "run-1", [section])], [evil], {"aullm_dist": "1"})
    text = page.read_text(encoding="utf-8")
    links = _Links(text)
    assert "script" not in links.tags
    assert text.count("&lt;script&gt;") > 10
    assert {link for link in links.found if not link.startswith("#")} == {"figures/a.svg", "figures/a.png"}
    assert links.without_alt == 0
    assert "http://" not in text.replace('http-equiv="', "")
    assert "https://" not in text


def test_figures_are_written_twice_and_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        figure, axes = new_figure(2, 2)
        axes[0, 0].plot([0, 1])
        picture = Gallery(tmp_path / name, "run1-").add(figure, "x", "caption", "alt")
        assert picture.name == "run1-x"
    for ending in ("png", "svg"):
        one, two = (tmp_path / name / "figures" / f"run1-x.{ending}" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()


def test_a_figure_says_what_limits_its_run(tmp_path):
    """A figure is copied without its page; what is above it takes no room from what it shows."""
    sizes = []
    for mark in ("", "synthetic faces"):
        figure, axes = new_figure(2, 2)
        axes[0, 0].plot([0, 1])
        Gallery(tmp_path / (mark or "none"), mark=mark).add(figure, "x", "caption", "alt")
        assert figure.get_suptitle() == mark
        sizes.append(axes[0, 0].get_window_extent().height)
    assert 0.8 * sizes[0] < sizes[1] < sizes[0]


def test_what_fails_is_missing_and_the_rest_is_there():
    def good(section):
        section.paragraphs.append("good")

    def bad(section):
        raise UserError("RUN: gone")

    def unreadable(section):
        raise PermissionError(13, "Permission denied", "RUN/x")

    section = attempted(Section("title"), bad, unreadable, good)
    assert section.paragraphs == ["good"]
    assert section.missing == ["RUN: gone", "RUN/x: Permission denied"]
    with pytest.raises(ZeroDivisionError):
        attempted(Section("title"), lambda section: 1 / 0)
