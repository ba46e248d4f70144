"""Loads a run's configuration: strict YAML and `section.key=value` overrides.

Precedence is defaults < YAML < overrides. An unknown key, a wrong type, a duplicate key or an impossible combination
is a `UserError` of one line that names the file, the key, what was given, what is allowed and the nearest valid name.
This module imports neither torch nor transformers, so that a login node can check a run file in a blink.
"""

import copy
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import yaml

from aullm_dist.config.allowed import is_nullable
from aullm_dist.config.checks import check
from aullm_dist.config.schema import Config, group_documents, kind_of, place_of, settings
from aullm_dist.config.values import nearest, takes_text, takes_texts
from aullm_dist.errors import UserError
from aullm_dist.files import user_path

UNSAID = {"visual": "led", "answer": "deduction"}
"""What a model is whose recorded settings do not say: they are older than the setting."""
_BEFORE_THE_KEY = {**{f"model.{name}": before for name, before in UNSAID.items()}, "data.neutral_share": 0.0}
"""What a recorded configuration without the key meant, where that is not today's default."""


def load(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Config:
    """Build a checked configuration from defaults, an optional YAML file and overrides.

    Args:
        path: YAML file with the groups of `Config`; None takes the defaults alone.
        overrides: `section.key=value` strings; a text is taken as it stands, other values are read as YAML.

    Raises:
        UserError: one line that names the file or the override, the key, what was given and what is allowed.
    """
    config = Config()
    if path is not None:
        config = _with_mapping(config, read_run_file(Path(path)), str(path))
    config = with_overrides(config, overrides)
    sources = [str(path)] if path is not None else []
    return checked(config, " with ".join([*sources, "overrides"] if overrides else sources) or "defaults")


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return a configuration with `section.key=value` strings in it, without checking what they make of it together.

    Raises:
        UserError: an override is malformed, or names what there is not.
    """
    for override in overrides:
        config = _with_override(config, override)
    return config


def to_dict(config: Config) -> dict[str, Any]:
    """Return the configuration as plain nested dictionaries and lists, ready for YAML or JSON."""
    groups: dict[str, dict[str, Any]] = {}
    for setting in settings():
        groups.setdefault(setting.group, {})[setting.key] = plain(setting.value(config))
    return groups


def plain(value: Any) -> Any:
    """Return the value of a setting as YAML and JSON have it: a tuple as a list."""
    return list(value) if isinstance(value, tuple) else copy.deepcopy(value)


def load_recorded(path: Path) -> Config:
    """Return the configuration that a run has recorded: all of it, so that nothing is silently today's default.

    Raises:
        UserError: it cannot be read, or was cut off.
    """
    content = read_run_file(path)
    try:
        ends = path.read_bytes()[-1:] == b"\n"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the folder of a run") from error
    if not content or not ends:
        raise UserError(f"{path}: {'is cut off' if content else 'holds no settings'}; a run records all of them there")
    return from_dict(content, str(path))


def from_dict(mapping: Mapping[str, Any], source: str) -> Config:
    """Rebuild a configuration that `to_dict` wrote, of this version or an older one; `source` names it in errors."""
    return checked(_with_mapping(Config().changed(_BEFORE_THE_KEY), mapping, source), source)


def checked(config: Config, source: str) -> Config:
    """Return a configuration that can work.

    Raises:
        UserError: a value or a combination cannot; `source` names where they come from.
    """
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return config


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, and takes dates, clock times, octal and other numbers for text.

    Plain YAML lets the last of two keys win, and reads 012 as 10, 1:30 as 90 and 2026-01-31 as a date.
    """

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the name is PyYAML's

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None):
            line = event.start_mark.line + 1
            raise UserError(f"{self.name}, line {line}: the tag {event.tag} is not used here; write the value alone")
        return super().compose_node(parent, index)

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


class _TextLoader(_StrictLoader):
    """The same, for lists of texts: whatever stands there is text."""

    yaml_implicit_resolvers = {}  # noqa: RUF012 - the name is PyYAML's


for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", list("yYnNtTfFoO")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
    ("merge", r"<<", ["<"]),
):
    _StrictLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)


def _parse(stream: TextIO | str, name: str, kind: type[_StrictLoader] = _StrictLoader) -> Any:
    """Return what a document holds.

    Raises:
        UserError: it is not YAML, or holds what is not used here; `name` names it.
    """
    try:
        loader = kind(stream)
        loader.name = name
        return loader.get_single_data()
    except UserError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        raise UserError(f"{name}{where}: not valid YAML ({why})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text; give a YAML run file") from error
    except (ValueError, RecursionError) as error:
        # A number of thousands of digits, brackets in thousands.
        raise UserError(f"{name}: not usable YAML ({str(error)[:100]})") from error


def read_run_file(path: Path) -> Mapping[str, Any]:
    """Return the groups of a run file as they stand there.

    Raises:
        UserError: it cannot be read, is not YAML, or holds no groups.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            content = _parse(stream, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML run file") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, not groups; allowed: {', '.join(_group_names())}")
    return content


def _group_names() -> list[str]:
    return list(group_documents())


def _with_mapping(config: Config, mapping: Mapping[str, Any], source: str) -> Config:
    if not isinstance(mapping, Mapping):
        raise UserError(f"{source} is {type(mapping).__name__}; a mapping of groups is expected")
    found: dict[str, Any] = {}
    for group, values in mapping.items():
        if group not in _group_names():
            hint = nearest(str(group), _group_names())
            raise UserError(f"{source}: unknown group {group!r}; {hint}allowed: {', '.join(_group_names())}")
        if values is None:
            continue
        if not isinstance(values, Mapping):
            raise UserError(f"{source}: {group} is {values!r}; a group of `key: value` lines is expected")
        found |= {f"{group}.{key}": value for key, value in values.items()}
    return config.changed(found, source)


def _with_override(config: Config, override: str) -> Config:
    source = f"override {override!r}"
    name, equals, text = override.partition("=")
    group, dot, key = name.strip().partition(".")
    if not equals or not dot or not key:
        raise UserError(f"{source}: not of the form section.key=value, for instance training.seed=1")
    kind = kind_of(group, key, source)
    if takes_text(kind):
        value = None if text == "null" and is_nullable(kind) else _verbatim(text, source)
    elif takes_texts(kind):
        value = _list_of_texts(text, kind, source)
        if place_of(group, key) is not None and isinstance(value, list):
            _refuse_cut_path(text, value, source)
    else:
        value = _one_value(text, source) if text.strip() else ""
    return config.changed({f"{group}.{key}": value}, source)


def _verbatim(text: str, source: str) -> str:
    """Return a text as it was given, also where YAML would see a number, a date or a comment in it.

    Quotes around all of it are those of YAML, as in run files.
    """
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        quoted = _one_value(text, source, _TextLoader)
        if isinstance(quoted, str):
            return quoted
    if text != text.strip():
        raise UserError(f"{source}: the value begins or ends with a blank; leave it out, or write the value in quotes")
    return text


def _list_of_texts(text: str, kind: Any, source: str) -> Any:
    """Return a list in brackets, or a text alone as the list of it; true and false where the setting takes them."""
    if text.lstrip().startswith("["):
        return _one_value(text, source, _TextLoader)
    if bool in typing.get_args(kind) and isinstance(value := _one_value(text, source), bool):
        return value
    return [_verbatim(text, source)] if text else ""


def _one_value(text: str, source: str, kind: type[_StrictLoader] = _StrictLoader) -> Any:
    """Return the one YAML value of a text, none of which may be cut off as a comment."""
    value = _parse(text, source, kind)
    if "#" in text and text[_end_of(text) :].strip():
        raise UserError(f"{source}: what follows ' #' would be cut off as a comment; leave it out, or quote the value")
    return value


def _end_of(text: str) -> int:
    """Return where the one YAML value of a text ends."""
    node = yaml.compose(text, _TextLoader)
    return node.end_mark.index if node is not None else 0


def _refuse_cut_path(text: str, parts: Sequence[Any], source: str) -> None:
    """Refuse a path with a comma that the brackets have made two of."""
    whole = text.strip()[1:-1].strip()
    if len(parts) > 1 and user_path(whole).exists() and not any(Path(str(part)).exists() for part in parts):
        raise UserError(f"{source}: the comma makes {len(parts)} paths of {whole!r}, which exists; write it in quotes")
