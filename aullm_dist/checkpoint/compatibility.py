"""Checks, from the manifest alone, that a checkpoint matches the current model."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aullm_dist.checkpoint.base_identity import base_differences
from aullm_dist.checkpoint.entries import ParameterEntry, TensorTable
from aullm_dist.checkpoint.tensor_plan import ADAPTER_FILE, MODULES_FILE, PlannedTensor
from aullm_dist.config import UNSAID, Config, function_settings
from aullm_dist.distributed import engine_state
from aullm_dist.errors import UserError
from aullm_dist.llm.identity import BaseIdentity

_NAMED_AT_MOST = 5
# What decides the function of an adapter in addition to its tensors; dropout, paths and library versions do not.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredModel:
    """The model that a folder holds, as its files describe it."""

    tensors: Mapping[str, TensorTable]
    """By file name."""
    config: Mapping[str, Any]
    """What defines its function: aullm_config.json of a checkpoint."""
    base: BaseIdentity | None
    adapter: Mapping[str, Any] | None = None
    """Its adapter_config.json; None without one, or to skip the comparison."""
    parameters: Mapping[str, ParameterEntry] = field(default_factory=dict)
    """Compared where optimizer state is wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedModel:
    """The model that the tensors of a folder are to be loaded into."""

    plan: Sequence[PlannedTensor]
    """`plan_tensors` of the model."""
    config: Mapping[str, Any] | None
    """What defines its function; None skips the comparison."""
    base: BaseIdentity | None
    """Identity of its LLM; None skips the comparison."""
    adapter: Mapping[str, Any] | None = None
    """Its adapter config; None if it has no adapter."""


def refuse_other_model(
    folder: Path, stored: StoredModel, expected: ExpectedModel, *, with_optimizer: bool, what: str = "checkpoint"
) -> None:
    """Raise if the stored model is not the one that it is to be loaded into.

    Args:
        folder: Where the model is stored, for the message.
        stored: What the folder holds.
        expected: The model at hand.
        with_optimizer: Whether optimizer state is wanted too, which asks for the same trainables.
        what: What the message calls the folder.

    Raises:
        UserError: Naming the first differences, each with what was found and what is expected.
    """
    differences = []
    if expected.config is not None:
        # A setting that an older checkpoint does not know had what is its default now.
        known = {key: value for key, value in function_settings(Config()).items() if key in expected.config}
        keys = sorted({*stored.config, *expected.config}, key=_aus_first)
        saved = {**known, **UNSAID, **stored.config}
        differences += _value_differences("", saved, {**UNSAID, **expected.config}, keys)
    if expected.base is not None:
        differences += base_differences(stored.base, expected.base)
    if stored.adapter is not None and expected.adapter is not None:
        differences += _value_differences("LoRA ", stored.adapter, expected.adapter, _ADAPTER_KEYS)
    differences += _tensor_differences(stored, expected.plan)
    if with_optimizer:
        differences += _trainable_differences(stored, expected.plan)
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


def _tensor_differences(stored: StoredModel, plan: Sequence[PlannedTensor]) -> list[str]:
    differences = []
    for file in (ADAPTER_FILE, MODULES_FILE):
        saved = {key: entry.shape for key, entry in stored.tensors.get(file, {}).items()}
        expected = {item.key: engine_state.full_shape(item.tensor) for item in plan if item.file == file}
        for key, shape in expected.items():
            if key not in saved:
                differences.append(f"{key} (shape {shape}) is not in the checkpoint's {file}")
            elif saved[key] != shape:
                differences.append(f"{key} has shape {saved[key]} in the checkpoint, {shape} expected")
        strangers = sorted(saved.keys() - expected.keys())
        differences += [f"{key} is in the checkpoint's {file}, but not in the model" for key in strangers]
    return differences


def _trainable_differences(stored: StoredModel, plan: Sequence[PlannedTensor]) -> list[str]:
    saved = {name for name, entry in stored.parameters.items() if entry.trainable}
    expected = {item.name for item in plan if item.trainable}
    return [f"{name} is trained here, but was frozen in the checkpoint" for name in sorted(expected - saved)] + [
        f"{name} was trained in the checkpoint, but is frozen here" for name in sorted(saved - expected)
    ]
