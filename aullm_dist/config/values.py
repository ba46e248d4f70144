"""Converts a value of a run file to the type of its setting."""

import contextlib
import copy
import difflib
import os
import typing
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal

from aullm_dist.config.allowed import is_union
from aullm_dist.errors import UserError

_HINTS = {
    str: "; a text that looks like a number or like yes, no, null is written in quotes",
    int: ", in decimal and without leading zeros",
}


def nearest(name: str, names: Sequence[str]) -> str:
    """Return `did you mean ...? ` with the nearest of `names`, or nothing if none is near."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}? " if close else ""


def takes_text(kind: Any) -> bool:
    """Return whether a setting of type `kind` holds a text, which is what stands there and no number or date."""
    return all(k is str or typing.get_origin(k) is Literal for k in _kinds(kind))


def takes_texts(kind: Any) -> bool:
    """Return whether a setting of type `kind` holds a list of texts."""
    return any(typing.get_origin(k) is tuple and typing.get_args(k)[0] is str for k in _kinds(kind))


def _kinds(kind: Any) -> list[Any]:
    """Return the types that a setting may be of, null left out."""
    kinds = typing.get_args(kind) if is_union(kind) else (kind,)
    return [k for k in kinds if k is not type(None)]


def convert(value: Any, kind: Any, where: str) -> Any:
    """Return `value` as `kind`; integers and YAML's `1e-4` strings become float, and lists tuples.

    Raises:
        UserError: it is of another type; `where` names it.
    """
    origin = typing.get_origin(kind)
    if origin is Literal:
        choices = typing.get_args(kind)
        if value in choices and isinstance(value, str):
            return value
        raise UserError(f"{where} is {value!r}; {nearest(str(value), choices)}allowed: {', '.join(choices)}")
    if is_union(kind):
        if value is None:
            return None
        kinds = [k for k in typing.get_args(kind) if k is not type(None)]
        if isinstance(value, bool) and bool in kinds:
            return value
        words = [k for k in kinds if typing.get_origin(k) is Literal]
        if words and isinstance(value, str):
            return convert(value, words[0], where)
        return convert(value, next(k for k in kinds if k is not bool or len(kinds) == 1), where)
    if origin is tuple:
        item_kind = typing.get_args(kind)[0]
        if not isinstance(value, list | tuple):
            raise UserError(f"{where} is {value!r}; a list of {item_kind.__name__} is expected, such as [a, b]")
        return tuple(convert(item, item_kind, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UserError(f"{where} is {value!r}; a mapping of `name: value` is expected, such as {{a: 1, b: 2}}")
        return copy.deepcopy(value)
    if kind is float and isinstance(value, str):
        # PyYAML reads 1e-4 as text because YAML 1.1 wants a dot in the mantissa.
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) is not kind:
        shown = f"{value!r:.60}" if not isinstance(value, int) or abs(value) < 10**60 else "a number of many digits"
        hint = _HINTS.get(kind, "")
        raise UserError(
            f"{where} is {shown} ({type(value).__name__}); a value of type {kind.__name__} is expected{hint}"
        )
    if kind is str:
        _refuse_unprintable(value, where)
    return value


def at_home(value: Any, where: str) -> Any:
    """Return a path, or each of a list of paths, with `~` as the home folder.

    Raises:
        UserError: a path of a list is empty, or begins with `~` and names no user; `where` names it.
    """
    if isinstance(value, tuple):
        return tuple(at_home(item, f"{where}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, str):
        return value
    found = os.path.expanduser(value)
    if found.startswith("~"):
        raise UserError(f"{where} is {value!r}, and there is no such user; a folder of that name is ./{value}")
    if not value and where.endswith("]"):
        raise UserError(f"{where} is empty; give the path of a folder")
    return found


def _refuse_unprintable(text: str, where: str) -> None:
    """Refuse what no line can show, and what no file can record: control characters, names that are no UTF-8."""
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise UserError(f"{where} is {text!r}; allowed: UTF-8 text without control characters; rename what it names")
