"""Compares the options of `accelerate launch` with the run file, whose `training.strategy` alone decides."""

from collections.abc import Mapping
from pathlib import Path

from aullm_dist.config.schema import TrainingConfig
from aullm_dist.config.sharding import offloaded_to
from aullm_dist.config.strategy import Strategy, strategy_names
from aullm_dist.errors import UserError


def refuse_launcher(strategy: Strategy, training: TrainingConfig, environment: Mapping[str, str]) -> None:
    """Refuse launcher flags, as `accelerate launch` passes them on in the environment, that contradict the run file.

    Raises:
        UserError: naming the flag and the setting.
    """
    _refuse_other_engine(strategy, training, environment)
    groups = training.folds_at_once if training.folds_at_once != "auto" else 1
    accumulation = training.accumulation(int(environment.get("WORLD_SIZE", "1")) // groups)
    zero = strategy.deepspeed["zero_optimization"] if strategy.deepspeed is not None else {}
    offload = {name: offloaded_to(zero, name) for name in ("optimizer", "param")}
    flags: list[tuple[str, str, object, str]] = [
        ("ACCELERATE_DEEPSPEED_ZERO_STAGE", "--zero_stage", strategy.stage, f"training.strategy is {strategy.name}"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "--gradient_accumulation_steps",
            accumulation,
            f"the run file's batches give {accumulation}",
        ),
        (
            "ACCELERATE_GRADIENT_CLIPPING",
            "--gradient_clipping",
            training.clip_norm,
            f"training.clip_norm is {training.clip_norm}",
        ),
    ]
    for name in ("optimizer", "param"):
        variable = f"ACCELERATE_DEEPSPEED_OFFLOAD_{name.upper()}_DEVICE"
        flags.append(
            (
                variable,
                f"--offload_{name}_device",
                offload[name],
                f"training.strategy {strategy.name} has {offload[name]}",
            )
        )
    for variable, flag, ours, source in flags:
        given = environment.get(variable, "auto")
        if given not in ("auto", "None") and not _same(given, ours):
            raise UserError(f"the launcher was given {flag} {given}, but {source}; drop the flag")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16" if training.precision == "bf16" else "no"):
        raise UserError(
            f"the launcher was given --mixed_precision {precision}, but training.precision is {training.precision}; "
            "drop the flag, or use no"
        )


def _refuse_other_engine(strategy: Strategy, training: TrainingConfig, environment: Mapping[str, str]) -> None:
    others = {
        "ACCELERATE_USE_FSDP": "--use_fsdp",
        "ACCELERATE_USE_MEGATRON_LM": "--use_megatron_lm",
        "ACCELERATE_USE_PARALLELISM_CONFIG": "--use_parallelism_config",
    }
    for variable, flag in others.items():
        if environment.get(variable, "false").lower() in ("true", "1"):
            raise UserError(
                f"the launcher was given {flag}, but training.strategy is {strategy.name}; drop the flag "
                f"(strategies: {', '.join(strategy_names())})"
            )
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" and strategy.deepspeed is None:
        raise UserError(
            f"the launcher was given --use_deepspeed, but training.strategy is {strategy.name}; set training.strategy "
            f"to one of {', '.join(strategy_names()[1:])}, or start with --multi_gpu instead"
        )
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true" and training.folds_at_once != 1:
        raise UserError(
            f"the launcher was given --use_deepspeed, but training.folds_at_once is {training.folds_at_once}; start "
            "with --multi_gpu instead"
        )
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    same_file = file and strategy.file is not None and Path(file).resolve() == strategy.file.resolve()
    if file not in (None, "none", "None") and not same_file:
        raise UserError(
            f"the launcher was given --deepspeed_config_file {file}, but training.strategy is {strategy.name}; give "
            "the file as training.strategy alone"
        )
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if dynamo.lower() != "no":
        raise UserError(f"the launcher was given --dynamo_backend {dynamo.lower()}, which is not offered; use no")


def _same(given: str, ours: object) -> bool:
    try:
        return float(given) == float(str(ours))
    except (TypeError, ValueError):
        return given == ours
