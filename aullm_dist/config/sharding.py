"""Checks the `zero_optimization` section of a DeepSpeed JSON; each refusal is one line.

DeepSpeed accepts most of this silently: a key of another stage has no effect, and what does not work fails long
after the LLM was loaded, or computes something else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aullm_dist.errors import UserError

HPZ = "zero_hpz_partition_size"
_DEVICES = ("none", "cpu")
_QUANTIZED = {
    "zero_quantized_weights": "it rounds what is sent to 8 bits, trained weights and packed NF4 bytes too",
    "zero_quantized_nontrainable_weights": "it would round the packed bytes of an NF4 base as if they were numbers",
    "zero_quantized_gradients": "it rounds gradients before they are sent, which no other engine does",
}
# They need DeepSpeed's own optimizer, which the trainer does not use.
_OWN_OPTIMIZER = {"ratio": 1.0, "super_offload": False}
_STAGE_3 = ("sub_group_size", "memory_efficient_linear", HPZ)
_STAGE_1_2 = (
    "allgather_partitions",
    "allgather_bucket_size",
    "round_robin_gradients",
    "parameter_alignment",
    "use_multi_rank_bucket_allreduce",
)
_DEPRECATED = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}


def refuse_sharding(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse a DeepSpeed configuration that cannot work with this trainer, or part of which would have no effect.

    Raises:
        UserError: naming file, key, what it is and what is allowed.
    """
    zero = content["zero_optimization"]
    for old, new in _DEPRECATED.items():
        if old in zero:
            raise UserError(f'{path}: zero_optimization.{old} is an old name; use {new}: {{"device": "cpu"}}')
    for key, why in _QUANTIZED.items():
        if zero.get(key, False) is not False:
            raise UserError(
                f"{path}: zero_optimization.{key} is {zero[key]!r}; allowed: false ({why}; small weights are "
                "model.quantization=nf4)"
            )
    if zero.get("compute_grad_norm", True) is not True:
        raise UserError(
            f"{path}: zero_optimization.compute_grad_norm is {zero['compute_grad_norm']!r}; allowed: true, as the "
            "trainer clips by it"
        )
    if "zenflow" in zero:
        raise UserError(f"{path}: has zero_optimization.zenflow, which needs an optimizer of DeepSpeed's; remove it")
    if zero.get("mics_shard_size", -1) != -1:
        raise UserError(
            f"{path}: zero_optimization.mics_shard_size is {zero['mics_shard_size']!r}; allowed: -1, as MiCS was not "
            f"tried with this trainer (pieces within a machine: {HPZ})"
        )
    _refuse_other_stage(path, zero)
    _refuse_offloading(path, content)
    size = zero.get(HPZ, 1)
    if size != "auto" and (type(size) is not int or size < 1):
        raise UserError(f'{path}: zero_optimization.{HPZ} is {size!r}; allowed: "auto", or a whole number from 1')


def fill_sharding(file: Path, config: dict[str, Any], processes: int, per_node: int) -> None:
    """Fill in, in place, what of the section depends on the run.

    Raises:
        UserError: the processes cannot be split as the section says.
    """
    zero = config["zero_optimization"]
    if offloaded_to(zero, "optimizer") != "none":
        # Else Accelerate swaps the optimizer for DeepSpeed's, which is compiled at the first start.
        config["zero_force_ds_cpu_optimizer"] = False
    if HPZ in zero:
        size = per_node if zero[HPZ] == "auto" else zero[HPZ]
        if processes == 1:
            size = 1  # nothing is sharded, so not twice either
        if processes % size:
            raise UserError(
                f"{file}: zero_optimization.{HPZ} is {size}, but the run has {processes} processes; allowed: a number "
                "that divides them, best the processes of one machine"
            )
        zero[HPZ] = size


def offloaded_to(zero: Mapping[str, Any], what: str) -> str:
    """Return the device that `param` or `optimizer` is offloaded to, `none` if it is not."""
    return zero.get(f"offload_{what}", {}).get("device", "none")


def _refuse_other_stage(path: Path, zero: Mapping[str, Any]) -> None:
    stage = zero["stage"]
    for key in zero:
        only_3 = key in _STAGE_3 or key.startswith("stage3_") or key == "offload_param"
        if (only_3 and stage != 3) or (key in _STAGE_1_2 and stage == 3):
            allowed = "stage 3" if only_3 else "stages 1 and 2"
            raise UserError(
                f"{path}: has zero_optimization.{key}, which is for {allowed}, but stage is {stage}; remove it"
            )


def _refuse_offloading(path: Path, content: Mapping[str, Any]) -> None:
    zero = content["zero_optimization"]
    for what in ("optimizer", "param"):
        name = f"offload_{what}"
        section = zero.get(name, {})
        if not isinstance(section, Mapping):
            raise UserError(
                f'{path}: zero_optimization.{name} is {section!r}; allowed: {{"device": "cpu"}}, or leave it out'
            )
        device = offloaded_to(zero, what)
        if device not in _DEVICES:
            raise UserError(
                f"{path}: zero_optimization.{name}.device is {device!r}; allowed: {', '.join(_DEVICES)} (disks are not "
                "offered: checkpoints could not set what is swapped out)"
            )
        for key, value in _OWN_OPTIMIZER.items():
            if section.get(key, value) != value:
                raise UserError(
                    f"{path}: zero_optimization.{name}.{key} is {section[key]!r}, which needs an optimizer of "
                    f"DeepSpeed's; allowed: {str(value).lower()}, or leave it out"
                )
    if content.get("zero_force_ds_cpu_optimizer", False) is not False:
        raise UserError(
            f"{path}: zero_force_ds_cpu_optimizer is {content['zero_force_ds_cpu_optimizer']!r}; allowed: false, as "
            "the optimizer is the trainer's AdamW wherever its state is"
        )
