"""Whatever keeps Triton from starting on a GPU is a reason in the log, and plain PyTorch runs."""

import contextlib
import os
import subprocess
import sys
import types

import pytest
import torch
from aullm_kernels import dispatch, first_launch, resolve


@pytest.fixture
def hopper(monkeypatch):
    """A Hopper GPU whose Triton does what the test says at its start."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(dispatch, "_interprets", lambda: False)
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv(dispatch.ENVIRONMENT, raising=False)
    first_launch.start_obstacle.cache_clear()
    yield lambda does: monkeypatch.setitem(
        sys.modules, "aullm_kernels.smallest_kernel", types.SimpleNamespace(compile_smallest=does)
    )
    first_launch.start_obstacle.cache_clear()


def fails(error):
    def start():
        raise error

    return start


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("Failed to find C compiler.\nPlease specify"), "(RuntimeError: Failed to find C compiler.)"),
        (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "x" * 999]), "(gcc ended with 1; it compiles with Python's"),
        (AssertionError("libcuda.so cannot found!"), "(AssertionError: libcuda.so cannot found!)"),
        (PermissionError(13, "Permission denied", "/home/x/.triton"), "(PermissionError: [Errno 13] Permission denied"),
        (ImportError("libstdc++.so.6: version not found"), "(ImportError: libstdc++"),
        (KeyError(), "(KeyError)"),
    ],
)
def test_a_failing_start_leaves_pytorch_with_the_reason(hopper, error, told):
    hopper(fails(error))
    chosen, reason = resolve("evidence_pool", "auto", "cuda:0")
    assert chosen == "torch"
    assert f"triton cannot start here {told}" in reason
    assert len(reason) < 250
    assert "\n" not in reason
    with pytest.raises(ValueError, match="is 'triton', but triton cannot start here .*; auto and torch can run"):
        resolve("evidence_pool", "triton", "cuda:0")


def test_triton_is_started_once_for_each_device(hopper):
    starts = []
    hopper(lambda: starts.append(1))
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        assert resolve("graph_attention", "auto", device)[0] == "triton"
    assert len(starts) == 2


def test_a_fault_of_ours_is_not_a_reason(hopper):
    hopper(fails(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        resolve("evidence_pool", "auto", "cuda:0")


def test_without_a_compiler_the_real_triton_says_so(tmp_path):
    """Triton itself, on a machine that it takes for one with a GPU, without a C compiler to be found."""
    code = """if True:
        import contextlib, os, torch
        torch.cuda.is_available = lambda: True
        torch.cuda.device = lambda device: contextlib.nullcontext()
        from aullm_kernels.first_launch import start_obstacle
        print(start_obstacle("cuda:0"))
    """
    pytest.importorskip("triton", reason="the kernels need triton")
    environment = {"PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("triton cannot start here ("), done.stdout


def test_the_smallest_kernel_is_compiled_and_loaded(tmp_path):
    """With the real compiler; in place of the GPU's driver, one that records what it is given to load."""
    code = """if True:
        import types, torch, triton
        from triton.backends.compiler import GPUTarget
        from triton.runtime.driver import driver
        loaded = []
        def load_binary(name, binary, shared, device):
            loaded.append((name, len(binary) > 500, device))
            return 1, 2, 32, 0, 1024
        utils = types.SimpleNamespace(load_binary=load_binary)
        utils.get_device_properties = lambda device: {"max_shared_mem": 232448}
        driver.set_active(types.SimpleNamespace(
            utils=utils, launcher_cls=lambda source, metadata: "launcher", get_current_device=lambda: 0,
            get_current_stream=lambda device: 0, get_current_target=lambda: GPUTarget("cuda", 90, 32)))
        from aullm_kernels.smallest_kernel import compile_smallest
        compile_smallest()
        assert loaded == [("_store_kernel", True, 0)], loaded
    """
    pytest.importorskip("triton", reason="the kernels need triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
