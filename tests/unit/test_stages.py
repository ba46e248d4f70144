"""An answer in stages: logits add up, later stages start from the evidence, and old checkpoints keep the old answer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from aullm_dist.config import from_dict, load, to_dict
from aullm_dist.model.graph import AUGraph, GraphSizes, GraphStart
from aullm_dist.model.losses import AsymmetricLoss
from aullm_dist.model.projector import TokenHead
from aullm_dist.model.relations import build_relations
from aullm_dist.training.build import build_model
from aullm_dist.training.objective import Objective

AUS = (1, 2, 4, 7, 12)
NEW = {
    "projector.around.weight", "projector.au_head.weight", "projector.au_head.bias", "graph.read_evidence",
    "graph.around.weight", "graph.answer.weight",
}  # fmt: skip
"""Parameters that an answer in stages brings."""


@pytest.fixture(scope="module")
def build(tiny_llm):
    def make(*overrides):
        config = load(None, [f"model.llm={tiny_llm}", "model.visual=led", *overrides])
        return config, build_model(config, AUS, config.model.llm)

    return make


def inputs(built, branches=None):
    views = torch.rand(2, 6, 64, 64, generator=torch.Generator().manual_seed(1))
    view_index = torch.tensor([0, 0, 1])
    mask = None
    if built.relations is not None:
        mask = torch.from_numpy(built.relations.prior_mask).repeat(3, 1)
        mask[1, int(mask[1].nonzero()[0])] = False
    branches = torch.tensor([[0, 0], [0, 1], [1, 2], [1, 0]]) if branches is None else branches
    return views, view_index, mask, branches


def move_heads(model):
    """Give the head that starts at zero something to say."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.reasoner.au_head.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.mark.parametrize("settings", [(), ("model.readout=per_au",), ("model.structure=false",)])
def test_at_first_the_deduction_adds_nothing(build, settings):
    _, built = build(*settings)
    given = inputs(built)
    output = built.model.eval()(*given)
    before = output.evidence_logits[given[3][:, 0]]
    assert built.stages == (("evidence", "structure") if built.relations else ("evidence",))
    if built.relations:
        before = before + (output.graph_logits - output.evidence_logits[given[1]])[given[3][:, 1]]
    torch.testing.assert_close(output.logits, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [64, 4096])
def test_at_first_the_structure_says_again_what_the_evidence_says(width):
    """Through the instruction token; the wider it is, the less the rest of it is in the way."""
    torch.manual_seed(0)
    sizes = GraphSizes(cell_dim=64, high_dim=256, llm_dim=width)
    graph = AUGraph(build_relations(AUS), sizes, GraphStart(embedding_rms=0.02), amends=True).eval()
    evidence = torch.randn(200, len(AUS)) * 3
    with torch.no_grad():
        given = graph(torch.rand(200, 162, 64), torch.rand(200, 256), evidence=evidence)
        read = graph.answer(graph.scale(graph.around(torch.tanh(evidence / 2))))
    said = 2 * torch.tanh(evidence / 2)
    # The token has a fixed size: answers of clips with weak evidence are scaled up.
    size = torch.tanh(evidence / 2).square().mean(1, keepdim=True).sqrt()
    torch.testing.assert_close(read, said / size, rtol=1e-3, atol=1e-4)
    alike = torch.corrcoef(torch.stack([given.logits.flatten(), said.flatten()]))[0, 1]
    assert alike > {64: 0.7, 4096: 0.9}[width]


@pytest.mark.parametrize("settings", [(), ("model.readout=per_au",)])
def test_stages_add_up(build, settings):
    _, built = build(*settings)
    move_heads(built.model.eval())
    views, view_index, mask, branches = given = inputs(built)
    with torch.no_grad():
        output = built.model(*given)
        model = built.model
        cells, high = model.visual(views)
        evidence = model.projector(cells, high)
        graph = model.graph(cells, high, view_index, mask, evidence=evidence.logits)
        deduced = model.reasoner(evidence.token, graph.token, branches)
    expected = evidence.logits[branches[:, 0]] + graph.logits[branches[:, 1]] + deduced
    torch.testing.assert_close(output.logits, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(output.graph_logits, evidence.logits[view_index] + graph.logits, rtol=1e-5, atol=1e-6)
    first = output.stage("evidence", branches[:, 0], branches[:, 1])
    second = output.stage("structure", branches[:, 0], branches[:, 1])
    torch.testing.assert_close(first, evidence.logits[branches[:, 0]])
    torch.testing.assert_close(second, output.graph_logits[branches[:, 1]])
    for part in (graph.logits, deduced):
        assert part.abs().max() > 1e-3


def test_logits_of_a_stage_go_with_its_token(build):
    """A zero content token leaves the bias of the evidence's logits, a zero instruction token adds nothing."""
    _, built = build()
    model = built.model.eval()
    move_heads(model)
    given = inputs(built)
    with torch.no_grad():
        whole, blind, loose = (model(*given, ablate) for ablate in (None, "content", "instruction"))
    torch.testing.assert_close(blind.evidence_logits, model.projector.au_head.bias.expand(2, -1))
    views, view_index, mask, _ = given
    cells, high = model.visual(views)
    graph = model.graph(cells, high, view_index, mask, evidence=blind.evidence_logits)
    torch.testing.assert_close(
        blind.graph_logits, blind.evidence_logits[view_index] + graph.logits, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(loose.evidence_logits, whole.evidence_logits)
    torch.testing.assert_close(loose.graph_logits, whole.evidence_logits[given[1]])
    for output in (blind, loose):
        assert (output.logits - whole.logits).abs().max() > 1e-3


def test_a_step_moves_logits_as_far_in_a_wide_llm():
    """AdamW moves each weight by its learning rate: the logit by that times the sum of what the head reads."""
    for width in (128, 4096):
        head = TokenHead(width, 2, rms=0.02)
        token = torch.full((1, width), 0.02)
        before = head(token)
        head.weight.data += 1e-3
        torch.testing.assert_close(head(token) - before, torch.full((1, 2), 0.128), rtol=1e-3, atol=1e-4)


def test_packed_branches_answer_as_padded_ones(build):
    _, packed = build()
    _, padded = build("model.packing=false")
    for built in (packed, padded):
        move_heads(built.model.eval())
    with torch.no_grad():
        one, two = (built.model(*inputs(built)) for built in (packed, padded))
    torch.testing.assert_close(one.logits, two.logits, rtol=1e-4, atol=1e-5)


def test_the_graph_sees_the_logits_of_the_evidence(build):
    _, built = build()
    model = built.model.eval()
    cells, high = torch.rand(1, 162, 64), torch.rand(1, 256)
    with torch.no_grad():
        silent, loud = (model.graph(cells, high, evidence=torch.full((1, len(AUS)), value)) for value in (0.0, 3.0))
    assert (silent.token - loud.token).abs().max() > 1e-3


def test_every_new_parameter_is_trained_and_saved(build):
    from aullm_dist.checkpoint.tensor_plan import MODULES_FILE, plan_tensors

    _, built = build()
    planned = {item.name: item for item in plan_tensors(built.model)}
    for name in NEW:
        assert planned[name].trainable
        assert planned[name].file == MODULES_FILE


def test_losses_of_the_stages():
    """Against the formulas, on two clips and a twin that is not their business."""
    output = SimpleNamespace(
        logits=torch.tensor([[1.0], [2.0], [9.0]]),
        graph_logits=torch.tensor([[0.5], [1.0], [9.0]]),
        evidence_logits=torch.tensor([[0.25], [0.5], [9.0]]),
    )
    batch = SimpleNamespace(
        sample_ids=["a", "b"], labels=torch.tensor([[1.0], [0.0]]), branches=torch.tensor([[0, 0], [1, 1], [2, 2]]),
        rows={"factual": (torch.tensor([0, 1]), torch.tensor([0, 1]))}, factual_structures=torch.tensor([0, 1]),
    )  # fmt: skip
    config = load(None, ["training.evidence_weight=0.5", "training.graph_weight=0.3"])
    loss, log = Objective.from_config(config)(output, batch)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    # The graph's own answer: what it adds to the evidence.
    parts = {"asl": [1.0, 2.0], "evidence": [0.25, 0.5], "graph": [0.25, 0.5]}
    expected = {name: bce(torch.tensor(z)[:, None], batch.labels) for name, z in parts.items()}
    total = expected["asl"] + 0.5 * expected["evidence"] + 0.3 * expected["graph"]
    torch.testing.assert_close(loss, total)
    for name, value in expected.items():
        torch.testing.assert_close(log[name][0] / log[name][1], value)
    for weight in ("evidence", "graph"):
        config = load(None, [f"training.{weight}_weight=0"])
        assert weight not in Objective.from_config(config)(output, batch)[1]


def test_the_default_loss_is_binary_cross_entropy():
    training = load().training
    loss = AsymmetricLoss(training.asl_gamma_negative, training.asl_gamma_positive, training.asl_margin)
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(loss(logits, labels)[0], expected)


def test_what_does_not_say_how_it_answers_is_of_the_old_kind(build):
    recorded = to_dict(load())
    assert from_dict(recorded, "x").model.answer == "stages"
    del recorded["model"]["answer"]
    assert from_dict(recorded, "x").model.answer == "deduction"
    _, built = build("model.answer=deduction")
    assert "answer" not in built.model_config
    names = {name for name, _ in built.model.named_parameters()}
    assert not names & NEW
    output = built.model.eval()(*inputs(built))
    assert output.evidence_logits is None
    assert built.stages == ()
    assert np.isfinite(output.graph_logits.detach().numpy()).all()
