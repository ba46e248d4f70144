"""Combines the groups of settings into the whole configuration of a run."""

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from aullm_dist.config.data_settings import DataConfig
from aullm_dist.config.model_settings import CounterfactualConfig, ModelConfig
from aullm_dist.config.setting import Description, Place, description_of
from aullm_dist.config.training_settings import MonitorConfig, TrainingConfig
from aullm_dist.config.values import at_home, convert, nearest
from aullm_dist.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The whole configuration of a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    counterfactual: CounterfactualConfig = field(default_factory=CounterfactualConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def changed(self, values: Mapping[str, Any], source: str = "changed settings") -> "Config":
        """Return a configuration with other values, without checking what they make of it together.

        Args:
            values: by the setting's name, such as `model.llm`.
            source: what errors name as the place of the values.

        Raises:
            UserError: there is no such setting, or a value is of another type.
        """
        groups: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            group, _, key = name.partition(".")
            kind = kind_of(group, key, source)
            converted = convert(value, kind, f"{source}: {name}")
            if place_of(group, key) is not None:
                converted = at_home(converted, f"{source}: {name}")
            groups.setdefault(group, {})[key] = converted
        made = {group: dataclasses.replace(getattr(self, group), **keys) for group, keys in groups.items()}
        return dataclasses.replace(self, **made)


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting: its place, its type and default, and its description where it is defined."""

    group: str
    key: str
    kind: Any
    default: Any
    about: Description

    @property
    def name(self) -> str:
        """The name in overrides and messages, such as `model.llm`."""
        return f"{self.group}.{self.key}"

    def value(self, config: Config) -> Any:
        """Return the value that a configuration has."""
        return getattr(getattr(config, self.group), self.key)


@functools.cache
def settings() -> tuple[Setting, ...]:
    """Return every setting, in the order of the classes."""
    return tuple(
        Setting(group.name, item.name, item.type, item.default, description_of(item))
        for group in dataclasses.fields(Config)
        for item in dataclasses.fields(_class_of(group))
    )


def group_documents() -> dict[str, str]:
    """Return what each group is about, by its name."""
    return {group.name: (_class_of(group).__doc__ or "").strip() for group in dataclasses.fields(Config)}


def kind_of(group: str, key: str, source: str) -> Any:
    """Return the type of a setting.

    Raises:
        UserError: there is no such group or setting; `source` names the place where it was given.
    """
    groups = list(group_documents())
    if group not in groups:
        raise UserError(f"{source}: unknown group {group!r}; {nearest(group, groups)}allowed: {', '.join(groups)}")
    kinds = {setting.key: setting.kind for setting in settings() if setting.group == group}
    if key not in kinds:
        hint = nearest(key, list(kinds))
        raise UserError(f"{source}: unknown key '{group}.{key}'; {hint}allowed: {', '.join(sorted(kinds))}")
    return kinds[key]


def place_of(group: str, key: str) -> Place | None:
    """Return what a setting that says where something is may hold; None for other settings."""
    return next(setting.about.place for setting in settings() if (setting.group, setting.key) == (group, key))


def _class_of(group: dataclasses.Field[Any]) -> type[Any]:
    assert isinstance(group.type, type)
    return group.type
