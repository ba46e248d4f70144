"""Derives lists and records of settings from their definitions."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aullm_dist.config.loader import plain, to_dict
from aullm_dist.config.schema import Config, Setting, settings
from aullm_dist.config.setting import Occasion
from aullm_dist.config.strategy import strategy_names

_NAMES = ("tiny", "none")
"""What `model.llm` may be that is no path, whatever lies in the working folder."""


def may_differ(occasion: Occasion) -> tuple[str, ...]:
    """Return the names of the settings that may have another value than the run had, such as `training.micro_batch`."""
    return tuple(setting.name for setting in settings() if occasion in setting.about.may_differ)


def llm_only() -> tuple[str, ...]:
    """Return the names of the settings that a model without an LLM has no use for."""
    return tuple(setting.name for setting in settings() if setting.about.llm_only)


def release_settings(config: Config) -> dict[str, dict[str, Any]]:
    """Return what a release stores of a configuration, by group and key, ready for JSON."""
    stored: dict[str, dict[str, Any]] = {}
    for setting in settings():
        if setting.about.recorded is not None:
            stored.setdefault(setting.group, {})[setting.key] = plain(setting.value(config))
    return stored


def function_settings(config: Config) -> dict[str, Any]:
    """Return what a checkpoint stores of the settings that define its model's function, under the names it uses.

    Settings of one name are a list. Without an LLM those are left out that need one.
    """
    values: dict[str, list[Any]] = {}
    for setting in settings():
        recorded = setting.about.recorded
        if recorded is None or recorded.function is None or (setting.about.llm_only and config.model.llm == "none"):
            continue
        values.setdefault(recorded.function, []).append(plain(setting.value(config)))
    return {name: found[0] if len(found) == 1 else found for name, found in values.items()}


def differing(config: Config) -> dict[str, dict[str, Any]]:
    """Return the values that are not the defaults, by group and key: the shortest run file of a configuration."""
    found: dict[str, dict[str, Any]] = {}
    for setting in settings():
        value = setting.value(config)
        if value != setting.default:
            found.setdefault(setting.group, {})[setting.key] = plain(value)
    return found


def to_record(config: Config) -> dict[str, Any]:
    """Return what `to_dict` returns, with every path in full: a record is read from other working folders."""
    record = to_dict(config)
    for setting in settings():
        if setting.about.place is not None:
            record[setting.group][setting.key] = plain(_each(setting, setting.value(config), os.path.abspath))
    return record


def different_settings(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Return the names of the settings that differ, as `to_dict` has them; one place may be written in several ways."""
    return [
        setting.name
        for setting in settings()
        if setting.key in one[setting.group] and setting.key in two[setting.group]
        if _differs(setting, one[setting.group][setting.key], two[setting.group][setting.key])
    ]


def _differs(setting: Setting, one: Any, two: Any) -> bool:
    if setting.about.place is None or one == two:
        return bool(one != two)
    return _each(setting, one, os.path.realpath) != _each(setting, two, os.path.realpath)


def _each(setting: Setting, value: Any, full: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [_each(setting, item, full) for item in value]
    is_name = setting.about.place == "path or name" and (
        value in _NAMES or value in strategy_names() or not Path(value).exists()
    )
    return value if is_name else full(value)
