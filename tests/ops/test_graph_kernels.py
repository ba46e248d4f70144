"""The kernels of graph_attention against the reference in float64: gradients, graphs, branches, stray accesses."""

import pytest
import torch
from aullm_kernels import EdgeTable, graph_attention, reference
from kernel_tools import (
    DEVICE,
    KERNELS,
    TOLERANCES,
    error,
    gradients,
    inside_nan,
    poisoned_and_fenced,
    random_edges,
    rounding_casts,
    shuffled_programs,
)

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = pytest.mark.filterwarnings("ignore:.*FP fusion.*")


def make_inputs(edges, rows, heads, features, relations, branches=None, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(rows + heads + features + relations)
    branches = rows if branches is None else branches
    shapes = {
        "xl": (rows, edges.num_nodes, heads, features),
        "xr": (rows, edges.num_nodes, heads, features),
        "relation_embedding": (relations, heads, features),
        "attention": (heads, features),
        "gate": (relations, heads),
        "strength": (branches, edges.num_edges),
    }
    return {name: (scale * torch.randn(*s, generator=generator)).to(dtype).to(DEVICE) for name, s in shapes.items()}


def both(edges, inputs, mask=None, branch_index=None):
    """Results and gradients of the kernels, and of the reference in float64 on the same rounded inputs."""
    options = {"edges": edges, "mask": mask, "branch_index": branch_index}
    branches = inputs["strength"].shape[0]
    grad = torch.randn(branches, *inputs["xl"].shape[1:], generator=torch.Generator().manual_seed(5))
    grad = grad.to(inputs["xl"].dtype).to(DEVICE)
    found = gradients(lambda **kw: graph_attention(**kw, **options, implementation=KERNELS), inputs, grad)
    wide = {name: value.double() for name, value in inputs.items()}
    return found, gradients(lambda **kw: reference.graph_attention(**kw, **options), wide, grad.double())


def check(edges, inputs, factor=1.0, **options):
    found, expected = both(edges, inputs, **options)
    for name, value in found.items():
        assert error(value, expected[name]) <= factor * TOLERANCES[inputs["xl"].dtype], name
    return found


def index(*values):
    return torch.tensor(values, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    ("nodes", "num_edges", "heads", "features", "relations"),
    [
        (8, 20, 2, 16, 5),
        (17, 40, 1, 20, 1),
        (4, 24, 3, 3, 16),
        (5, 6, 1, 64, 2),
        (3, 4, 2, 48, 2),
        (1, 1, 4, 24, 1),
    ],
)
def test_every_size_agrees_with_float64(nodes, num_edges, heads, features, relations):
    edges = random_edges(nodes, num_edges, relations)
    check(edges, make_inputs(edges, 2, heads, features, relations))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_type_agrees_with_float64(dtype):
    if DEVICE == "cuda" and dtype == torch.float64:
        pytest.skip("float64 runs in the interpreter only")
    edges = random_edges(6, 12, 3)
    mask = torch.rand(2, 12, device=DEVICE) > 0.3
    check(edges, make_inputs(edges, 2, 1, 16, 3, dtype=dtype), mask=mask)


def test_bfloat16_features_with_parameters_in_float32():
    edges = random_edges(6, 12, 3)
    inputs = make_inputs(edges, 2, 1, 16, 3)
    inputs["xl"], inputs["xr"] = inputs["xl"].bfloat16(), inputs["xr"].bfloat16()
    found = check(edges, inputs)
    assert found["out"].dtype == found["xl"].dtype == torch.bfloat16
    assert found["gate"].dtype == torch.float32


def test_the_errors_in_bfloat16_are_those_of_plain_bfloat16(monkeypatch):
    """At most 1.2 times those of the same function in bfloat16 throughout: of the result and of every gradient."""
    edges = random_edges(8, 30, 5)
    inputs = make_inputs(edges, 2, 1, 16, 5, dtype=torch.bfloat16)
    with rounding_casts(monkeypatch):
        found, expected = both(edges, inputs)
    grad = torch.randn(inputs["xl"].shape, generator=torch.Generator().manual_seed(5)).bfloat16().to(DEVICE)
    plain = gradients(lambda **kw: plain_bfloat16(edges, **kw), inputs, grad)
    for name, value in plain.items():
        assert error(found[name], expected[name]) <= 1.2 * error(value, expected[name]), name


def plain_bfloat16(edges, xl, xr, relation_embedding, attention, gate, strength):
    """The formula with everything in the inputs' type, on the edges that a node has."""
    slots = edges.incoming.clamp(min=0)
    relation, neighbour = edges.relation[slots], xr[:, edges.source[slots]]
    z = torch.nn.functional.leaky_relu(xl[:, :, None] + neighbour + relation_embedding[relation], 0.2)
    score = (z * attention).sum(-1) + strength[:, slots][..., None]
    score = score.masked_fill((edges.incoming < 0)[None, :, :, None], -1e9)
    weight = score.softmax(2) * (edges.incoming >= 0)[None, :, :, None] * gate[relation]
    return (weight[..., None] * neighbour).sum(2)


@pytest.mark.parametrize("order", [(1, 0, 1, 1), (1, 1, 1), (0, 1), ()])
def test_branches_share_features(order):
    """Features are scored once; a row may serve several branches in any order, or none."""
    edges = random_edges(7, 16, 3)
    inputs = make_inputs(edges, 2, 2, 16, 3, branches=len(order))
    mask = torch.rand(len(order), 16, device=DEVICE) > 0.4
    check(edges, inputs, mask=mask, branch_index=index(*order))


def test_nodes_without_edges_give_zero_and_finite_gradients():
    edges = random_edges(5, 8, 2)
    mask = torch.rand(3, 8, device=DEVICE) > 0.3
    mask[1] = False
    found = check(edges, make_inputs(edges, 3, 2, 16, 2), mask=mask)
    assert (found["out"][:, 4] == 0).all()
    assert (found["out"][1] == 0).all()
    for name in ("xl", "xr", "strength"):
        assert (found[name][1] == 0).all()


def test_loops_a_hub_and_a_graph_without_edges():
    everywhere = torch.arange(12)
    hub = EdgeTable(torch.zeros(12, dtype=torch.int64), everywhere, everywhere % 2, 12).to(DEVICE)
    check(hub, make_inputs(hub, 1, 1, 16, 2))
    loops = EdgeTable(everywhere, everywhere, everywhere % 2, 12).to(DEVICE)
    check(loops, make_inputs(loops, 1, 1, 16, 2))
    nothing = torch.empty(0, dtype=torch.int64)
    empty = EdgeTable(nothing, nothing, nothing, 3).to(DEVICE)
    found = check(empty, make_inputs(empty, 2, 1, 16, 1))
    assert (found["out"] == 0).all()
    assert found["strength"].shape == (2, 0)


def test_no_rows_and_no_strength():
    edges = random_edges(4, 5, 2)
    found = check(edges, make_inputs(edges, 0, 1, 16, 2))
    assert (found["attention"] == 0).all()
    inputs = make_inputs(edges, 2, 1, 16, 2)
    del inputs["strength"]
    options = {"edges": edges, "implementation": KERNELS}
    found = gradients(lambda **kw: graph_attention(**kw, **options), inputs)
    expected = gradients(lambda **kw: graph_attention(**kw, edges=edges, implementation="torch"), inputs)
    assert all(error(found[name], expected[name]) < 1e-5 for name in found)


def test_large_scores_and_equal_neighbours():
    edges = random_edges(5, 12, 2)
    inputs = make_inputs(edges, 2, 1, 16, 2)
    inputs["strength"] = inputs["strength"] * 80
    check(edges, inputs, factor=20)
    inputs = make_inputs(edges, 2, 1, 16, 1)
    alike = EdgeTable(edges.target, edges.source, torch.zeros_like(edges.relation), 5)
    inputs["xr"] = inputs["xr"][:, :1].expand(-1, 5, -1, -1)
    # Equal messages leave nothing for the scores to change.
    found, expected = both(alike, inputs)
    assert error(found["out"], expected["out"]) < 1e-5
    for name in ("xl", "attention", "relation_embedding", "strength"):
        assert found[name].abs().max() < 1e-4, name


def test_any_layout_in_memory():
    edges = random_edges(6, 9, 2)
    inputs = make_inputs(edges, 2, 2, 16, 2)
    inputs["xl"] = inputs["xl"].transpose(1, 2).contiguous().transpose(1, 2)
    inputs["xr"] = torch.cat([inputs["xr"].new_zeros(1), inputs["xr"].flatten()])[1:].view(inputs["xr"].shape)
    inputs["gate"] = inputs["gate"].t().contiguous().t()
    inputs["strength"] = inputs["strength"][:1].expand(2, -1)
    mask = (torch.rand(1, 9, device=DEVICE) > 0.3).expand(2, -1)
    check(edges, inputs, mask=mask)


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 runs in the interpreter only")
def test_gradcheck_of_the_kernels():
    edges = EdgeTable(index(0, 0, 1, 1), index(1, 2, 0, 0), index(0, 1, 0, 1), 3)
    inputs = make_inputs(edges, 1, 1, 2, 2, branches=2, dtype=torch.float64)
    mask = torch.tensor([[True, True, True, True], [True, False, True, True]])

    def call(*values):
        named = dict(zip(inputs, values, strict=True))
        return graph_attention(**named, edges=edges, mask=mask, branch_index=index(0, 0), implementation=KERNELS)

    assert torch.autograd.gradcheck(call, tuple(value.requires_grad_() for value in inputs.values()))


@pytest.mark.parametrize("shared", [False, True])
def test_nothing_is_left_unwritten_and_nothing_strays(shared, monkeypatch):
    edges = random_edges(5, 9, 3)
    inputs = make_inputs(edges, 2, 2, 20, 3, branches=3 if shared else 2)
    inputs = {name: inside_nan(value) for name, value in inputs.items()}
    options = {"branch_index": index(1, 1, 1) if shared else None, "mask": None}
    call = lambda **kw: graph_attention(**kw, **options, edges=edges, implementation=KERNELS)  # noqa: E731
    clean = gradients(call, inputs)
    with poisoned_and_fenced(monkeypatch) as allocated:
        found = gradients(call, inputs)
    assert len(allocated) >= 8
    for value in allocated:
        assert torch.isfinite(value).all()
    for name, value in found.items():
        assert torch.equal(value, clean[name]), name


def test_equal_runs_are_bitwise_equal_in_any_order_of_programs(monkeypatch):
    edges = random_edges(18, 20, 3)
    inputs = make_inputs(edges, 3, 2, 16, 3)
    call = lambda **kw: graph_attention(**kw, edges=edges, implementation=KERNELS)  # noqa: E731
    expected = gradients(call, inputs)
    if DEVICE == "cuda":
        found = gradients(call, inputs)
    else:
        with shuffled_programs(monkeypatch, seed=1):
            found = gradients(call, inputs)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_number_of_programs_changes_no_gradient_of_a_feature(monkeypatch):
    """Programs loop over feature rows, and only sums of parameters depend on how many there are."""
    from aullm_kernels import buffers

    edges = random_edges(5, 9, 3)
    inputs = make_inputs(edges, 4, 1, 16, 3)
    many, expected = both(edges, inputs)
    monkeypatch.setattr(buffers, "families", lambda: {"hopper": {"programs": 2}})
    few, _ = both(edges, inputs)
    for name, value in few.items():
        if name in ("out", "xl", "xr", "strength"):
            assert torch.equal(value, many[name]), name
        assert error(value, expected[name]) <= TOLERANCES[torch.float32], name
