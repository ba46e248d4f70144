"""Which implementation runs: the order of choices, what is told, and that tensors on a GPU reach Triton."""

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path

import aullm_kernels
import pytest
import torch
from aullm_kernels import dispatch, evidence_pool, graph_attention, ops, resolve, tables
from kernel_tools import DEVICE, random_edges

PACKAGE = Path(aullm_kernels.__file__).parent
ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="about processes without a GPU")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    monkeypatch.setattr(dispatch, "_logged", set())


@pytest.fixture
def hopper(monkeypatch):
    """A process that takes itself for one with a Hopper GPU and a compiling Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(dispatch, "_interprets", lambda: False)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(dispatch, "start_obstacle", lambda device: None)


def python(code, **environment):
    """Run code in a process of its own, without the interpreter's switch unless given."""
    variables = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "AULLM_KERNELS")}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=variables | environment, check=False)


@ON_CPU
def test_the_choice_and_its_reason_are_logged_once_per_op(monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="aullm_kernels"):
        for _ in range(2):
            resolve("evidence_pool", "auto", "cpu")
            resolve("graph_attention", "torch", "cpu")
    assert [record.getMessage() for record in caplog.records] == [
        "evidence_pool: implementation=torch reason=the tensors are on cpu, triton runs on cuda",
        "graph_attention: implementation=torch reason=asked for by implementation",
    ]


def test_the_argument_comes_before_the_environment(monkeypatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT, "triton")
    assert resolve("evidence_pool", "torch", "cpu")[0] == "torch"
    with pytest.raises(ValueError, match="AULLM_KERNELS is 'triton', but the tensors are on cpu, triton runs on cuda"):
        resolve("evidence_pool", "auto", "cpu")
    monkeypatch.setenv(dispatch.ENVIRONMENT, "fast")
    with pytest.raises(ValueError, match="AULLM_KERNELS is 'fast', allowed are auto, triton, torch, interpret"):
        resolve("evidence_pool", "auto", "cpu")


def test_a_gpu_without_configurations_takes_torch(hopper, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    chosen, reason = resolve("evidence_pool", "auto", "cuda")
    assert (chosen, reason) == (
        "torch",
        "its compute capability is 7.5, there are configurations for 8.0, 8.6, 8.9, 9.0, 10.0, 12.0",
    )
    with pytest.raises(ValueError, match=r"is 'triton', but its compute capability is 7\.5"):
        resolve("evidence_pool", "triton", "cuda")


def test_an_interpreting_process_does_not_pass_for_a_compiling_one(hopper, monkeypatch):
    monkeypatch.setattr(dispatch, "_interprets", lambda: True)
    assert resolve("evidence_pool", "auto", "cuda") == (
        "torch",
        "TRITON_INTERPRET is set, so that triton would interpret",
    )
    with pytest.raises(ValueError, match="interpret runs on cpu"):
        resolve("evidence_pool", "interpret", "cuda")


@pytest.mark.parametrize(
    ("op", "sizes", "dtypes", "told"),
    [
        (
            "evidence_pool",
            {"rows": 17, "channels": 64},
            (torch.bfloat16,),
            "rows 17, channels 64, bits 16 is more than",
        ),
        ("evidence_pool", {"rows": 14, "channels": 128}, (torch.float32,), "rows 16, channels 64"),
        (
            "evidence_pool",
            {"rows": 14, "channels": 64},
            (torch.float64,),
            "a tensor is float64, its types are bfloat16",
        ),
        ("graph_attention", {"features": 128, "degree": 4, "relations": 5}, (torch.bfloat16,), "features 128"),
        ("graph_attention", {"features": 16, "degree": 17, "relations": 5}, (torch.bfloat16,), "degree 16"),
        (
            "graph_attention",
            {"features": 32, "degree": 13, "relations": 5},
            (torch.bfloat16,),
            "features 64, degree 12",
        ),
        ("graph_attention", {"features": 16, "degree": 4, "relations": 17}, (torch.bfloat16,), "relations 17"),
    ],
)
def test_what_no_configuration_holds_is_named(hopper, op, sizes, dtypes, told):
    assert resolve(op, "auto", "cuda", sizes=sizes, dtypes=dtypes)[0] == "torch"
    with pytest.raises(ValueError, match=told):
        resolve(op, "triton", "cuda", sizes=sizes, dtypes=dtypes)


def test_tensors_on_a_gpu_reach_triton(hopper, monkeypatch):
    """With a spy in place of the kernels; without a GPU, tensors of another device stand in for those on one."""
    reached = []
    for op in ("evidence_pool", "graph_attention"):
        for name in ("triton", "torch"):
            spy = lambda *_, op=op, name=name, **__: reached.append((op, name))  # noqa: E731
            monkeypatch.setitem(ops._IMPLEMENTATIONS[op], name, spy)
    monkeypatch.setattr(ops, "resolve", lambda op, asked, device, **rest: resolve(op, asked, "cuda:0", **rest))
    place = {"device": "meta", "dtype": torch.bfloat16}
    cells = torch.empty(2, 9, 8, **place)
    evidence_pool(cells, cells[:, :4], torch.zeros(9, dtype=torch.int64, device="meta"))
    x = torch.empty(2, 5, 2, 16, **place)
    graph_attention(x, x, x[0, :2], x[0, 0], x[0, :2, :, 0], random_edges(5, 8, 2).to("meta"))
    assert reached == [("evidence_pool", "triton"), ("graph_attention", "triton")]


def test_the_operators_run_the_kernels_on_a_gpu():
    """The operators' entry for CUDA is the one that launches; there is no other."""
    from aullm_kernels import library

    for name in library.EAGER:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aullm::{name}", "CUDA")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"aullm::{name}", "CPU")
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"aullm::{name}", "CompositeImplicitAutograd")


@ON_CPU
def test_triton_is_imported_only_where_it_is_needed():
    code = """if True:
        import sys, torch, aullm_kernels
        assert "triton" not in sys.modules
        cells = torch.randn(1, 9, 4)
        aullm_kernels.evidence_pool(cells, cells[:, :2], torch.arange(9))
        assert "triton" not in sys.modules
        aullm_kernels.evidence_pool(cells, cells[:, :2], torch.arange(9), implementation="interpret")
        assert sys.modules["triton"].knobs.runtime.interpret
    """
    pytest.importorskip("triton", reason="the kernels need triton")
    done = python(code)
    assert done.returncode == 0, done.stderr


@ON_CPU
def test_a_compiling_triton_cannot_interpret():
    pytest.importorskip("triton", reason="the kernels need triton")
    code = "import triton, aullm_kernels; aullm_kernels.resolve('evidence_pool', 'interpret', 'cpu')"
    done = python(code)
    assert "ValueError: evidence_pool: implementation is 'interpret', but triton was imported without" in done.stderr


def test_without_triton_plain_pytorch_runs_and_anything_else_says_why(hopper, monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert resolve("evidence_pool", "auto", "cuda") == ("torch", "the package triton is not installed")
    with pytest.raises(ValueError, match="is 'interpret', but the package triton is not installed"):
        resolve("evidence_pool", "interpret", "cpu")


def test_the_table_has_a_row_for_each_size_of_the_model():
    """Statistics of the forward pass are read by the backward pass, so both must pad rows alike."""
    for family in tables.families():
        for bits, channels in ((16, 64), (16, 256), (19, 256), (32, 64)):
            size = {"bits": bits, "rows": 14, "channels": channels}
            found = [tables.tile(f"evidence_pool_{stage}", size, family) for stage in ("forward", "backward")]
            assert {tile.size["rows"] for tile in found} == {16}
        assert tables.oversize("graph_attention", {"features": 16, "degree": 16, "relations": 5}, family) is None


def test_masked_loads_say_what_else():
    """Without `other` the interpreter reads 0 and a GPU whatever the register held."""
    loads = 0
    for path in PACKAGE.glob("*_kernels.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
                names = {keyword.arg for keyword in node.keywords}
                assert len(node.args) == 1, f"{path.name}:{node.lineno}: name the arguments after the pointer"
                assert "mask" not in names or "other" in names, (
                    f"{path.name}:{node.lineno}: a masked load without other"
                )
                loads += 1
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.atomic_add":
                pytest.fail(f"{path.name}:{node.lineno}: an atomic sum has no fixed order")
    assert loads > 20
