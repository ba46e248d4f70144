"""Maps `training.strategy` to a distribution strategy.

A strategy is `ddp`, the stem of a file in configs/deepspeed, or the path of a DeepSpeed JSON of the user's own. The
JSON decides how tensors are sharded; batch, clipping and precision come from the run file, and a JSON that sets one of
them differently is refused instead of winning silently.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aullm_dist.config.schema import TrainingConfig
from aullm_dist.config.sharding import HPZ, fill_sharding, refuse_sharding
from aullm_dist.config.shipped import configs_folder
from aullm_dist.errors import UserError
from aullm_dist.files import read_json, user_path

DDP = "ddp"
_STAGES = (1, 2, 3)
# What the trainer does itself, so that every engine computes the same function.
_OURS = {
    "optimizer": "AdamW and its learning rates are those of the run file",
    "scheduler": "the schedule is that of the run file",
    "timers": "step times are the run's own, which do not wait for the GPU as DeepSpeed's do",
}
# DeepSpeed's timer of throughput, on by default, has the host wait for the GPU before and after every pass. The run's
# own step times come from events and never wait.
_NO_TIMERS = {"throughput": {"enabled": False}}
_PRECISION_SECTIONS = ("bf16", "fp16", "torch_autocast", "amp")
# What may stand next to `zero_optimization` and the values of the run file: messages, timings, whose optimizer.
# DeepSpeed passes over keys that it does not know, so a misspelt one would be lost silently.
_MAY_STAND = (
    "comms_logger",
    "dump_state",
    "flops_profiler",
    "memory_breakdown",
    "steps_per_print",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
)


@dataclass(frozen=True, slots=True)
class Strategy:
    """How the run is distributed.

    Attributes:
        name: as given in the run file.
        stage: ZeRO stage 1 to 3, or 0 for DDP.
        deepspeed: the DeepSpeed configuration as it stands in its file; None for DDP.
        file: where it was read; None for DDP.
    """

    name: str
    stage: int = 0
    deepspeed: Mapping[str, Any] | None = None
    file: Path | None = None

    def resolved(self, training: TrainingConfig, processes: int, per_node: int | None = None) -> dict[str, Any] | None:
        """Return the DeepSpeed configuration with every "auto" filled in; None for DDP.

        Args:
            training: the run file's values.
            processes: of the run.
            per_node: processes on each machine; None if all are on one.

        Raises:
            UserError: the JSON sets a value that contradicts the run file or the number of processes.
        """
        if self.deepspeed is None:
            return None
        config = json.loads(json.dumps(self.deepspeed))
        for key, (value, source) in values_of_run_file(training, processes).items():
            given = config.get(key, "auto")
            if given not in ("auto", value):
                raise UserError(f'{self.file}: {key} is {given!r}, but {source}; allowed: "auto", or leave it out')
            config[key] = value
        assert self.file is not None, "a strategy of DeepSpeed comes from a file"
        fill_sharding(self.file, config, processes, per_node or processes)
        config["timers"] = _NO_TIMERS
        return config


def strategy_names() -> list[str]:
    """Return the names of the shipped strategies."""
    return [DDP, *sorted(path.stem for path in (configs_folder() / "deepspeed").glob("*.json"))]


def load_strategy(name: str) -> Strategy:
    """Find and read a strategy.

    Raises:
        UserError: there is none of that name, or its JSON is not one that this trainer can run.
    """
    if name == DDP:
        return Strategy(DDP)
    shipped = configs_folder() / "deepspeed" / f"{name}.json"
    path = shipped if name in strategy_names() else user_path(name)
    if not path.is_file():
        raise UserError(
            f"training.strategy is {name!r}; allowed: {', '.join(strategy_names())}, or the path of a DeepSpeed JSON"
        )
    content = _read_json(path)
    zero = content.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in _STAGES:
        raise UserError(
            f"{path}: zero_optimization.stage is {stage!r}; allowed: 1, 2 or 3 (strategy {DDP} shards nothing)"
        )
    _refuse_what_is_ours(path, content)
    refuse_sharding(path, content)
    return Strategy(name, stage, content, path)


def _read_json(path: Path) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(f"{path}: key {key!r} is given twice; keep one")
        return dict(pairs)

    return read_json(path, "give the path of a DeepSpeed JSON", object_pairs_hook=without_duplicates)


def _refuse_what_is_ours(path: Path, content: Mapping[str, Any]) -> None:
    for key, why in _OURS.items():
        # The deepspeed.json of a run is a strategy too.
        if key in content and (key, content[key]) != ("timers", _NO_TIMERS):
            raise UserError(f"{path}: has a section {key!r}, but {why}; remove it")
    for key in _PRECISION_SECTIONS:
        section = content.get(key)
        if section and not (isinstance(section, dict) and section.get("enabled", True) is False):
            raise UserError(
                f"{path}: has a section {key!r}, which would also cast what is trained; remove it: the precision is "
                "training.precision"
            )
    values = list(values_of_run_file(TrainingConfig(), 1))
    known = [*values, "zero_optimization", *_MAY_STAND]
    for key in content:
        if key not in (*known, *_PRECISION_SECTIONS, *_OURS):
            raise UserError(f"{path}: key {key!r} is not used by this trainer; allowed: {', '.join(known)}")
    filled = (*values, f"zero_optimization.{HPZ}")
    for name in _autos(content):
        if name not in filled:
            raise UserError(f'{path}: {name} is "auto"; allowed: a value ("auto" is for {", ".join(filled)})')


def _autos(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted names of the values that are "auto"."""
    found = []
    for key, value in content.items():
        if isinstance(value, dict):
            found += _autos(value, f"{prefix}{key}.")
        elif value == "auto":
            found.append(prefix + key)
    return found


def values_of_run_file(training: TrainingConfig, processes: int) -> dict[str, tuple[float, str]]:
    """Return, by DeepSpeed's key, what the run file says, and how to name it in a message."""
    accumulation = training.accumulation(processes)
    return {
        "train_batch_size": (training.global_batch, f"training.global_batch is {training.global_batch}"),
        "train_micro_batch_size_per_gpu": (training.micro_batch, f"training.micro_batch is {training.micro_batch}"),
        "gradient_accumulation_steps": (accumulation, f"the run file's batches give {accumulation}"),
        "gradient_clipping": (training.clip_norm, f"training.clip_norm is {training.clip_norm}"),
    }
