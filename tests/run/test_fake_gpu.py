"""The unmodified trainer on a device "cuda" that this machine has not: what a GPU would refuse or wait for.

docs/gpu.md says what this proves and what it does not. Each scenario is forked from one process that has the device.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import ROOT, environment_of_another_device, free_port, overrides, scalars

from aullm_dist.release.layout import read_release_manifest

SCRIPT = ROOT / "tests" / "fakegpu" / "run_scenarios.py"
ALLOWED = (
    # DeepSpeed reads the norm of the gradient in every step, to skip one that is not finite, and waits for what it
    # gathers.
    " at deepspeed/runtime/",
    # Accelerate reads that norm as a number.
    " at aullm_dist/distributed/team.py (clip_grad_norm_)",
)
"""Places in which the host may wait in a step under ZeRO; every other one is a fault. Its timers are not among them."""
ANSWERS_ALLOWED = {
    # Clips that are answered once are given as they were read, and the host takes the answer to a batch.
    "answered: copy from memory that is not pinned at aullm_dist/training/batches.py (to)",
    "answered: copy from memory that is not pinned at aullm_dist/training/batches.py (<dictcomp>)",
    "answered: copy cuda to cpu at aullm_dist/training/heldout.py (_logits)",
}
"""All waits of a batch that is answered; a batch that is explained has none before its results are taken."""
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
FOLDS = ZERO3 | {
    "training__folds_at_once": 2,
    "training__global_batch": 2,
    "training__epochs": 1,
    "data__folds": 2,
    "data__fold": None,
    "counterfactual__enabled": False,
}
# Interpreted kernels take seconds for a step.
KERNELS = NF4 | {
    "training__global_batch": 1,
    "training__micro_batch": 1,
    "training__max_steps": 2,
    "training__evaluate_every_epochs": 99,
    "data__inner_fraction": 0.0,
    "model__graph_heads": 1,
}
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
            # Where a scenario has the compute capability of a device that there are kernels for; else plain PyTorch.
            "TRITON_INTERPRET": "1",
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


def command(*arguments):
    """Return a scenario of `aullm-dist`."""
    return {"module": "aullm_dist.cli", "argv": [str(argument) for argument in arguments], "ranks": [{}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory, small_dataset):
    """A corpus and an LLM whose rows are whole blocks of NF4, which a merge needs."""
    from aullm_dist.llm.tiny import build_tiny_backbone

    return small_dataset, build_tiny_backbone(tmp_path_factory.mktemp("llm") / "llama", hidden=64, layers=2, heads=2)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("gpu")
    dataset, _ = data
    fold, release = folder / "resumed-run" / "fold-00", folder / "release"
    return Runs(
        folder,
        "cuda",
        {
            "bf16": train(folder / "bf16-run", *data, **BF16),
            "fp32": train(folder / "fp32-run", *data),
            "nf4": train(folder / "nf4-run", *data, **NF4),
            "resumed": train(folder / "resumed-run", *data, "--resume", "auto", **NF4)
            | {"interrupted": [str(folder / "nf4-run"), str(folder / "resumed-run")]},
            "predicted": command("predict", fold, dataset, "--json", "--out", folder / "answers.json"),
            "merged": command("merge", fold, "--out", release, "--dtype", "fp32", "--probe"),
            "verified": command("release", "verify", release),
            "released": command("predict", release, dataset, "--json", "--out", folder / "released.json"),
            "reported": command("report", fold.parent, "--out", folder / "page", "--clips", 1, "--bootstrap", 2),
            "folds": train(folder / "folds-run", *data, ranks=2, **FOLDS),
            "kernels": train(folder / "kernels-run", *data, **KERNELS) | {"kernels": True},
            "zero3": train(folder / "zero3-run", *data, ranks=2, **ZERO3),
            "offloaded": train(folder / "offloaded-run", *data, **OFFLOADED),
            **{plant: train(folder / f"{plant}-run", *data, plant=plant, **BF16) for plant in ("item", "copy", "mix")},
        },
    )


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cpu")
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


@pytest.mark.parametrize("name", ["bf16", "fp32", "nf4", "resumed", "zero3", "folds", "kernels", "offloaded"])
def test_training_mixes_no_devices_and_waits_for_nothing(on_gpu, name):
    report = on_gpu.report(name)
    assert report["available"], "there was no device"
    assert report["code"] == 0, (report["error"], on_gpu.output[-3000:])
    assert report["steps"] >= (2 if name == "kernels" else WATCHED), "a watched step has run"
    assert not faults(report)
    assert not report["tf32"]


@pytest.mark.parametrize("name", ["zero3", "folds"])
def test_every_process_of_zero3_trains_without_faults(on_gpu, name):
    report = on_gpu.report(name, rank=1)
    assert report["code"] == 0
    assert report["steps"] >= WATCHED
    assert not faults(report)


def test_the_kernels_ran_where_there_are_some(on_gpu):
    told = on_gpu.output
    for op in ("evidence_pool", "graph_attention"):
        assert f"{op}: implementation=triton reason=the fastest that can run on NVIDIA H200" in told
    assert on_gpu.report("kernels")["types"] == on_gpu.report("nf4")["types"]


@pytest.mark.parametrize(
    ("name", "answers", "explanations"),
    [("nf4", True, False), ("folds", True, False), ("predicted", True, False), ("merged", False, True),
     ("verified", False, True), ("released", True, False), ("reported", False, True)],
)  # fmt: skip
def test_answers_mix_no_devices_and_wait_for_their_results_alone(on_gpu, on_cpu, name, answers, explanations):
    report = on_gpu.report(name)
    assert report["code"] == 0, (report["error"], on_gpu.output[-3000:])
    assert report["answered"] > 1 or not answers
    assert report["explained"] > 0 or not explanations
    assert set(report["answer_waits"]) <= ANSWERS_ALLOWED
    assert not report["tf32"]
    # The same modules compute in the same types as in a step on a CPU, but norms and what follows them.
    expected = on_cpu.report("nf4")["types"]
    for module in expected.keys() & report["answer_types"].keys():
        if module.startswith("reasoner"):
            assert report["answer_types"][module] == expected[module], module
    known = set(re.findall(r"\w+", " ".join(expected.values())))
    assert set(re.findall(r"\w+", " ".join(report["answer_types"].values()))) <= known


def test_power_and_memory_are_logged(on_gpu):
    run = on_gpu.folder / "nf4-run"
    assert set(scalars(run, "hardware/power_watts")) == {350.0}
    for tag in ("memory/gpu_gib", "memory/gpu_peak_gib", "train/mfu", "step_ms/forward"):
        values = scalars(run, tag)
        assert values, tag
        assert all(0 < value < 1e6 for value in values), tag
    peaks, held = scalars(run, "memory/gpu_peak_gib"), scalars(run, "memory/gpu_gib")
    assert all(peak >= now for peak, now in zip(peaks, held, strict=True))


def test_what_a_gpu_merged_and_reported_is_there(on_gpu):
    manifest = read_release_manifest(on_gpu.folder / "release")
    assert manifest.probe["device"] == "cuda"
    assert manifest.probe["difference_to_trained"] < 0.1
    assert set(manifest.merge["probe"]["relative_logit_error"]) == {"live", "nf4-exact", "bf16"}
    assert (on_gpu.folder / "page/figures/evidence-0.svg").is_file()
    assert "answers on cuda" in on_gpu.output


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
