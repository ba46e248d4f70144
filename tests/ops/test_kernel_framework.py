"""The kernels inside torch: registration, compilation, checkpointing, autocast, FLOP counting, saved parameters."""

import importlib

import pytest
import torch
from aullm_kernels import evidence_pool, graph_attention, library
from kernel_tools import DEVICE, KERNELS, error, gradients, random_edges
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytest.importorskip("triton", reason="the kernels need triton")
pytestmark = pytest.mark.filterwarnings("ignore:.*FP fusion.*")
FORWARD = {"evidence_pool": library.evidence_pool_forward, "graph_attention": library.graph_attention_forward}


def make_call(op):
    """A small call of `op` as a function of its differentiable inputs, and these inputs."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    if op == "evidence_pool":
        regions = torch.arange(7, device=DEVICE) % 3
        inputs = {"cells": draw(2, 7, 8), "queries": draw(2, 2, 8), "join": draw(2, 3)}
        return lambda **kw: evidence_pool(**kw, regions=regions, num_regions=3, implementation=KERNELS), inputs
    edges = random_edges(4, 5, 2)
    shapes = {
        "xl": (1, 4, 1, 16),
        "xr": (1, 4, 1, 16),
        "relation_embedding": (2, 1, 16),
        "attention": (1, 16),
        "gate": (2, 1),
        "strength": (2, 5),
    }
    index = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    inputs = {name: draw(*shape) for name, shape in shapes.items()}
    return lambda **kw: graph_attention(**kw, edges=edges, branch_index=index, implementation=KERNELS), inputs


OPS = pytest.mark.parametrize("op", ["evidence_pool", "graph_attention"])
# Tracing with symbolic sizes takes seconds per call, so once per operator.
QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_of_evidence_pool_are_registered_right(dtype):
    cells = torch.randn(2, 8, 7, device=DEVICE).to(dtype).transpose(1, 2)
    queries, join = torch.randn(2, 2, 8, device=DEVICE).to(dtype), torch.randn(2, 3, device=DEVICE)
    regions, valid = torch.arange(7, device=DEVICE) % 3, torch.rand(2, 7, device=DEVICE) > 0.3
    dynamic = ("test_aot_dispatch_dynamic",) if dtype == torch.float32 else ()
    for arguments in ((cells, queries, regions, valid, join, 3), (cells[:0], queries[:0], regions, None, None, 3)):
        torch.library.opcheck(library.evidence_pool_forward, arguments, test_utils=QUICK + dynamic)
        out, pooled, stats = library.evidence_pool_forward(*arguments)
        for need in ((True, True), (False, True)):
            backward = (torch.randn_like(out), *arguments[:4], pooled, stats, 3, *need)
            torch.library.opcheck(library.evidence_pool_backward, backward, test_utils=QUICK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_of_graph_attention_are_registered_right(dtype):
    edges = random_edges(4, 5, 2)
    shapes = ((1, 4, 1, 16), (1, 4, 1, 16), (2, 1, 16), (1, 16), (2, 1))
    inputs = [torch.randn(*shape, device=DEVICE).to(dtype) for shape in shapes]
    index = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    strength, mask = torch.randn(2, 5, device=DEVICE), torch.rand(2, 5, device=DEVICE) > 0.2
    dynamic = ("test_aot_dispatch_dynamic",) if dtype == torch.float32 else ()
    for extra in ((strength, mask, index), (None, None, None)):
        arguments = (*inputs, edges.incoming_slots, *extra, 0.2)
        torch.library.opcheck(library.graph_attention_forward, arguments, test_utils=QUICK + dynamic)
        dynamic = ()
        grad = torch.randn(2 if extra[2] is not None else 1, 4, 1, 16, device=DEVICE).to(dtype)
        backward = (grad, *inputs, edges.incoming_slots, edges.outgoing_slots, *extra, 5, 0.2)
        torch.library.opcheck(library.graph_attention_backward, backward, test_utils=QUICK)


@OPS
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_as_one_graph(op, backend):
    call, inputs = make_call(op)
    expected = gradients(call, inputs)
    torch._dynamo.reset()
    found = gradients(torch.compile(call, fullgraph=True, backend=backend), inputs)
    for name, value in expected.items():
        assert error(found[name], value) < 1e-6, name


@OPS
def test_recomputing_gives_the_same_bits(op):
    call, inputs = make_call(op)
    expected = gradients(call, inputs)
    found = gradients(lambda **kw: checkpoint(lambda: call(**kw), use_reentrant=False), inputs)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@OPS
def test_a_selective_checkpoint_can_keep_its_result(op, monkeypatch):
    """A policy sees the operator by name: kept, the kernel runs once; not kept, once more in the backward pass."""
    module = importlib.import_module(f"aullm_kernels.{op.split('_')[0]}_kernels")
    runs, run = [], module.forward
    monkeypatch.setattr(module, "forward", lambda *a, **k: runs.append(1) or run(*a, **k))
    call, inputs = make_call(op)
    expected = gradients(call, inputs)
    for policy, times in ((CheckpointPolicy.MUST_SAVE, 1), (CheckpointPolicy.PREFER_RECOMPUTE, 2)):

        def choose(context, func, *_, policy=policy, **__):
            return policy if func is FORWARD[op] else CheckpointPolicy.PREFER_RECOMPUTE

        contexts = lambda choose=choose: create_selective_checkpoint_contexts(choose)  # noqa: E731
        runs.clear()
        found = gradients(
            lambda contexts=contexts, **kw: checkpoint(lambda: call(**kw), use_reentrant=False, context_fn=contexts),
            inputs,
        )
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert len(runs) == times


@OPS
def test_autocast_changes_neither_types_nor_values(op):
    call, inputs = make_call(op)
    expected = gradients(call, inputs)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = gradients(call, inputs)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@OPS
def test_flops_are_counted(op):
    import aullm_kernels.flops  # noqa: F401
    from torch.utils.flop_counter import FlopCounterMode

    call, inputs = make_call(op)
    with FlopCounterMode(display=False) as counter:
        gradients(call, inputs)
    forward, backward = (
        {"evidence_pool": (2 * 7 * 8 * 6 * 4, 2 * 7 * 8 * 6 * 10)}
        | {"graph_attention": ((6 + 2 * 2) * 64 * degree(), (16 + 4 * 2) * 64 * degree())}
    )[op]
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    assert counted[f"aullm.{op}_forward"] == forward
    assert counted[f"aullm.{op}_backward"] == backward


def degree():
    return random_edges(4, 5, 2).incoming.shape[1]


def test_a_parameter_is_saved_itself():
    """ZeRO-3 frees a parameter between forward and backward pass; a saved copy of it would stay whole."""
    call, inputs = make_call("graph_attention")
    names = ("relation_embedding", "attention", "gate")
    parameters = {name: torch.nn.Parameter(inputs[name]) for name in names}
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    )
    with hooks:
        call(**(inputs | parameters))
    for name in names:
        assert any(tensor is parameters[name] for tensor in saved), name
    size = sum(t.numel() for t in saved if not any(t is other for other in (*parameters.values(), *inputs.values())))
    assert size <= sum(inputs["strength"].shape) + 2 * 3 * 4 * 5, "something that is no input was saved"


def test_a_parameter_whose_memory_is_freed_until_backward_gives_the_same_gradient():
    call, inputs = make_call("graph_attention")
    expected = gradients(call, inputs)
    parameter = torch.nn.Parameter(inputs["attention"].clone())
    out = call(**(inputs | {"attention": parameter}))
    whole = parameter.data
    parameter.data = torch.empty(0, device=DEVICE)
    # As DeepSpeed's hook gathers it before the backward pass of its module.
    parameter.data = whole
    out.backward(torch.ones_like(out))
    assert torch.equal(parameter.grad, expected["attention"])
