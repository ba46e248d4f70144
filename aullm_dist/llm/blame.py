"""Finds the file and key of a base on which a library failed: reads files strictly, leaves keys out until it works.

A library that fails on a config seldom names the key. Whoever gave it forty of them wants the one: so each is left out
in turn, and the first without which the library succeeds is named, with its value.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aullm_dist.errors import UserError
from aullm_dist.library_errors import in_one_line, refusing

_ALLOWED = "allowed: the files as they were published with the weights"
_LONGEST_VALUE = 60


def read_object(path: Path, source: str) -> dict[str, Any]:
    """Return the JSON object that a file of a base holds.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"backbone {source}: {path.name} cannot be read ({in_one_line(error)}); {_ALLOWED}") from error
    if not isinstance(values, dict):
        kind = type(values).__name__
        raise UserError(f"backbone {source}: {path.name} holds a {kind} instead of an object; {_ALLOWED}")
    return values


def key_refusal(
    source: str,
    file: str,
    error: BaseException,
    values: Mapping[str, Any] | None = None,
    make: Callable[[dict[str, Any]], object] | None = None,
) -> UserError:
    """Return the refusal of a file of JSON, naming the key that a library failed on where it can be found.

    Args:
        source: the base's name, for the message.
        file: name of the file.
        error: what the library raised.
        values: what the file holds; None where that is not known.
        make: does with such values what failed; it may raise what libraries raise.
    """
    setting = None if values is None or make is None else blamed_setting(values, make)
    named = "" if setting is None else f": {setting}"
    return UserError(f"backbone {source}: {file} cannot be used{named} ({in_one_line(error)}); {_ALLOWED}")


def blamed_setting(values: Mapping[str, Any], make: Callable[[dict[str, Any]], object]) -> str | None:
    """Return the first key without which `make` works, and its value, in words; None where there is none.

    Args:
        values: those with which it fails.
        make: may raise what libraries raise, and UserErrors.
    """
    key = _blamed_key(values, make)
    return None if key is None else _shown(values, key)


def _blamed_key(values: Mapping[str, Any], make: Callable[[dict[str, Any]], object]) -> tuple[str, ...] | None:
    """Return the path of the first key without which `make` works; one within another where that is enough.

    None if there is no such key, or if `make` does not fail as the library did.
    """
    if _works(dict(values), make):
        return None
    for key, value in values.items():
        if not _works(_without(values, key), make):
            continue
        if isinstance(value, dict):
            for inner in value:
                if _works({**values, key: _without(value, inner)}, make):
                    return key, inner
        return (key,)
    return None


def _without(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _works(values: dict[str, Any], make: Callable[[dict[str, Any]], object]) -> bool:
    def failed(_: BaseException) -> UserError:
        return UserError("")

    try:
        with refusing(failed):
            make(values)
    except UserError:
        return False
    return True


def _shown(values: Mapping[str, Any], path: tuple[str, ...]) -> str:
    value: Any = values
    for key in path:
        value = value[key]
    text = json.dumps(value, default=str)
    return f"{'.'.join(path)} is {text if len(text) <= _LONGEST_VALUE else f'{text[: _LONGEST_VALUE - 3]}...'}"
