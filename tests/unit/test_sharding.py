"""Sections of a DeepSpeed JSON that cannot work with this trainer, or would do something else than they say."""

import json
import subprocess
import sys

import pytest
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from aullm_dist.config import TrainingConfig, configs_folder, find_config, load, load_strategy
from aullm_dist.errors import UserError

TRAINING = TrainingConfig(global_batch=16, micro_batch=2)
SHIPPED = sorted(path.stem for path in (configs_folder() / "deepspeed").glob("*.json"))
CPU = {"device": "cpu"}


def write(tmp_path, zero, **content) -> str:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3} | zero} | content))
    return str(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_takes_every_shipped_file(name):
    zero = load_strategy(name).resolved(TRAINING, processes=8, per_node=4)["zero_optimization"]
    parsed = DeepSpeedZeroConfig(**zero)
    assert parsed.stage == zero["stage"]
    assert (parsed.offload_optimizer is not None) == ("offload" in name)
    assert (parsed.offload_param is not None) == (name == "zero3_offload_param")
    assert parsed.zero_hpz_partition_size == (4 if name == "zero3_hpz" else 1)


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"zero_quantized_weights": True}, "zero_quantized_weights is True; allowed: false .*NF4"),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights is True; .*NF4"),
        ({"zero_quantized_gradients": 1}, "zero_quantized_gradients is 1"),
        ({"stage": 2, "offload_optimizer": CPU, "offload_param": CPU}, "offload_param, which is for stage 3"),
        ({"stage": 1, "stage3_prefetch_bucket_size": 1}, "stage3_prefetch_bucket_size, which is for stage 3"),
        ({"stage": 2, "zero_hpz_partition_size": 2}, "zero_hpz_partition_size, which is for stage 3"),
        ({"round_robin_gradients": True}, "round_robin_gradients, which is for stages 1 and 2, but stage is 3"),
        ({"allgather_bucket_size": 5}, "allgather_bucket_size, which is for stages 1 and 2"),
        ({"offload_optimizer": {"device": "nvme"}}, "offload_optimizer.device is 'nvme'; allowed: none, cpu"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/d"}}, "offload_param.device is 'nvme'"),
        ({"offload_optimizer": {"device": ["cpu"]}}, "offload_optimizer.device is "),
        ({"offload_optimizer": None}, "offload_optimizer is None"),
        ({"offload_optimizer": CPU | {"ratio": 0.5}}, "offload_optimizer.ratio is 0.5, .*allowed: 1.0"),
        ({"offload_optimizer": CPU | {"super_offload": True}}, "super_offload is True"),
        ({"cpu_offload": True}, "cpu_offload is an old name; use offload_optimizer"),
        ({"zero_hpz_partition_size": 0}, "zero_hpz_partition_size is 0"),
        ({"stage": 2, "compute_grad_norm": False}, "compute_grad_norm is False"),
        ({"zenflow": {}}, "zenflow"),
        ({"mics_shard_size": 2}, "mics_shard_size is 2; allowed: -1"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, zero, message):
    with pytest.raises(UserError, match=message) as refusal:
        load_strategy(write(tmp_path, zero))
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(str(tmp_path / "own.json"))


def test_the_optimizer_stays_the_trainers_wherever_its_state_is(tmp_path):
    path = write(tmp_path, {"offload_optimizer": CPU})
    assert load_strategy(path).resolved(TRAINING, 2)["zero_force_ds_cpu_optimizer"] is False
    path = write(tmp_path, {"offload_optimizer": CPU}, zero_force_ds_cpu_optimizer=True)
    with pytest.raises(UserError, match="zero_force_ds_cpu_optimizer is True; allowed: false"):
        load_strategy(path)


@pytest.mark.parametrize(
    ("size", "processes", "per_node", "filled"),
    [("auto", 8, 4, 4), ("auto", 4, None, 4), (2, 4, 4, 2), (1, 3, 3, 1), (8, 1, 1, 1)],
)
def test_hpz_is_the_processes_of_a_machine(tmp_path, size, processes, per_node, filled):
    strategy = load_strategy(write(tmp_path, {"zero_hpz_partition_size": size}))
    training = TrainingConfig(global_batch=24, micro_batch=1)
    assert strategy.resolved(training, processes, per_node)["zero_optimization"]["zero_hpz_partition_size"] == filled


@pytest.mark.parametrize(("size", "processes"), [(3, 4), (8, 4)])
def test_hpz_that_does_not_divide_the_processes(tmp_path, size, processes):
    strategy = load_strategy(write(tmp_path, {"zero_hpz_partition_size": size}))
    with pytest.raises(UserError, match=f"is {size}, but the run has {processes} processes"):
        strategy.resolved(TRAINING, processes)


def test_a_refusal_ends_the_command_with_2(tmp_path):
    path = write(tmp_path, {"zero_quantized_weights": True})
    command = [sys.executable, "-m", "aullm_dist.cli", "config", "demo", f"training.strategy={path}"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
    assert "zero_quantized_weights" in result.stderr


@pytest.mark.parametrize("name", ["llama31_8b", "qwen3_8b", "mistral_7b", "qwen3_32b", "llama31_70b", "qwen25_72b"])
def test_run_files_of_real_backbones_can_be_distributed_as_they_say(name):
    config = load(find_config(name))
    processes = config.training.processes
    deepspeed = load_strategy(config.training.strategy).resolved(config.training, processes, per_node=min(processes, 8))
    assert config.training.global_batch % (config.training.micro_batch * processes) == 0
    assert config.model.quantization == "nf4"
    if deepspeed is not None:
        assert deepspeed["train_batch_size"] == config.training.global_batch
