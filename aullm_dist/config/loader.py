"""The strict YAML loader of a run's configuration and its `section.key=value` overrides.

Precedence is defaults < YAML < overrides. An unknown key, a wrong type, a duplicate key or an impossible combination
is a `UserError` of one line that names the file, the key, what was given, what is allowed and the nearest valid name.
This module imports neither torch nor transformers, so that a login node can check a run file in a blink.
"""

import contextlib
import copy
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TextIO

import yaml

from aullm_dist.config.checks import check
from aullm_dist.config.schema import Config
from aullm_dist.errors import UserError


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Build a checked configuration from defaults, an optional YAML file and overrides.

    Args:
        path: YAML file with the groups of `Config`; None takes the defaults alone.
        overrides: `section.key=value` strings; the value is read as YAML.

    Raises:
        UserError: one line that names the file or the override, the key, what was given and what is allowed.
    """
    config = Config()
    if path is not None:
        _apply_mapping(config, _read_yaml(Path(path)), str(path))
    apply_overrides(config, overrides)
    sources = [str(path)] if path is not None else []
    _check(config, " with ".join([*sources, "overrides"] if overrides else sources) or "defaults")
    return config


def apply_overrides(config: Config, overrides: Sequence[str]) -> None:
    """Set `section.key=value` strings in a configuration, without checking what they make of it together.

    Raises:
        UserError: an override is malformed, or names what there is not.
    """
    for override in overrides:
        _apply_override(config, override)


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def from_dict(mapping: Mapping[str, Any], source: str) -> Config:
    """Rebuild a configuration that `to_dict` wrote; `source` names it in errors."""
    config = Config()
    _apply_mapping(config, mapping, source)
    _check(config, source)
    return config


def _check(config: Config, source: str) -> None:
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, which plain YAML lets the last one win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise UserError(
                    f"{self.name}, line {key_node.start_mark.line + 1}: key {key!r} is not a name; keys are plain words"
                )
            if key in seen:
                raise UserError(
                    f"{self.name}, line {key_node.start_mark.line + 1}: key {key!r} is given twice; keep one"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _parse(stream: TextIO | str, name: str) -> Any:
    loader = _StrictLoader(stream)
    loader.name = name
    return loader.get_single_data()


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        with path.open(encoding="utf-8") as stream:
            content = _parse(stream, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML run file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text; give the path of a YAML run file") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not valid YAML ({getattr(error, 'problem', error)})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not groups; allowed: {', '.join(_group_names())}")
    return content


def _group_names() -> list[str]:
    return [f.name for f in dataclasses.fields(Config)]


def _nearest(name: str, allowed: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def _apply_mapping(config: Config, mapping: Mapping[str, Any], source: str) -> None:
    for group_name, values in mapping.items():
        if group_name not in _group_names():
            hint = _nearest(str(group_name), _group_names())
            raise UserError(f"{source}: unknown group {group_name!r}; {hint}allowed: {', '.join(_group_names())}")
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: {group_name} is {values!r}; a group of `key: value` lines is expected")
        for key, value in values.items():
            _set(getattr(config, group_name), group_name, str(key), value, source)


def _apply_override(config: Config, override: str) -> None:
    source = f"override {override!r}"
    key_path, equals, text = override.partition("=")
    group_name, dot, key = key_path.strip().partition(".")
    if not equals or not dot or not key:
        raise UserError(f"{source}: not of the form section.key=value, for instance training.seed=1")
    if group_name not in _group_names():
        hint = _nearest(group_name, _group_names())
        raise UserError(f"{source}: unknown group {group_name!r}; {hint}allowed: {', '.join(_group_names())}")
    try:
        value = _parse(text, source) if text.strip() else ""
    except yaml.YAMLError as error:
        raise UserError(f"{source}: the value is not valid YAML; quote it if it holds special characters") from error
    _set(getattr(config, group_name), group_name, key, value, source)


def _set(group: Any, group_name: str, key: str, value: Any, source: str) -> None:
    hints = typing.get_type_hints(type(group))
    if key not in hints:
        hint = _nearest(key, list(hints))
        raise UserError(f"{source}: unknown key '{group_name}.{key}'; {hint}allowed: {', '.join(sorted(hints))}")
    setattr(group, key, _convert(value, hints[key], f"{source}: {group_name}.{key}"))


def _convert(value: Any, kind: Any, where: str) -> Any:
    """Return `value` as `kind`, or raise; only integers and YAML's `1e-4` strings are turned, both into float."""
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value in choices and isinstance(value, str):
            return value
        close = _nearest(str(value), choices)
        raise UserError(f"{where} is {value!r}; {close}allowed: {', '.join(choices)}")
    if origin is types.UnionType:
        if value is None:
            return None
        return _convert(value, next(k for k in typing.get_args(kind) if k is not type(None)), where)
    if origin is list:
        (item_kind,) = typing.get_args(kind)
        if not isinstance(value, list):
            raise UserError(f"{where} is {value!r}; a list of {item_kind.__name__} is expected, such as [a, b]")
        return [_convert(item, item_kind, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} is {value!r}; a mapping of `name: value` is expected, such as {{a: 1, b: 2}}")
        return copy.deepcopy(value)
    if kind is float and isinstance(value, str):
        # PyYAML reads 1e-4 as text because YAML 1.1 wants a dot in the mantissa.
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{where} is {value!r} ({type(value).__name__}); a value of type {kind.__name__} is expected")
    return value
