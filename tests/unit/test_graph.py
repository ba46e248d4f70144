"""The AU graph (R-AUGNN), its prior and the interventions on the prior."""

import numpy as np
import pytest
import torch

from aullm_dist.data.corpora import CORPORA
from aullm_dist.errors import UserError
from aullm_dist.facs import AU_NAMES, CROSS_AUS, RELATION_ROWS
from aullm_dist.model.graph import AUGraph, GraphSizes, GraphStart, first_gaze, project_names
from aullm_dist.model.relations import (
    MAX_IN_DEGREE,
    build_relations,
    relation_between,
    sample_structure_edit,
    training_statistics,
)

CASME2 = CORPORA["casme2"].aus
AU_SETS = (*(spec.aus for spec in CORPORA.values()), CROSS_AUS)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_graph(aus=CASME2, **changes):
    sizes = {name: changes.pop(name) for name in ("width", "heads", "layers") if name in changes}
    shape = GraphSizes(cell_dim=8, high_dim=12, llm_dim=32, **{"width": 16, "heads": 2, **sizes})
    start = GraphStart(au_embedding=changes.pop("au_embedding", None), embedding_rms=0.02)
    return AUGraph(build_relations(aus), shape, start, **changes)


def inputs(views=2):
    return torch.randn(views, 162, 8), torch.randn(views, 12)


def edge_of(relations, target_au, source_au):
    target, source = relations.aus.index(target_au), relations.aus.index(source_au)
    (edge,) = np.flatnonzero((relations.target == target) & (relations.source == source))
    return int(edge)


@pytest.mark.parametrize(
    ("pair", "relation"),
    [
        ((1, 2), "co-occur"),
        ((7, 1), "antagonist"),  # although fear shows both
        ((4, 1), "subset"),
        ((15, 12), "antagonist"),
        ((1, 5), "co-occur"),
        ((12, 14), "subset"),
        ((14, 15), "region"),
        ((2, 14), None),
        ((56, 61), None),
    ],
)
def test_a_pair_has_its_strongest_relation(pair, relation):
    assert relation_between(*pair) == relation
    assert relation_between(*pair[::-1]) == relation


@pytest.mark.parametrize("aus", [*AU_SETS, tuple(AU_NAMES), (12,)])
def test_the_prior_is_sparse_symmetric_and_has_self_edges(aus):
    relations = build_relations(aus)
    pairs = list(zip(relations.target.tolist(), relations.source.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    prior = {pair for pair, kept in zip(pairs, relations.prior_mask, strict=True) if kept}
    assert prior == {(j, i) for i, j in prior}
    assert prior >= {(i, i) for i in range(len(aus))}
    for (i, j), relation, kept in zip(pairs, relations.relation, relations.prior_mask, strict=True):
        name = relations.names[relation]
        expected = "self" if i == j else relation_between(aus[i], aus[j])
        assert name == (expected or "co-occur")
        assert kept == (expected is not None)
    degree = np.bincount(relations.target[relations.prior_mask], minlength=len(aus))
    assert (np.bincount(relations.target, minlength=len(aus)) <= np.maximum(degree, MAX_IN_DEGREE)).all()
    if len(aus) <= MAX_IN_DEGREE:
        assert len(pairs) == len(aus) ** 2
    assert relations.edge_table().num_edges == relations.num_edges


def test_wrong_vocabularies_are_refused():
    for aus in ((), (1, 2, 1)):
        with pytest.raises(UserError, match="one or more different AU numbers"):
            build_relations(aus)


@pytest.mark.parametrize("aus", [*AU_SETS, tuple(AU_NAMES)])
def test_structure_edits_are_small_and_leave_every_node_an_edge(aus):
    relations = build_relations(aus)
    rng = np.random.default_rng(0)
    loops = relations.target == relations.source
    related = relations.prior_mask & ~loops
    rewired = 0
    for _ in range(200):
        mask = sample_structure_edit(relations, 0.25, rng)
        cut, added = relations.prior_mask & ~mask, mask & ~relations.prior_mask
        assert 1 <= cut.sum() <= max(1, 0.25 * related.sum())
        assert added.sum() <= cut.sum()
        rewired += added.sum()
        assert mask[loops].all()
        for node in range(len(aus)):
            into = relations.target == node
            assert added[into].sum() <= cut[into].sum()
            if related[into].any():
                assert (mask & into & ~loops).any()
    assert rewired > 0


def test_structure_edits_come_from_the_generator_alone():
    relations = build_relations(CASME2)
    draws = [sample_structure_edit(relations, 0.2, np.random.default_rng(seed)) for seed in (3, 3, 4)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()


def test_structure_edits_where_there_is_little_to_edit():
    rng = np.random.default_rng(0)
    lonely = build_relations((12,))
    assert (sample_structure_edit(lonely, 0.5, rng) == lonely.prior_mask).all()
    pair = build_relations((1, 2))
    assert (sample_structure_edit(pair, 0.0, rng) != pair.prior_mask).sum() == 1
    with pytest.raises(UserError, match="allowed are numbers from 0 to 1"):
        sample_structure_edit(pair, 1.5, rng)


def test_training_statistics_have_the_sign_that_the_relation_expects():
    relations = build_relations((1, 2, 7, 12))
    brow = np.array([1, 1, 0, 0, 1, 0])
    labels = np.stack([brow, brow, 1 - brow, np.zeros(6)], axis=1)
    strength = training_statistics(relations, labels)
    assert strength[edge_of(relations, 1, 2)] == pytest.approx(1.0)
    assert strength[edge_of(relations, 1, 7)] == pytest.approx(1.0)
    assert strength[edge_of(relations, 12, 1)] == 0
    assert (strength[relations.target == relations.source] == 0).all()
    assert (training_statistics(relations, np.zeros((0, 4))) == 0).all()
    for given in (strength, strength.astype(np.float64)):
        graph = AUGraph(
            relations,
            GraphSizes(cell_dim=8, high_dim=12, llm_dim=32, width=16, heads=2),
            GraphStart(edge_strength=given),
        )
        assert torch.equal(graph.edge_strength.detach(), torch.from_numpy(strength))
        assert graph.edge_strength.dtype == torch.float32


def test_the_graph_gives_a_scaled_token_logits_and_strengths():
    graph = make_graph()
    mask = torch.from_numpy(np.stack([build_relations(CASME2).prior_mask] * 3))
    out = graph(*inputs(), torch.tensor([0, 1, 0]), mask)
    assert out.token.shape == (3, 32)
    assert out.logits.shape == (3, 8)
    assert out.strengths.shape == (3, graph.num_edges)
    torch.testing.assert_close(out.token.square().mean(1).sqrt(), torch.full((3,), 0.02), rtol=1e-2, atol=0)
    ((out.token * torch.randn(3, 32)).sum() + out.logits.square().sum()).backward()
    for name, parameter in graph.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_branches_of_one_view_equal_views_of_their_own():
    graph = make_graph().eval()
    cells, high = inputs()
    relations = build_relations(CASME2)
    rng = np.random.default_rng(0)
    mask = torch.from_numpy(np.stack([sample_structure_edit(relations, 0.3, rng) for _ in range(3)]))
    index = torch.tensor([1, 0, 1])
    shared = graph(cells, high, index, mask, return_influence=True)
    own = graph(cells[index], high[index], None, mask, return_influence=True)
    torch.testing.assert_close(shared[:-1], own[:-1])
    torch.testing.assert_close(shared.gaze[index], own.gaze)


def test_without_a_mask_the_prior_holds_and_an_edit_changes_the_token():
    graph = make_graph().eval()
    cells, high = inputs(1)
    relations = build_relations(CASME2)
    prior = torch.from_numpy(relations.prior_mask)[None]
    token = graph(cells, high).token
    assert torch.equal(token, graph(cells, high, None, prior).token)
    edited = torch.from_numpy(sample_structure_edit(relations, 0.3, np.random.default_rng(0)))[None]
    assert not torch.allclose(token, graph(cells, high, None, edited).token, atol=1e-6)
    complete = torch.ones_like(prior)
    assert not torch.allclose(token, graph(cells, high, None, complete).token, atol=1e-6)


def test_gates_start_with_the_sign_of_their_relation():
    relations = build_relations(CASME2)
    for layer in make_graph().layers:
        signs = dict(zip(relations.names, torch.tanh(layer.gate).sign()[:, 0].tolist(), strict=True))
        assert signs == {"co-occur": 1, "antagonist": -1, "subset": 1, "region": 1, "self": 1}


def test_an_antagonist_starts_with_the_opposite_effect_of_a_companion():
    graph = make_graph(layers=1).eval()
    layer = graph.layers[0]
    relations = build_relations(CASME2)
    edges = graph.edges()
    nodes = torch.randn(1, 8, 16)
    effects = []
    for gate in (0.5, -0.5):
        with torch.no_grad():
            layer.gate.fill_(gate)
            mask = torch.zeros(1, graph.num_edges, dtype=torch.bool)
            mask[0, edge_of(relations, 1, 4)] = True
            updated, _ = layer(nodes, edges, torch.zeros(1, graph.num_edges), mask, None)
            effects.append((updated - nodes)[0] - layer.update.bias)
    torch.testing.assert_close(effects[0], -effects[1])
    assert effects[0][0].abs().sum() > 0
    assert effects[0][1:].abs().max() < 1e-6


def test_nodes_start_from_the_names_whatever_the_seed():
    names = 0.02 * torch.randn(8, 32) + 0.5
    torch.manual_seed(1)
    first = make_graph(au_embedding=names).au_embedding
    torch.manual_seed(2)
    second = make_graph(au_embedding=names.bfloat16()).au_embedding
    torch.testing.assert_close(first, second, rtol=0.1, atol=0.3)
    torch.testing.assert_close(first.square().mean(1).sqrt(), torch.ones(8), rtol=1e-3, atol=0)
    assert torch.isfinite(project_names(torch.randn(1, 32), 16)).all()


def test_nodes_first_look_at_their_region():
    gaze = first_gaze((1, 12, 64), (2, 9, 9)).view(3, 2, 9, 9)
    assert gaze[0].sum((0, 2)).argmax() < gaze[1].sum((0, 2)).argmax()
    assert (gaze[2] == 0).all()
    look = make_graph().cell_attention(inputs()[0])
    assert look.shape == (2, 8, 162)
    torch.testing.assert_close(look.sum(-1), torch.ones(2, 8))


def test_the_graph_runs_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        out = make_graph()(*inputs())
    assert out.logits.dtype == out.token.dtype == torch.float32
    assert torch.isfinite(out.token).all()


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="width 16 with 3 heads"):
        make_graph(heads=3)
    with pytest.raises(UserError, match="graph layers: 0"):
        make_graph(layers=0)
    with pytest.raises(ValueError, match="implementation is 'triton', but the tensors are on cpu"):
        make_graph(implementation="triton")(*inputs())


def test_the_prior_cites_no_statistic_of_the_corpora():
    """A correlation measured on the corpora carries the labels of every test subject into the prior."""
    assert all("Pearson" not in row.source and "labels" not in row.source for row in RELATION_ROWS)
    assert len({frozenset((row.first, row.second)) for row in RELATION_ROWS}) == len(RELATION_ROWS)
