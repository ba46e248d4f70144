"""Benchmarks `graph_attention`: sizes, traffic and instruction arithmetic, and the other ways to compute it."""

import importlib.util

import torch
import torch.nn.functional as F
from aullm_kernels import EdgeTable, graph_attention, reference
from driver import Provider, Work
from torch import Tensor

TESTS = "tests/ops/test_graph_kernels.py"
RELATIONS = 5
SIZES = {
    # name: feature rows V, branches G, nodes A, slots K of each, edges E, heads H, features F. `model` is what the
    # trainer's first layer gets for a micro-batch of 16 clips in 3 branches with the 8 AUs of CASME II, `model-12` the
    # same with 12 AUs; every node has an edge from every other, candidates for rewiring included.
    "tiny": (2, 4, 5, 2, 10, 1, 16),
    "model": (38, 48, 8, 8, 64, 4, 16),
    "model-12": (38, 48, 12, 12, 144, 4, 16),
    "S": (64, 64, 12, 4, 48, 4, 16),
    "M": (1024, 1024, 27, 6, 162, 4, 32),
    "L": (8192, 8192, 64, 8, 384, 4, 64),
}
CALLS = 2
"""Calls in a training step: the layers."""
# Instructions of a thread for each slot and feature, in the compiled kernels at degree 8 and 32 features
# (docs/kernels.md): the share of a feature row, and that of each of its branches.
FORWARD, TARGET, SOURCE = (14.4, 5.1), (43.3, 13.9), (12.1, 6.4)
_CHUNK = 512


def make_inputs(size: str, device: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict]:
    """Return the differentiable inputs and the rest. Parameters are float32, as a trainer keeps them."""
    rows, branches, nodes, degree, num_edges, heads, features = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    # Where not every slot is taken, every second node has fewer edges.
    fewer = (nodes * degree - num_edges) // (nodes // 2)
    degrees = [degree - fewer * (node % 2) for node in range(nodes)]
    source = torch.cat([torch.randperm(nodes, generator=generator)[:count] for count in degrees])
    target = torch.arange(nodes).repeat_interleave(torch.tensor(degrees))
    relation = torch.randint(0, RELATIONS, (len(source),), generator=generator)
    edges = EdgeTable(target, source, relation, nodes).to(device)
    draw = lambda *shape, dtype=dtype: torch.randn(*shape, device=device, dtype=dtype)  # noqa: E731
    small = torch.float32
    inputs = {
        "xl": draw(rows, nodes, heads, features),
        "xr": draw(rows, nodes, heads, features),
        "relation_embedding": draw(RELATIONS, heads, features, dtype=small),
        "attention": draw(heads, features, dtype=small),
        "gate": draw(RELATIONS, heads, dtype=small),
        "strength": draw(branches, edges.num_edges),
    }
    index = torch.arange(branches, device=device) % rows if branches != rows else None
    mask = (torch.rand(edges.num_edges, device=device) > 0.2).expand(branches, -1)
    return inputs, {"edges": edges, "mask": mask, "branch_index": index}


def work(size: str, dtype: torch.dtype) -> dict[str, Work]:
    """Return the least work of each mode; repeated gathers of a node's row are served by the first cache."""
    rows, branches, nodes, degree, edges, heads, features = SIZES[size]
    item = torch.empty((), dtype=dtype).element_size()
    node, per_branch = rows * nodes * heads * features, branches * nodes * heads * features
    slots = nodes * degree * heads * features
    strength = item * branches * edges
    # Weights and score gradients go from the first pass to the second in float32, written once and read once.
    handed = 4 * heads * edges * (2 * 2 * branches + (2 * rows if branches != rows else 0))
    forward = Work(item * (2 * node + per_branch) + strength, 0.0, slots * (FORWARD[0] * rows + FORWARD[1] * branches))
    backward = Work(
        item * (4 * node + 2 * per_branch + 2 * node) + 2 * strength + handed,
        0.0,
        slots * ((TARGET[0] + SOURCE[0]) * rows + (TARGET[1] + SOURCE[1]) * branches),
    )
    return {"forward": forward, "backward": backward, "full": forward + backward}


def arithmetic(size: str) -> str:
    """Say where an unfused pass loses."""
    rows, _, nodes, degree, _, heads, features = SIZES[size]
    edge = 2e-6 * rows * nodes * degree * heads * features
    return (
        f"a tensor over slots and features is {edge:.1f} MB in bfloat16; eager makes about 17 passes over one forward "
        "and 40 backward, the kernels none; below 10 MB launches decide"
    )


def expected(inputs: dict[str, Tensor], rest: dict) -> dict[str, Tensor]:
    """Return result and gradients in float64; rows without shared branches go piece by piece, to spare memory."""
    rows = len(inputs["xl"])
    pieces = (
        [slice(None)] if rest["branch_index"] is not None else [slice(i, i + _CHUNK) for i in range(0, rows, _CHUNK)]
    )
    of_rows = ("xl", "xr", "strength")
    found: dict[str, list[Tensor]] = {name: [] for name in ("out", *inputs)}
    for piece in pieces:
        leaves = {
            name: (value[piece] if name in of_rows else value).double().requires_grad_()
            for name, value in inputs.items()
        }
        out = reference.graph_attention(**leaves, **(rest | {"mask": rest["mask"][piece]}))
        out.backward(torch.ones_like(out))
        found["out"].append(out.detach())
        for name, leaf in leaves.items():
            found[name].append(leaf.grad)
    return {
        name: torch.cat(values) if name == "out" or name in of_rows else torch.stack(values).sum(0)
        for name, values in found.items()
    }


def _eager(rest: dict):
    edges, mask, index = rest["edges"], rest["mask"], rest["branch_index"]
    slots = edges.incoming.clamp(min=0)
    relation, neighbour = edges.relation[slots], edges.source[slots]
    keep = ((edges.incoming >= 0) & mask[:, slots])[..., None]

    def call(xl, xr, relation_embedding, attention, gate, strength):
        dtype = xl.dtype
        near = xr[:, neighbour]
        z = F.leaky_relu(xl[:, :, None] + near + relation_embedding.to(dtype)[relation], 0.2)
        score = (z * attention.to(dtype)).sum(-1)
        if index is not None:
            score, near = score[index], near[index]
        score = (score + strength[:, slots][..., None]).masked_fill(~keep, -1e9)
        weight = score.softmax(2) * keep * gate.to(dtype)[relation]
        return (weight[..., None] * near).sum(2)

    return call


def _pyg(rest: dict, inputs: dict[str, Tensor]) -> Provider:
    """GATv2Conv on the disjoint union, in float32 as it comes; without gates and strengths, which it does not have."""
    if importlib.util.find_spec("torch_geometric") is None:
        return Provider("PyG GATv2Conv", None, skip="torch-geometric is not installed (extra `bench`)")
    from torch_geometric.nn import GATv2Conv

    edges, index = rest["edges"], rest["branch_index"]
    rows, nodes, heads, features = inputs["xl"].shape
    count = rows if index is None else len(index)
    device = inputs["xl"].device
    layer = GATv2Conv(heads * features, features, heads, add_self_loops=False, bias=False, edge_dim=RELATIONS).to(
        device
    )
    # The linear maps are the caller's, here as in the kernels.
    layer.lin_l = layer.lin_r = torch.nn.Identity()
    offset = (torch.arange(count, device=device) * nodes)[:, None]
    edge_index = torch.stack([(edges.source + offset).flatten(), (edges.target + offset).flatten()])
    kind = F.one_hot(edges.relation, RELATIONS).float().repeat(count, 1)

    def call(xl, xr, relation_embedding, attention, gate, strength):
        near, own = (x if index is None else x[index] for x in (xr, xl))
        flat = (near.flatten(2).flatten(0, 1), own.flatten(2).flatten(0, 1))
        used = 0.0 * (relation_embedding.sum() + attention.sum() + gate.sum() + strength.sum())
        return layer(flat, edge_index, kind) + used

    return Provider("PyG GATv2Conv", call, prepare=Tensor.float, comparable=False)


def providers(rest: dict, device: str, kernels: str, inputs: dict[str, Tensor]) -> list[Provider]:
    """Return ours and everything it is compared with."""
    eager = _eager(rest)

    def autocast(**inputs: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return eager(**inputs)

    slow = None if device == "cuda" else "compiled code is compared on a GPU"
    return [
        Provider("eager", eager),
        Provider("autocast eager", autocast, prepare=Tensor.float),
        Provider("compile", torch.compile(eager), skip=slow),
        Provider("compile max-autotune", torch.compile(eager, mode="max-autotune-no-cudagraphs"), skip=slow),
        _pyg(rest, inputs),
        Provider("flex_attention", None, skip="score_mod sees a number, leaky(xl + xr + rel) needs the vectors"),
        Provider(
            f"ours: {kernels}", lambda **inputs: graph_attention(**inputs, **rest, implementation=kernels), ours=True
        ),
    ]
