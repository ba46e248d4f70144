"""Every shipped configuration compiles for Hopper, in a process of its own; and the check of that can fail."""

import json
import os
import subprocess
import sys

import pytest
from aullm_kernels import aot, tables


def run(*arguments, **environment):
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    command = [sys.executable, "-m", "aullm_kernels.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=variables, timeout=500, check=False)


@pytest.mark.launch
def test_every_configuration_compiles_within_its_lock(tmp_path):
    pytest.importorskip("triton", reason="the kernels need triton")
    done = run(TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "0 complaints" in done.stdout


def test_an_interpreting_process_compiles_nothing():
    pytest.importorskip("triton", reason="the kernels need triton")
    done = run(TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert done.stderr == "aot: TRITON_INTERPRET is set: unset it, an interpreter compiles nothing\n"


GOOD = {"registers": 100, "spilled": 0, "shared": 1000}


@pytest.mark.parametrize(
    ("taken", "told"),
    [
        ({"registers": 101}, "takes 101 registers, kernels.lock.json allows 100"),
        ({"shared": 1008}, "takes 1008 shared, kernels.lock.json allows 1000"),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 300000}, "needs 300000 bytes of shared memory, a program may have 232448"),
    ],
)
def test_the_check_complains(taken, told):
    assert any(told in line for line in aot.complaints({"k": GOOD | taken}, {"k": GOOD}))
    assert not list(aot.complaints({"k": GOOD}, {"k": GOOD}))


def test_the_lock_names_what_is_compiled():
    assert list(aot.complaints({"new": GOOD}, {"old": GOOD})) == [
        "new: is not in kernels.lock.json",
        "old: is in kernels.lock.json but was not compiled",
    ]
    lock = json.loads(aot.LOCK.read_text())
    assert {"3.6.0", "3.9.0"} <= lock.keys()
    kernels = lock["3.9.0"]
    for family in tables.families():
        for kernel in tables.families()[family]["kernels"]:
            assert any(name.startswith(kernel) for name in kernels), kernel
    assert all(taken["spilled"] == 0 for taken in kernels.values())


@pytest.mark.parametrize("target", tables.families()[tables.FAMILY]["targets"])
def test_each_capability_has_a_lock_within_its_own_limits(target):
    """As it was compiled; `--target` compiles again."""
    kernels = json.loads(aot.lock_of(target).read_text())["3.9.0"]
    assert list(aot.complaints(kernels, None, target)) == []
    assert kernels.keys() == json.loads(aot.LOCK.read_text())["3.9.0"].keys()


def test_a_capability_with_less_shared_memory_complains_sooner():
    taken = {"k": GOOD | {"shared": 120000, "spilled": 8}}
    assert list(aot.complaints(taken, None, "8.0")) == []
    assert "a program may have 101376" in next(aot.complaints(taken, None, "8.9"))
    assert any("allowed are 0" in line for line in aot.complaints(taken, None, "9.0"))
