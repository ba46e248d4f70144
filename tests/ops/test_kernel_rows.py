"""Every row of `configs.json` that is another kernel to the interpreter, against the reference in float64.

The locks of all compute capabilities are of the same rows. Of a row the interpreter sees the sizes of its tiles; warps,
stages, registers and types of operands are the compiler's (`tests/ptx` executes what that makes of them).
"""

import pytest
import torch
from aullm_kernels import EdgeTable, evidence_kernels, evidence_pool, graph_attention, graph_kernels, reference, tables
from kernel_tools import DEVICE, KERNELS, TOLERANCES, error, gradients

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*FP fusion.*"),
    pytest.mark.skipif(DEVICE == "cuda", reason="a GPU takes each row for its own types"),
]


def distinct(kernel, *names):
    """Rows of a kernel that differ in their tiles, the smallest first."""
    rows = {(*(row.size[name] for name in names), row.block): row for row in tables.tiles(kernel)}
    return [rows[key] for key in sorted(rows)]


FORWARD, BACKWARD = (distinct(f"evidence_pool_{stage}", "channels") for stage in ("forward", "backward"))
GRAPHS = sorted(
    {(row.size["features"], row.size["degree"]) for row in distinct("graph_attention_forward", "features", "degree")}
)


def agree(compiled, plain, inputs):
    wide = {name: value.double() for name, value in inputs.items()}
    found, expected = gradients(compiled, inputs), gradients(plain, wide)
    for name, value in found.items():
        assert error(value, expected[name]) <= TOLERANCES[torch.float32], name


@pytest.mark.parametrize("place", range(max(len(FORWARD), len(BACKWARD))))
def test_evidence_pool_in_every_tile(place, monkeypatch):
    rows = {"forward": FORWARD[place % len(FORWARD)], "backward": BACKWARD[place % len(BACKWARD)]}
    asked = []

    def tile(kernel, size):
        asked.append(kernel)
        return rows[kernel.rpartition("_")[2]]

    monkeypatch.setattr(evidence_kernels, "tile", tile)
    torch.manual_seed(place)
    channels = min(row.size["channels"] for row in rows.values()) - 4
    cells = max(row.block for row in rows.values()) + 1
    inputs = {"cells": torch.randn(1, cells, channels), "queries": torch.randn(1, 2, channels)}
    options = {"regions": torch.arange(cells) % 3, "num_regions": 3}
    agree(
        lambda **given: evidence_pool(**given, **options, implementation=KERNELS),
        lambda **given: reference.evidence_pool(**given, valid=None, join=None, **options),
        inputs,
    )
    assert asked == ["evidence_pool_forward", "evidence_pool_backward"]


@pytest.mark.parametrize(("features", "degree"), GRAPHS)
def test_graph_attention_in_every_tile(features, degree, monkeypatch):
    taken = []

    def tile(kernel, size):
        taken.append(tables.tile(kernel, size))
        return taken[-1]

    monkeypatch.setattr(graph_kernels, "tile", tile)
    torch.manual_seed(features + degree)
    # Node 0 has all slots of its row; a second tile holds the last node alone.
    nodes = tables.tiles("graph_attention_forward")[0].block + 1
    target = torch.cat([torch.zeros(degree, dtype=torch.int64), torch.tensor([1, 3, nodes - 1])])
    edges = EdgeTable(target, torch.arange(len(target)) % nodes, torch.arange(len(target)) % 2, nodes)
    shapes = {"xl": (1, nodes, 1), "xr": (1, nodes, 1), "relation_embedding": (2, 1), "attention": (1,)}
    inputs = {name: torch.randn(*shape, features - 3) for name, shape in shapes.items()} | {"gate": torch.randn(2, 1)}
    # Scores of about 1: where one edge takes all the weight, gradients are what rounding leaves of them.
    inputs["attention"] = inputs["attention"] / features**0.5
    agree(
        lambda **given: graph_attention(**given, edges=edges, implementation=KERNELS),
        lambda **given: reference.graph_attention(**given, edges=edges),
        inputs,
    )
    assert taken[0].size["features"] == features
    assert taken[0].size["degree"] == degree
    assert len(taken) == 3


def test_every_row_that_a_call_can_take_is_one_of_these():
    """Rows of the passes over edges come with those of the forward pass, which is limited the most."""
    for kernel in ("graph_attention_target", "graph_attention_source"):
        for row in tables.tiles(kernel):
            sizes = [dict(zip(("features", "degree"), size, strict=True)) for size in GRAPHS]
            if row.size["features"] > 16 and row.size.get("degree") == 16:
                # Taken for 12 slots, as the next smaller row has 8.
                assert tables.tile(kernel, {"features": row.size["features"], "degree": 12}) == row
            given = [{name: size[name] for name in size if name in row.size} for size in sizes]
            assert row in [tables.tile(kernel, size) for size in given], (kernel, row)
