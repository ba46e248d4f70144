"""What engines must not do, and what users must not ask of them: one line from one process, and all processes end."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import TRAIN, fork, free_port, launch, newest_checkpoint, overrides, partition_everything, scalars

from aullm_dist.llm.tiny import build_tiny_backbone

pytestmark = pytest.mark.launch

PROBE = Path(__file__).with_name("engine_probe.py")


def short(dataset, llm, run, **changes) -> list[str]:
    common = {
        "training__global_batch": 8,
        "training__micro_batch": 4,
        "training__epochs": 99,
        "training__max_steps": 2,
        "training__evaluate_every_epochs": 99,
        "training__save_every_steps": 1,
        "model__dropout": 0.0,
    }
    return overrides(dataset, llm, run, **common | changes)


@pytest.mark.parametrize(("quantization", "checkpointing"), [("none", "none"), ("nf4", "non_reentrant")])
def test_the_frozen_base_is_gathered_by_steps_alone(tiny_dataset, tmp_path, quantization, checkpointing):
    """A step gathers each layer for its forward and for its backward pass, a save neither gathers nor writes it."""
    llm = build_tiny_backbone(tmp_path / "llama", hidden=256, layers=8, heads=4)
    strategy = partition_everything(tmp_path, ahead=0)
    settings = short(
        tiny_dataset, llm, tmp_path / "run", training__strategy=strategy, model__quantization=quantization,
        model__activation_checkpointing=checkpointing,
    )  # fmt: skip
    result = fork(*settings, processes=2, program=PROBE, environment={"PROBE_FOLDER": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    facts = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    values, frozen = facts[0]["trainable_values"], facts[0]["frozen_bytes"]
    needed = 4 * 4 * values  # value, fp32 copy and AdamW's two moments of each trainable
    assert frozen > 0.03 * needed, "too small a base for what follows to tell anything"
    for fact in facts:
        # Nothing needs the embedding in the backward pass.
        twice = 2 * (frozen + 4 * values) - facts[0]["embedding_bytes"]
        assert len(fact["steps"]) == len(fact["saves"]) == 2
        for step in fact["steps"]:
            gathered = sum(size for name, size in step.items() if "all_gather" in name)
            assert 0.99 * twice < gathered < 1.01 * twice
        for save in fact["saves"]:
            assert needed <= sum(save.values()) < 1.01 * needed
        assert fact["frozen_bytes_here"] < 0.51 * frozen, "the base is not partitioned"
        assert fact["trainable_dtypes"] == ["torch.float32"]
        assert fact["destroyed"]
    folder = newest_checkpoint(tmp_path / "run")
    written = sum(path.stat().st_size for path in folder.iterdir() if path.suffix == ".safetensors")
    assert needed < written < 1.01 * needed


@pytest.mark.parametrize(
    ("changes", "launcher", "message"),
    [
        ({"training__strategy": "ddp"}, ("--use_deepspeed",), "--use_deepspeed, but training.strategy is ddp"),
        ({"training__strategy": "zero3"}, ("--use_deepspeed", "--zero_stage=2"), "--zero_stage 2, but training.strat"),
        ({"training__processes": 4, "training__micro_batch": 2}, (), "training.processes is 4, but the launcher"),
        ({"training__strategy": "zero3", "model__lora_targets": "[no_proj]"}, (), "'no_proj': matches no linear"),
        ({"training__strategy": "zero3", "model__lora_targets": "[lm_head]"}, (), "the vocabulary head is never"),
        ({"model__quantization": "nf4", "model__lora_rank": 0}, (), "full fine-tuning is not offered"),
        ({"training__strategy": "zero2", "model__attention": "flash_attention_2"}, (), "allowed: auto, prefix, sdpa"),
    ],
)
def test_a_mistake_ends_both_processes_with_one_line(small_dataset, tiny_llm, tmp_path, changes, launcher, message):
    run = tmp_path / "run"
    settings = short(small_dataset, tiny_llm, run, **changes)
    result = launch(*settings, processes=2, launcher=launcher) if launcher else fork(*settings, processes=2)
    assert result.returncode != 0
    errors = re.findall(r"^train\.py: error: .*$", result.stderr, re.MULTILINE)
    assert len(errors) == 1, result.stderr
    assert message in errors[0]
    # Ours ended by themselves or were ended by the launcher, which has a traceback of its own; none of ours crashed.
    ends = re.findall(r"exitcode\s*: (-?\d+) \(pid", result.stderr)
    assert "2" in ends
    assert set(ends) <= {"2", "-15"}
    assert "aullm_dist/training" not in result.stderr
    assert not (run / "config.yaml").exists()


def test_a_backbone_that_does_not_fit_is_refused_before_its_files_are_read(small_dataset, tiny_llm, tmp_path):
    """Its config.json describes terabytes of float32, and there are no weights at all."""
    llm = tmp_path / "llm"
    shutil.copytree(tiny_llm, llm, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((llm / "config.json").read_text())
    config |= {"hidden_size": 2**16, "intermediate_size": 2**18, "head_dim": 2**14}
    (llm / "config.json").write_text(json.dumps(config))
    settings = short(small_dataset, llm, tmp_path / "run", training__strategy="zero3", training__check_memory=True)
    result = fork(*settings, processes=2)
    (error,) = re.findall(r"^train\.py: error: .*$", result.stderr, re.MULTILINE)
    assert "the run does not fit: each process needs" in error
    # The launcher has a traceback of its own; none of ours crashed.
    assert "aullm_dist/training" not in result.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_damaged_backbone_is_named_before_anything_is_allocated(small_dataset, tiny_llm, tmp_path):
    llm = tmp_path / "llm"
    shutil.copytree(tiny_llm, llm)
    weights = llm / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    result = fork(*short(small_dataset, llm, tmp_path / "run", training__strategy="zero3"), processes=2)
    (error,) = re.findall(r"^train\.py: error: .*$", result.stderr, re.MULTILINE)
    assert f"{weights}: is truncated" in error
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_a_gradient_that_is_not_finite_is_skipped_and_then_ends_the_run(small_dataset, tiny_llm, tmp_path, strategy):
    settings = short(
        small_dataset, tiny_llm, tmp_path / "run", training__strategy=strategy, training__lr_new=1e30,
        training__max_bad_steps=2, training__max_steps=9, training__save_every_steps=None,
    )  # fmt: skip
    result = fork(*settings, processes=2)
    assert result.stderr.count("the gradient is not finite; skipped") == 2
    assert "not finite in 2 steps in a row" in result.stderr
    assert result.stderr.count("train.py: error:") == 1


def test_other_versions_on_one_process_are_refused(small_dataset, tiny_llm, tmp_path):
    script = tmp_path / "older.py"
    script.write_text(
        "import os, runpy, sys\nfrom importlib import metadata\nversion = metadata.version\n"
        "if os.environ['RANK'] == '1':\n"
        "    metadata.version = lambda name: '0.1' if name == 'peft' else version(name)\n"
        f"sys.argv[0] = {str(TRAIN)!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    result = fork(*short(small_dataset, tiny_llm, tmp_path / "run"), processes=2, program=script)
    (error,) = re.findall(r"^train\.py: error: .*$", result.stderr, re.MULTILINE)
    assert "process 1 has peft 0.1, process 0 has" in error
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_crash_of_ours_shows_its_traceback(small_dataset, tiny_llm, tmp_path):
    """torch puts a buffer in the place of stderr while a process of a group dies, and these end before it is read."""
    script = tmp_path / "broken.py"
    script.write_text(
        "import runpy, sys\nfrom aullm_dist.training import step\n"
        "def broken(*_):\n    raise AssertionError('on purpose')\n"
        "step.TrainStep.run = broken\n"
        f"sys.argv[0] = {str(TRAIN)!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    result = fork(*short(small_dataset, tiny_llm, tmp_path / "run"), processes=2, program=script)
    assert result.returncode != 0
    assert re.search(r"^\[rank \d\] Traceback", result.stderr, re.MULTILINE), result.stderr
    assert "AssertionError: on purpose" in result.stderr


def test_two_machines_need_no_pdsh(small_dataset, tiny_llm, tmp_path):
    """With --multi_gpu each machine starts its own processes; --use_deepspeed would start all from one, by pdsh."""
    settings = short(small_dataset, tiny_llm, tmp_path / "run", training__strategy="zero2", training__processes=2)
    port = free_port()
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--multi_gpu", "--num_machines=2"]
    command += ["--num_processes=2", "--main_process_ip=127.0.0.1", f"--main_process_port={port}"]
    command += ["--mixed_precision=no", "--dynamo_backend=no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    machines = [
        subprocess.Popen(
            [*command, f"--machine_rank={rank}", str(TRAIN), *settings],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            env=environment,
        )  # fmt: skip
        for rank in range(2)
    ]
    errors = [machine.communicate(timeout=300)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert len(scalars(tmp_path / "run", "loss/loss")) == 2
    assert "Engine: DeepSpeed ZeRO-2" in errors[0]


def test_the_train_command_ends_like_its_processes(small_dataset, tiny_llm, tmp_path):
    """Exit code 2 and one line, where the launcher itself prints a table and a traceback and ends with 1."""
    settings = short(small_dataset, tiny_llm, tmp_path / "run", model__lora_targets="[no_proj]")
    command = [sys.executable, "-m", "aullm_dist.cli", "train", "--processes", "2", *settings]
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("error:") == 1
    assert result.stderr.rstrip().splitlines()[-1].startswith("train.py: error: ")
    assert "Traceback" not in result.stderr
