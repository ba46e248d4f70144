"""Builds the JSON Schema of a run file, with which editors complete and check it."""

import types
import typing
from typing import Any, Literal

from aullm_dist.config.allowed import is_union
from aullm_dist.config.loader import plain
from aullm_dist.config.schema import Setting, group_documents, settings

SCHEMA_FILE = "schema.json"
"""Name of the shipped schema in the folder of configurations."""
_NAMES: dict[Any, str] = {bool: "boolean", int: "integer", float: "number", str: "string"}


def json_schema() -> dict[str, Any]:
    """Return the schema, of the draft 2020-12.

    It describes each setting for itself. Combinations that cannot work are left to `aullm-dist config`.
    """
    groups = {
        name: {
            "description": document,
            "type": ["object", "null"],
            "additionalProperties": False,
            "properties": {setting.key: _of_setting(setting) for setting in settings() if setting.group == name},
        }
        for name, document in group_documents().items()
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Run file of aullm-dist",
        "type": "object",
        "additionalProperties": False,
        "properties": groups,
    }


def _of_setting(setting: Setting) -> dict[str, Any]:
    allowed = setting.about.allowed
    return {
        "description": setting.about.meaning,
        **_of_kind(setting.kind),
        **(allowed.json_schema(setting.kind) if allowed is not None else {}),
        "default": plain(setting.default),
    }


def _of_kind(kind: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    if is_union(kind):
        if types.NoneType not in arguments:
            return {"anyOf": [_of_kind(argument) for argument in arguments]}
        (described,) = (_of_kind(argument) for argument in arguments if argument is not types.NoneType)
        choices = {"enum": [*described["enum"], None]} if "enum" in described else {}
        return {**described, **choices, "type": [described["type"], "null"]}
    if origin is tuple:
        return {"type": "array", "items": _of_kind(arguments[0])}
    if origin is dict:
        return {"type": "object"}
    return {"type": _NAMES[kind]}
