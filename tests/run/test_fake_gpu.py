"""The unmodified trainer on a device "cuda" that this machine has not: what a GPU would refuse or wait for.

docs/gpu.md says what this proves and what it does not. Each scenario is forked from one process that has the device.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import ROOT, environment_of_another_device, free_port, overrides

SCRIPT = ROOT / "tests" / "fakegpu" / "run_scenarios.py"
ALLOWED = (
    # DeepSpeed reads the norm of the gradient in every step, to skip one that is not finite, and waits for what it
    # gathers.
    " at deepspeed/runtime/",
    # Accelerate reads that norm as a number.
    " at aullm_dist/distributed/team.py (clip_grad_norm_)",
)
"""Places in which the host may wait in a step under ZeRO; every other one is a fault. Its timers are not among them."""
pytestmark = [
    pytest.mark.launch,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(torch.version.cuda is not None, reason="a torch for GPUs has its own device cuda"),
]

WATCHED = 3
"""The first step of a process that is watched."""
BF16 = {"training__precision": "bf16", "model__lora_dropout": 0.1}
NF4 = BF16 | {
    "model__quantization": "nf4",
    "model__activation_checkpointing": "non_reentrant",
    "data__workers": 1,
}
ZERO3 = BF16 | {"model__quantization": "nf4", "training__strategy": "zero3", "training__micro_batch": 2}
OFFLOADED = BF16 | {"training__strategy": "zero3_offload_param", "training__epochs": 1}


class Runs:
    """Reports of all scenarios of one device, by name and rank."""

    def __init__(self, folder, device, scenarios):
        self.folder = folder
        for name, scenario in scenarios.items():
            scenario |= {"report": str(folder / name)}
        file = folder / "scenarios.json"
        file.write_text(json.dumps(list(scenarios.values())))
        # Compiled once for each version of its source and of torch; a run of the tests that finds it starts at once.
        build = os.environ.get("FAKE_GPU_BUILD", str(ROOT / "build" / "fakegpu"))
        variables = {
            "FAKE_GPU_BUILD": build,
            "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1",
            "TRITON_INTERPRET": "0",
        }
        variables |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, str(SCRIPT), device, str(file)],
            capture_output=True,
            text=True,
            env=environment_of_another_device(**variables),
            timeout=1200,
            check=False,
        )
        self.output = done.stdout + done.stderr
        assert done.returncode == 0, self.output[-3000:]

    def report(self, name, rank=0):
        path = self.folder / f"{name}.{rank}"
        assert path.is_file(), self.output[-6000:]
        return json.loads(path.read_text())


def train(output: Path, dataset, llm, *flags, ranks=1, plant=None, **changes):
    """Return a scenario that trains."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    each = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return {
        "module": "aullm_dist.commands.train",
        "argv": [*overrides(dataset, llm, output, **changes), *flags],
        "ranks": each if ranks > 1 else [{}],
        "plant": plant,
    }


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory, small_dataset, tiny_llm):
    folder = tmp_path_factory.mktemp("gpu")
    data = (small_dataset, tiny_llm)
    fold = folder / "resumed-run" / "fold-00"
    return Runs(
        folder,
        "cuda",
        {
            "bf16": train(folder / "bf16-run", *data, **BF16),
            "fp32": train(folder / "fp32-run", *data),
            "nf4": train(folder / "nf4-run", *data, **NF4),
            "resumed": train(folder / "resumed-run", *data, "--resume", "auto", **NF4)
            | {"interrupted": [str(folder / "nf4-run"), str(folder / "resumed-run")]},
            "predicted": {
                "module": "aullm_dist.cli",
                "argv": ["predict", str(fold), str(small_dataset), "--json", "--out", str(folder / "answers.json")],
                "ranks": [{}],
            },
            "zero3": train(folder / "zero3-run", *data, ranks=2, **ZERO3),
            "offloaded": train(folder / "offloaded-run", *data, **OFFLOADED),
            **{plant: train(folder / f"{plant}-run", *data, plant=plant, **BF16) for plant in ("item", "copy", "mix")},
        },
    )


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, small_dataset, tiny_llm):
    folder = tmp_path_factory.mktemp("cpu")
    data = (small_dataset, tiny_llm)
    short = {"training__epochs": 1}
    return Runs(
        folder,
        "cpu",
        {
            "bf16": train(folder / "bf16-run", *data, **(BF16 | short)),
            "nf4": train(folder / "nf4-run", *data, **(NF4 | short)),
        },
    )


def faults(report):
    return [wait for wait in report["waits"] if not any(place in wait for place in ALLOWED)]


@pytest.mark.parametrize("name", ["bf16", "fp32", "nf4", "resumed", "zero3", "offloaded"])
def test_training_mixes_no_devices_and_waits_for_nothing(on_gpu, name):
    report = on_gpu.report(name)
    assert report["available"], "there was no device"
    assert report["code"] == 0, (report["error"], on_gpu.output[-3000:])
    assert report["steps"] >= WATCHED, "a watched step has run"
    assert not faults(report)
    assert not report["tf32"]


def test_every_process_of_zero3_trains_without_faults(on_gpu):
    report = on_gpu.report("zero3", rank=1)
    assert report["code"] == 0
    assert not faults(report)


@pytest.mark.parametrize("name", ["bf16", "nf4"])
def test_the_types_of_all_modules_are_those_of_a_cpu(on_gpu, on_cpu, name):
    expected, found = on_cpu.report(name)["types"], on_gpu.report(name)["types"]
    assert expected.keys() == found.keys()
    other = {module for module, types in found.items() if expected[module] != types}
    assert not {module for module in other if module.startswith("reasoner")}, "the LLM"
    # Autocast has norms computed in float32 on GPUs alone, and what follows them gets that.
    assert {module for module in other if "Norm)" in module}
    for module in other:
        assert found[module].count("bfloat16") < expected[module].count("bfloat16"), (module, found[module])


def test_a_run_on_a_gpu_resumes_and_predicts(on_gpu):
    assert on_gpu.report("resumed")["steps"] == on_gpu.report("nf4")["steps"] / 2
    assert (on_gpu.folder / "resumed-run/fold-00/predictions/epoch-0002.jsonl").is_file()
    assert on_gpu.report("predicted")["code"] == 0, on_gpu.output[-3000:]
    assert json.loads((on_gpu.folder / "answers.json").read_text())


@pytest.mark.parametrize(
    ("plant", "what"), [("item", "_local_scalar_dense.default at"), ("copy", "copy cuda to cpu at")]
)
def test_a_wait_that_is_put_into_the_step_is_reported(on_gpu, plant, what):
    assert any(what in wait for wait in faults(on_gpu.report(plant)))


def test_a_tensor_on_the_wrong_device_is_refused(on_gpu):
    report = on_gpu.report("mix")
    assert report["code"] == 1
    assert "same device" in report["error"]


def test_a_run_holds_what_was_planned_for_a_gpu(tmp_path):
    found = tmp_path / "found.json"
    command = [sys.executable, "benchmarks/plan_on_fake_gpu.py", "--cases", "tiny", "--json", str(found)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment_of_another_device(),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    phases = json.loads(found.read_text())["rows"]["tiny"]["phases"]
    # One process reads an LLM that is not packed into the machine's memory.
    assert phases["load"]["predicted"] == 0
    for name in ("start", "step", "evaluation", "save"):
        assert phases[name]["predicted"] == pytest.approx(phases[name]["observed"], rel=0.1), name
