"""Is this checkpoint one of this model? Answered from the manifest, before anything is touched."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aullm_dist.errors import UserError
from aullm_dist.training import engine_state
from aullm_dist.training.base_identity import base_differences
from aullm_dist.training.tensor_plan import ADAPTER_FILE, MODULES_FILE, PlannedTensor

_NAMED_AT_MOST = 5
# What decides the function of an adapter beside its tensors; dropout, paths and library versions do not.
_ADAPTER_KEYS = (
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
)


def listing(problems: Sequence[str]) -> str:
    """Join the first few problems into one line and count the rest."""
    more = f"; and {len(problems) - _NAMED_AT_MOST} more" if len(problems) > _NAMED_AT_MOST else ""
    return "; ".join(problems[:_NAMED_AT_MOST]) + more


def refuse_other_model(
    folder: Path,
    manifest: Mapping[str, Any],
    plan: Iterable[PlannedTensor],
    *,
    saved_config: Mapping[str, Any],
    model_config: Mapping[str, Any] | None,
    base: Mapping[str, Any] | None,
    saved_adapter: Mapping[str, Any] | None,
    adapter_config: Mapping[str, Any] | None,
    with_optimizer: bool,
    what: str = "checkpoint",
) -> None:
    """Raise if the checkpoint's model is not the one it is to be loaded into.

    Args:
        folder: The checkpoint, for the message.
        manifest: Its verified manifest.
        plan: `plan_tensors` of the model.
        saved_config: The checkpoint's aullm_config.json.
        model_config: This model's; None skips the comparison.
        base: Identity of this run's LLM; None skips the comparison.
        saved_adapter: The checkpoint's adapter_config.json, None if it has none.
        adapter_config: This model's, None if it has no adapter.
        with_optimizer: Whether optimizer state is wanted too, which asks for the same trainables.
        what: What the message calls the folder.

    Raises:
        UserError: Naming the first differences, each with what was found and what is expected.
    """
    plan = list(plan)
    differences = []
    if model_config is not None:
        differences += _value_differences(
            "", saved_config, model_config, sorted({*saved_config, *model_config}, key=_aus_first)
        )
    if base is not None:
        differences += base_differences(manifest["base"], base)
    if saved_adapter is not None and adapter_config is not None:
        differences += _value_differences("LoRA ", saved_adapter, adapter_config, _ADAPTER_KEYS)
    differences += _tensor_differences(manifest, plan)
    if with_optimizer:
        differences += _trainable_differences(manifest, plan)
    if differences:
        raise UserError(f"{what} {folder} is of another model: {listing(differences)}")


def _aus_first(key: str) -> tuple[bool, str]:
    return key != "aus", key


def _value_differences(
    what: str, saved: Mapping[str, Any], expected: Mapping[str, Any], keys: Iterable[str]
) -> list[str]:
    return [
        f"{what}{key} is {saved.get(key)!r} in the checkpoint, {expected.get(key)!r} expected"
        for key in keys
        if saved.get(key) != expected.get(key)
    ]


def _tensor_differences(manifest: Mapping[str, Any], plan: list[PlannedTensor]) -> list[str]:
    differences = []
    for file in (ADAPTER_FILE, MODULES_FILE):
        saved = {key: tuple(entry["shape"]) for key, entry in manifest["tensors"].get(file, {}).items()}
        expected = {item.key: engine_state.full_shape(item.tensor) for item in plan if item.file == file}
        for key, shape in expected.items():
            if key not in saved:
                differences.append(f"{key} (shape {shape}) is not in the checkpoint's {file}")
            elif saved[key] != shape:
                differences.append(f"{key} has shape {saved[key]} in the checkpoint, {shape} expected")
        strangers = sorted(saved.keys() - expected.keys())
        differences += [f"{key} is in the checkpoint's {file}, but not in the model" for key in strangers]
    return differences


def _trainable_differences(manifest: Mapping[str, Any], plan: list[PlannedTensor]) -> list[str]:
    saved = {name for name, entry in manifest["parameters"].items() if entry["trainable"]}
    expected = {item.name for item in plan if item.trainable}
    return [f"{name} is trained here, but was frozen in the checkpoint" for name in sorted(expected - saved)] + [
        f"{name} was trained in the checkpoint, but is frozen here" for name in sorted(saved - expected)
    ]
