"""What Triton compiles of the kernels for Hopper computes what it should, executed on the CPU (`tests/ptx`)."""

import os
import subprocess
import sys

import pytest
from training_runs import ROOT

pytestmark = pytest.mark.launch


def run(*arguments, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "tests/ptx/run_kernels.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=ROOT, timeout=500, check=False)


@pytest.mark.parametrize(
    "words", [("evidence_pool", "full", "channels=64"), ("graph_attention", "branches", "features=16", "degree=4")]
)
def test_compiled_kernels_agree_with_float64(words, tmp_path):
    pytest.importorskip("triton", reason="the kernels need triton")
    done = run("--only", *words, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert ": 0 failed" in done.stdout


def test_a_fault_in_the_compiled_kernel_is_found(tmp_path):
    """Without its barriers the kernel depends on which warp is first."""
    pytest.importorskip("triton", reason="the kernels need triton")
    words = ("evidence_pool", "plain", "bf16", "channels=64")
    done = run("--only", *words, "--plant", "bar.sync", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr[-2000:]
    assert "without a barrier between them" in done.stdout
