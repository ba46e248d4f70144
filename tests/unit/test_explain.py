"""What a model says of the way to its answer: it is the same answer, and the parts are those that were used."""

import pytest
import torch

from aullm_dist.config import load
from aullm_dist.data.views import view_shape
from aullm_dist.training.build import build_model

AUS = (1, 2, 4, 7, 12)


@pytest.fixture
def explain(tiny_llm):
    def run(*overrides, edge_mask=None):
        config = load(None, [f"model.llm={tiny_llm}", "data.num_frames=6", "data.size=64", *overrides])
        built = build_model(config, AUS, config.model.llm)
        model = built.model.eval()
        views = torch.rand(3, *view_shape(model.stream, 6, 64), generator=torch.Generator().manual_seed(1))
        if edge_mask is not None:
            edge_mask = edge_mask(torch.from_numpy(built.relations.prior_mask))
        given = model.explain(views, edge_mask)
        index = torch.arange(3)
        mask = edge_mask
        if mask is None and built.relations:
            mask = torch.from_numpy(built.relations.prior_mask).expand(3, -1)
        with torch.no_grad():
            answer = model(views, index, mask, index[:, None].expand(-1, 2)).logits
        torch.testing.assert_close(given.logits, answer, rtol=0, atol=1e-5)
        return given, built, model, views

    return run


@pytest.mark.parametrize("readout", ["last", "per_au"])
def test_the_parts_are_those_of_the_answer(explain, readout):
    given, built, model, views = explain(f"model.readout={readout}")
    heads, cells, width = model.projector.heads, model.visual.num_cells, model.projector.down.out_features
    assert given.evidence.shape == (3, heads, cells)
    assert given.gaze.shape == (3, len(AUS), cells)
    for weights in (given.evidence, given.gaze):
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
    assert given.content.shape == given.instruction.shape == given.hidden.shape == (3, width)
    torch.testing.assert_close(given.high, model.visual(views)[1])
    if readout == "last":
        assert not model.reasoner.au_head(given.hidden).any()  # it starts at 0; test_stages.py moves it
        torch.testing.assert_close(model.projector(*model.visual(views)).logits, given.evidence_logits)
        torch.testing.assert_close(given.structure_logits, given.logits, rtol=0, atol=1e-5)
        assert (given.structure_logits - given.evidence_logits).abs().max() > 0.1


def test_influence_is_what_the_nodes_receive(explain):
    given, built, model, _ = explain()
    relations = built.relations
    off = ~torch.from_numpy(relations.prior_mask)
    assert off.any()
    assert (given.influence[:, off] == 0).all()
    positive = torch.from_numpy(relations.relation != relations.names.index("antagonist")) & ~off
    assert (given.influence[:, positive] > 0).all()
    assert (given.influence[:, ~positive & ~off] < 0).all()
    # The shares of a node add up to 1 before its relations' gates, so no edge weighs more than its gate.
    bound = torch.tanh(model.graph.layers[-1].gate).abs().amax()
    assert given.influence.abs().max() <= bound


def test_an_edge_that_is_cut_weighs_nothing_and_the_strengths_stay(explain):
    whole, built, _, _ = explain()
    first = int(built.relations.prior_mask.nonzero()[0][0])

    def cut(mask):
        mask = mask.repeat(3, 1)
        mask[1, first] = False
        return mask

    edited, *_ = explain(edge_mask=cut)
    torch.testing.assert_close(edited.strengths, whole.strengths)
    assert edited.influence[1, first] == 0 != whole.influence[1, first]
    torch.testing.assert_close(edited.influence[0], whole.influence[0])
    assert not torch.allclose(edited.instruction[1], whole.instruction[1], atol=1e-6)


def test_what_is_not_there_is_none(explain):
    given, *_ = explain("model.structure=false")
    assert given.instruction is given.gaze is given.strengths is given.influence is None
    given, *_ = explain("model.evidence=high_only")
    assert given.evidence.shape[1] == 0
    given, *_ = explain("model.llm=none")
    assert given.content is given.hidden is None
    assert given.high.shape[0] == 3
