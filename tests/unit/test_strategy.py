"""One source for the strategy: what a JSON or a launcher may not say against the run file, one line for each."""

import json

import pytest

from aullm_dist.config import TrainingConfig, configs_folder, load_strategy, refuse_launcher
from aullm_dist.errors import UserError

TRAINING = TrainingConfig(global_batch=16, micro_batch=4)


def write(tmp_path, **content) -> str:
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}} | content))
    return str(path)


@pytest.mark.parametrize(
    ("name", "stage"), [("ddp", 0), ("zero1", 1), ("zero2", 2), ("zero2_offload", 2), ("zero3", 3)]
)
def test_shipped_strategies(name, stage):
    strategy = load_strategy(name)
    assert strategy.stage == stage
    assert (strategy.deepspeed is None) == (name == "ddp")


def test_every_shipped_file_is_a_strategy():
    for path in (configs_folder() / "deepspeed").glob("*.json"):
        assert load_strategy(path.stem).file == path


def test_autos_are_filled_in_from_the_run_file():
    config = load_strategy("zero3").resolved(TRAINING, processes=2)
    assert config["train_batch_size"] == 16
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["gradient_clipping"] == TRAINING.clip_norm
    assert "auto" not in json.dumps(config)
    assert load_strategy("ddp").resolved(TRAINING, processes=2) is None


@pytest.mark.parametrize("name", [path.stem for path in sorted((configs_folder() / "deepspeed").glob("*.json"))])
def test_deepspeed_times_nothing_for_which_the_host_waits(name):
    """As DeepSpeed itself reads the configuration; its default is to synchronize around every pass."""
    from deepspeed.utils.config import get_timers_config

    config = load_strategy(name).resolved(TRAINING, processes=2)
    assert not get_timers_config(config).enabled
    assert not config.get("wall_clock_breakdown")


def test_the_configuration_that_a_run_records_is_a_strategy(tmp_path):
    recorded = load_strategy("zero2").resolved(TRAINING, processes=2)
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(recorded))
    assert load_strategy(str(path)).resolved(TRAINING, processes=2) == recorded


def test_a_file_that_says_the_same_is_accepted(tmp_path):
    zero = {"stage": 3, "offload_param": {"device": "none"}, "zero_hpz_partition_size": 1, "mics_shard_size": -1}
    path = write(tmp_path, train_batch_size=16, gradient_clipping=1.0, bf16={"enabled": False}, zero_optimization=zero)
    assert load_strategy(path).resolved(TRAINING, processes=1)["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train_batch_size": 8}, "training.global_batch is 16"),
        ({"train_micro_batch_size_per_gpu": 1}, "training.micro_batch is 4"),
        ({"gradient_accumulation_steps": 7}, "the run file's batches give 4"),
        ({"gradient_clipping": 0.5}, "training.clip_norm is 1.0"),
    ],
)
def test_a_file_that_contradicts_the_run_file(tmp_path, content, message):
    strategy = load_strategy(write(tmp_path, **content))
    with pytest.raises(UserError, match=message):
        strategy.resolved(TRAINING, processes=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"bf16": {"enabled": True}}, "training.precision"),
        ({"fp16": {"enabled": True}}, "training.precision"),
        ({"torch_autocast": {"enabled": True}}, "training.precision"),
        ({"optimizer": {"type": "Adam"}}, "remove it"),
        ({"scheduler": {"type": "WarmupLR"}}, "remove it"),
        ({"timers": {"throughput": {"enabled": True}}}, "section 'timers', but step times are the run's own"),
        ({"zero_optimization": {"stage": 0}}, "allowed: 1, 2 or 3"),
        ({"zero_optimization": {"stage": True}}, "allowed: 1, 2 or 3"),
        ({"zero_optimization": {}}, "allowed: 1, 2 or 3"),
        ({"zero_optimization": 3}, "allowed: 1, 2 or 3"),
        ({"gradient_clip": 0.5}, "key 'gradient_clip' is not used by this trainer; allowed: train_batch_size"),
        ({"communication_data_type": "bf16"}, "'communication_data_type' is not used"),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, "'data_types' is not used"),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, "zero_optimization.reduce_bucket_size"),
    ],
)
def test_a_file_that_this_trainer_cannot_run(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as refusal:
        load_strategy(write(tmp_path, **content))
    assert "\n" not in str(refusal.value)
    assert "own.json" in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1: not valid JSON"),
        ("[1]", "a JSON object"),
        ('{"zero_optimization": {"stage": 2, "stage": 3}}', "'stage' is given twice"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, text, message):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_strategy(str(path))


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match="allowed: ddp, zero1, zero2, zero2_offload, zero3, .*, or the path"):
        load_strategy("zero4")


@pytest.mark.parametrize(
    ("name", "environment", "flag"),
    [
        ("ddp", {"ACCELERATE_USE_DEEPSPEED": "true"}, "--use_deepspeed"),
        ("zero3", {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "--zero_stage 2"),
        ("zero3", {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "other.json"}, "--deepspeed_config_file"),
        ("zero3", {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}, "--offload_param_device cpu"),
        ("zero2", {"ACCELERATE_GRADIENT_CLIPPING": "0.3"}, "--gradient_clipping 0.3"),
        ("ddp", {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2"}, "--gradient_accumulation_steps 2"),
        ("ddp", {"ACCELERATE_MIXED_PRECISION": "bf16"}, "--mixed_precision bf16"),
        ("ddp", {"ACCELERATE_USE_FSDP": "true"}, "--use_fsdp"),
        ("zero1", {"ACCELERATE_USE_MEGATRON_LM": "true"}, "--use_megatron_lm"),
        ("zero1", {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "--use_parallelism_config"),
        ("ddp", {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "--dynamo_backend inductor"),
    ],
)
def test_a_launcher_that_contradicts_the_run_file(name, environment, flag):
    with pytest.raises(UserError, match=flag) as refusal:
        refuse_launcher(load_strategy(name), TRAINING, environment)
    assert "\n" not in str(refusal.value)


def test_a_launcher_that_says_the_same_is_accepted():
    strategy = load_strategy("zero3")
    same = {
        "WORLD_SIZE": "2",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(strategy.file),
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "2",
        "ACCELERATE_GRADIENT_CLIPPING": "1.0",
        "ACCELERATE_MIXED_PRECISION": "no",
        "ACCELERATE_DYNAMO_BACKEND": "no",
    }
    refuse_launcher(strategy, TRAINING, same)
    bf16 = TrainingConfig(global_batch=16, micro_batch=4, precision="bf16")
    refuse_launcher(strategy, bf16, same | {"ACCELERATE_MIXED_PRECISION": "bf16"})
