"""The two hot functions in plain PyTorch, their argument checks and the choice of implementation."""

import ast
import math
import sys
from pathlib import Path

import aullm_kernels
import pytest
import torch
from aullm_kernels import EdgeTable, dispatch, evidence_attention, evidence_pool, graph_attention, graph_weights


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    torch.manual_seed(0)


def make_edges():
    """Five nodes: 0 with three incoming edges (one pair twice), 1 a loop only, 4 without incoming edges."""
    target, source = [0, 0, 0, 1, 2, 3], [1, 2, 2, 1, 4, 0]
    return EdgeTable(*(torch.tensor(x) for x in (target, source, [0, 1, 2, 1, 0, 2])), num_nodes=5)


def make_graph(branches=2, heads=2, features=3, relations=3, dtype=torch.float64):
    edges = make_edges()
    shapes = {
        "xl": (branches, 5, heads, features),
        "xr": (branches, 5, heads, features),
        "relation_embedding": (relations, heads, features),
        "attention": (heads, features),
        "gate": (relations, heads),
        "strength": (branches, edges.num_edges),
    }
    return edges, {name: torch.randn(*shape, dtype=dtype, requires_grad=True) for name, shape in shapes.items()}


def slow_graph_attention(edges, xl, xr, relation_embedding, attention, gate, strength, mask):
    """The formula, edge by edge."""
    out = torch.zeros_like(xl)
    for g in range(xl.shape[0]):
        for i in range(edges.num_nodes):
            incoming = [e for e in range(edges.num_edges) if edges.target[e] == i and mask[g, e]]
            for h in range(xl.shape[2]):
                scores = []
                for e in incoming:
                    z = xl[g, i, h] + xr[g, edges.source[e], h] + relation_embedding[edges.relation[e], h]
                    scores.append(attention[h] @ torch.where(z > 0, z, 0.2 * z) + strength[g, e])
                alphas = torch.stack(scores).softmax(0) if scores else []
                for alpha, e in zip(alphas, incoming, strict=True):
                    out[g, i, h] += gate[edges.relation[e], h] * alpha * xr[g, edges.source[e], h]
    return out


def test_evidence_rows_are_attention_mean_and_region_means():
    cells, queries = torch.randn(2, 6, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    regions = torch.tensor([0, 0, 1, 2, 2, 2])
    valid = torch.tensor([[True] * 6, [True, False, True, False, True, True]])
    rows = evidence_pool(cells, queries, regions, valid, num_regions=4)
    assert rows.shape == (2, 3 + 1 + 4, 4)
    for b in range(2):
        kept = cells[b][valid[b]]
        for h in range(3):
            alpha = torch.softmax(kept @ queries[b, h] / math.sqrt(4), dim=0)
            torch.testing.assert_close(rows[b, h], alpha @ kept)
        torch.testing.assert_close(rows[b, 3], kept.mean(0))
        for r in range(3):
            torch.testing.assert_close(rows[b, 4 + r], cells[b][valid[b] & (regions == r)].mean(0))
        assert (rows[b, 7] == 0).all()
    alphas = evidence_attention(cells, queries, valid)
    torch.testing.assert_close(alphas @ cells, rows[:, :3])
    assert (alphas[1][:, ~valid[1]] == 0).all()


def test_a_join_follows_the_rows_in_the_wider_type():
    cells, queries = torch.randn(2, 6, 4).bfloat16(), torch.randn(2, 3, 4).bfloat16()
    regions, join = torch.tensor([0, 0, 1, 2, 2, 2]), torch.randn(2, 5)
    joined = evidence_pool(cells, queries, regions, join=join, num_regions=3)
    assert joined.dtype == torch.float32
    assert torch.equal(joined[:, -5:], join)
    rows = evidence_pool(cells, queries, regions, num_regions=3)
    assert torch.equal(joined[:, :-5].bfloat16(), rows.flatten(1))


def test_evidence_without_valid_cells_is_zero_with_zero_gradients():
    cells = torch.randn(2, 4, 3)
    cells[0] = math.nan
    cells.requires_grad_()
    queries = torch.randn(2, 2, 3, requires_grad=True)
    valid = torch.tensor([[False] * 4, [True, True, False, True]])
    rows = evidence_pool(cells, queries, torch.tensor([0, 1, 2, 8]), valid)
    assert (rows[0] == 0).all()
    assert rows[1, :2].abs().sum() > 0
    rows.sum().backward()
    assert (cells.grad[0] == 0).all()
    assert (queries.grad[0] == 0).all()
    assert torch.isfinite(cells.grad).all()
    assert torch.isfinite(queries.grad).all()
    assert (evidence_attention(cells, queries, valid)[0] == 0).all()


def test_evidence_follows_a_permutation_of_the_cells():
    cells, queries, regions = torch.randn(2, 6, 4), torch.randn(2, 2, 4), torch.tensor([0, 1, 2, 3, 4, 5])
    order = torch.randperm(6)
    expected = evidence_pool(cells, queries, regions)
    torch.testing.assert_close(evidence_pool(cells[:, order], queries, regions[order]), expected)


@pytest.mark.parametrize("heads", [0, 1, 3])
def test_evidence_takes_any_number_of_heads_and_no_clips(heads):
    regions = torch.zeros(5, dtype=torch.int64)
    assert evidence_pool(torch.randn(2, 5, 3), torch.randn(2, heads, 3), regions).shape == (2, heads + 10, 3)
    assert evidence_pool(torch.randn(0, 5, 3), torch.randn(0, heads, 3), regions).shape == (0, heads + 10, 3)


def test_evidence_gradients():
    cells = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    queries = torch.randn(2, 2, 3, dtype=torch.float64, requires_grad=True)
    regions = torch.tensor([0, 1, 1, 2, 2])
    valid = torch.tensor([[True, True, False, True, True], [False] * 5])
    assert torch.autograd.gradcheck(lambda c, q: evidence_pool(c, q, regions, num_regions=3), (cells, queries))
    assert torch.autograd.gradcheck(lambda c, q: evidence_pool(c, q, regions, valid, num_regions=3), (cells, queries))


def test_low_precision_is_accumulated_in_float32():
    cells, queries = torch.randn(2, 162, 8).bfloat16(), torch.randn(2, 2, 8).bfloat16()
    regions = torch.arange(162) % 9
    rows = evidence_pool(cells, queries, regions)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, evidence_pool(cells.float(), queries.float(), regions).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        inside = evidence_pool(cells.float(), queries.float(), regions)
    assert torch.equal(inside, evidence_pool(cells.float(), queries.float(), regions))
    edges, inputs = make_graph(dtype=torch.bfloat16)
    strength = inputs.pop("strength")
    out = graph_attention(**inputs, edges=edges, strength=strength)
    wide = graph_attention(**{k: v.float() for k, v in inputs.items()}, edges=edges, strength=strength.float())
    assert torch.equal(out, wide.bfloat16())


def test_graph_attention_is_the_formula():
    edges, inputs = make_graph()
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, True]])
    expected = slow_graph_attention(edges, **{k: v.detach() for k, v in inputs.items()}, mask=mask)
    torch.testing.assert_close(graph_attention(**inputs, edges=edges, mask=mask), expected)


def test_the_weights_are_those_of_the_messages():
    edges, inputs = make_graph()
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, True]])
    weights = graph_weights(**inputs, edges=edges, mask=mask)
    assert (weights.transpose(1, 2)[~mask] == 0).all()
    heard = torch.zeros_like(inputs["xr"])
    for edge, (target, source) in enumerate(zip(edges.target.tolist(), edges.source.tolist(), strict=True)):
        heard[:, target] += weights[:, :, edge, None] * inputs["xr"][:, source]
    torch.testing.assert_close(heard, graph_attention(**inputs, edges=edges, mask=mask))


def test_graph_attention_gradients():
    edges, inputs = make_graph(features=2)
    mask = torch.tensor([[True] * 6, [False, True, True, False, True, True]])

    def call(*values):
        return graph_attention(**dict(zip(inputs, values, strict=True)), edges=edges, mask=mask)

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


def test_nodes_without_edges_are_zero_with_finite_gradients():
    edges, inputs = make_graph(dtype=torch.float32)
    mask = torch.stack([torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)])
    out = graph_attention(**inputs, edges=edges, mask=mask)
    assert (out[0, 4] == 0).all()
    assert (out[1] == 0).all()
    assert (out[0, :4].abs().sum((1, 2)) > 0).all()
    out.sum().backward()
    for value in inputs.values():
        assert torch.isfinite(value.grad).all()
    for name in ("xl", "xr", "strength"):
        assert (inputs[name].grad[1] == 0).all()


def test_large_scores_stay_finite():
    edges, inputs = make_graph(dtype=torch.float32)
    inputs["strength"] = (inputs["strength"].detach() * 1e4).requires_grad_()
    out = graph_attention(**inputs, edges=edges)
    out.sum().backward()
    assert torch.isfinite(out).all()
    assert torch.isfinite(inputs["strength"].grad).all()


def test_a_negative_gate_turns_the_message_round():
    edges, inputs = make_graph()
    out = graph_attention(**inputs, edges=edges)
    inputs["gate"] = -inputs["gate"]
    torch.testing.assert_close(graph_attention(**inputs, edges=edges), -out)


def test_branches_may_share_features():
    edges, inputs = make_graph()
    index = torch.tensor([1, 0, 1])
    inputs["strength"] = torch.randn(3, edges.num_edges, dtype=torch.float64)
    mask = torch.rand(3, edges.num_edges) > 0.3
    shared = graph_attention(**inputs, edges=edges, mask=mask, branch_index=index)
    inputs["xl"], inputs["xr"] = inputs["xl"][index], inputs["xr"][index]
    torch.testing.assert_close(shared, graph_attention(**inputs, edges=edges, mask=mask))


def test_graph_attention_follows_a_permutation_of_the_nodes():
    edges, inputs = make_graph()
    out = graph_attention(**inputs, edges=edges)
    order = torch.randperm(5)
    place = torch.argsort(order)
    moved = EdgeTable(place[edges.target], place[edges.source], edges.relation, 5)
    inputs["xl"], inputs["xr"] = inputs["xl"][:, order], inputs["xr"][:, order]
    torch.testing.assert_close(graph_attention(**inputs, edges=moved), out[:, order])


def test_a_graph_without_edges_gives_zeros():
    empty = torch.empty(0, dtype=torch.int64)
    edges = EdgeTable(empty, empty, empty, 5)
    _, inputs = make_graph()
    inputs["strength"] = torch.empty(2, 0, dtype=torch.float64)
    out = graph_attention(**inputs, edges=edges)
    assert out.shape == (2, 5, 2, 3)
    assert (out == 0).all()


def test_edge_table_lays_out_incoming_edges():
    edges = make_edges()
    assert edges.incoming.tolist() == [[0, 1, 2], [3, -1, -1], [4, -1, -1], [5, -1, -1], [-1, -1, -1]]
    assert (edges.num_edges, edges.min_relations) == (6, 3)
    moved = edges.to("meta")
    assert moved.device.type == moved.incoming.device.type == "meta"
    assert moved.num_nodes == 5


def test_the_functions_compile_without_graph_breaks():
    cells, queries, regions = torch.randn(2, 9, 4), torch.randn(2, 2, 4), torch.arange(9)
    pool = torch.compile(evidence_pool, fullgraph=True, backend="eager")
    torch.testing.assert_close(pool(cells, queries, regions), evidence_pool(cells, queries, regions))
    edges, inputs = make_graph()
    attend = torch.compile(lambda **kw: graph_attention(**kw, edges=edges), fullgraph=True, backend="eager")
    torch.testing.assert_close(attend(**inputs), graph_attention(**inputs, edges=edges))


POOL = {"cells": torch.zeros(2, 5, 3), "queries": torch.zeros(2, 1, 3), "regions": torch.zeros(5, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"cells": torch.zeros(2, 5)}, r"cells is float32 \[2, 5\] .* allowed is floating point \[B, N, C\]"),
        ({"cells": [1.0]}, "cells is list"),
        ({"cells": torch.zeros(2, 0, 3)}, "at least one cell"),
        ({"queries": torch.zeros(3, 1, 3)}, r"queries .* allowed is floating point \[2, H, 3\]"),
        ({"queries": torch.zeros(2, 1, 3, dtype=torch.int64)}, "queries is int64"),
        ({"regions": torch.zeros(4, dtype=torch.int64)}, r"regions .* allowed is int64 \[5\]"),
        ({"regions": torch.zeros(5)}, "regions is float32"),
        ({"regions": torch.tensor([0, 1, 9, 0, 0])}, r"regions has values 0\.\.9, allowed are 0\.\.8"),
        ({"regions": torch.tensor([0, -1, 0, 0, 0])}, r"regions has values -1\.\.0"),
        ({"valid": torch.ones(2, 5)}, r"valid is float32 .* allowed is bool \[2, 5\]"),
        ({"cells": torch.zeros(2, 5, 3, device="meta")}, "queries .* on cpu, allowed .* on meta"),
        ({"num_regions": 0}, "num_regions is 0"),
        ({"join": torch.zeros(3, 4)}, r"join .* allowed is floating point \[2, J\]"),
        ({"implementation": "cuda"}, "implementation is 'cuda', allowed are auto, triton, torch, interpret"),
    ],
)
def test_evidence_pool_names_a_wrong_argument(change, told):
    with pytest.raises(ValueError, match=told):
        evidence_pool(**{**POOL, **change})


def test_index_values_are_checked_again_after_a_change():
    regions = POOL["regions"].clone()
    evidence_pool(**{**POOL, "regions": regions})
    regions[0] = 9
    with pytest.raises(ValueError, match="regions has values"):
        evidence_pool(**{**POOL, "regions": regions})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"xl": torch.zeros(2, 4, 2, 3)}, r"xl .* allowed is floating point \[V, 5, H, F\]"),
        ({"xr": torch.zeros(2, 5, 2, 4)}, r"xr .* allowed is floating point \[2, 5, 2, 3\]"),
        ({"relation_embedding": torch.zeros(2, 2, 3)}, "relation_embedding has 2 relations, allowed are 3 or more"),
        ({"attention": torch.zeros(3)}, r"attention .* allowed is floating point \[2, 3\]"),
        ({"gate": torch.zeros(4, 2)}, r"gate .* allowed is floating point \[3, 2\]"),
        ({"strength": torch.zeros(2, 5)}, r"strength .* allowed is floating point \[2, 6\]"),
        ({"mask": torch.ones(2, 6)}, r"mask is float32 .* allowed is bool \[2, 6\]"),
        ({"branch_index": torch.tensor([0, 2])}, r"branch_index has values 0\.\.2, allowed are 0\.\.1"),
        ({"branch_index": torch.tensor([0])}, r"strength .* allowed is floating point \[1, 6\]"),
        ({"edges": None}, "edges is NoneType"),
    ],
)
def test_graph_attention_names_a_wrong_argument(change, told):
    edges, inputs = make_graph(dtype=torch.float32)
    with pytest.raises(ValueError, match=told):
        graph_attention(**{**inputs, "edges": edges, **change})


@pytest.mark.parametrize(
    ("columns", "num_nodes", "told"),
    [
        (([0, 3], [0, 1], [0, 0]), 3, r"target has values 0\.\.3, allowed are 0\.\.2"),
        (([0, 1], [-1, 1], [0, 0]), 3, r"source has values -1\.\.1"),
        (([0, 1], [0, 1], [0, -2]), 3, "relation has values -2"),
        (([0, 1], [0], [0, 0]), 3, r"source is \[1\] .* \[2\]"),
        (([0.0], [0], [0]), 3, "target is torch.float32"),
        (([0], [0], [0]), 0, "num_nodes is 0"),
    ],
)
def test_edge_table_names_a_wrong_column(columns, num_nodes, told):
    with pytest.raises(ValueError, match=told):
        EdgeTable(*(torch.tensor(column) for column in columns), num_nodes=num_nodes)


def test_the_package_imports_only_the_standard_library_torch_and_triton():
    for path in Path(aullm_kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "triton", "aullm_kernels"} or top in sys.stdlib_module_names, (
                    f"{path.name}: {name}"
                )
    assert all(hasattr(aullm_kernels, name) for name in aullm_kernels.__all__)
