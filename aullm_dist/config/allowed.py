"""Describes what a setting allows beyond its type: for checks, messages, the listing and the JSON Schema."""

import math
import types
import typing
from dataclasses import dataclass
from typing import Any, Protocol


class Allowed(Protocol):
    """A condition on the value of a setting. Null is never asked about: the type says whether it is allowed."""

    def refusal(self, name: str, value: Any, nullable: bool) -> str | None:
        """Return the message that refuses a value, None if it is allowed."""

    def words(self, nullable: bool) -> str:
        """Return what is allowed, as it stands in the listing."""

    def json_schema(self, kind: Any) -> dict[str, Any]:
        """Return the same as keywords of a JSON Schema, for a setting of type `kind`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """Finite numbers between ends, which `above` and `below` leave out.

    Attributes:
        above: the lower end, not allowed itself.
        at_least: the lower end.
        at_most: the upper end.
        below: the upper end, not allowed itself.
        multiple_of: what the number must be a multiple of.
        or_zero: whether 0 is allowed as well.
        share: whether the number is a share of something.
        text: what is allowed in words, where the ends alone do not say why.
    """

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    or_zero: bool = False
    share: bool = False
    text: str = ""

    def accepts(self, value: float) -> bool:
        """Return whether a number is allowed."""
        if self.or_zero and value == 0:
            return True
        # NaN fails every comparison, so it is refused here as well.
        return (
            -math.inf < value < math.inf
            and (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or value % self.multiple_of == 0)
        )

    def refusal(self, name: str, value: float, nullable: bool) -> str | None:
        """See `Allowed`."""
        return None if self.accepts(value) else f"{name} is {value!r}; allowed: {self.words(nullable)}"

    def words(self, nullable: bool) -> str:
        """See `Allowed`."""
        if self.text:
            return self.text
        if self.share:
            return f"a share between 0 and {self.at_most:g}" if self.below is None else "a share from 0 to below 1"
        if self.multiple_of is not None:
            return f"a multiple of {self.multiple_of} above {self.above:g}"
        if self.above is not None:
            return f"a number above {self.above:g}, or null" if nullable else f"a finite number above {self.above:g}"
        if self.at_most is not None:
            return f"{self.at_least} to {self.at_most}"
        return f"{self.at_least} or more" if self.at_least else "a finite number, 0 or more"

    def json_schema(self, kind: Any) -> dict[str, Any]:
        """See `Allowed`."""
        ends = {
            "exclusiveMinimum": self.above,
            "minimum": self.at_least,
            "maximum": self.at_most,
            "exclusiveMaximum": self.below,
            "multipleOf": self.multiple_of,
        }
        given = {key: value for key, value in ends.items() if value is not None}
        return {"anyOf": [{"const": 0}, given]} if self.or_zero else given


@dataclass(frozen=True, slots=True)
class Unique:
    """A list that names nothing twice; `what` it names, such as `AU`."""

    what: str

    def refusal(self, name: str, value: tuple[Any, ...], nullable: bool) -> str | None:
        """See `Allowed`."""
        return None if len(set(value)) == len(value) else f"{name} is {list(value)}; allowed: {self.words(nullable)}"

    def words(self, nullable: bool) -> str:
        """See `Allowed`."""
        return f"each {self.what} once"

    def json_schema(self, kind: Any) -> dict[str, Any]:
        """See `Allowed`."""
        return {"uniqueItems": True}


@dataclass(frozen=True, slots=True)
class Filled:
    """A text or a list that is not empty; `remedy` says what to give."""

    remedy: str

    def refusal(self, name: str, value: str | tuple[Any, ...], nullable: bool) -> str | None:
        """See `Allowed`."""
        filled = value.strip() if isinstance(value, str) else value
        return None if filled else f"{name} is empty; {self.remedy}"

    def words(self, nullable: bool) -> str:
        """See `Allowed`."""
        return "not empty"

    def json_schema(self, kind: Any) -> dict[str, Any]:
        """See `Allowed`."""
        return {"pattern": r"\S"} if kind is str else {"minItems": 1}


@dataclass(frozen=True, slots=True)
class OrWord:
    """A word in the place of a number, such as `auto`; `numbers` are the others that are allowed."""

    word: str
    numbers: Range

    def refusal(self, name: str, value: float | str, nullable: bool) -> str | None:
        """See `Allowed`."""
        if value == self.word or (not isinstance(value, str) and self.numbers.accepts(value)):
            return None
        return f"{name} is {value!r}; allowed: {self.words(nullable)}"

    def words(self, nullable: bool) -> str:
        """See `Allowed`."""
        return f"{self.numbers.words(nullable)}, or {self.word}"

    def json_schema(self, kind: Any) -> dict[str, Any]:
        """See `Allowed`."""
        return {"anyOf": [{"type": "integer", **self.numbers.json_schema(int)}, {"const": self.word}]}


def above(end: float) -> Range:
    """Return the numbers above `end`."""
    return Range(above=end)


def at_least(end: float, text: str = "") -> Range:
    """Return the numbers from `end` on."""
    return Range(at_least=end, text=text)


def between(least: float, most: float, text: str = "") -> Range:
    """Return the numbers from `least` to `most`, both included."""
    return Range(at_least=least, at_most=most, text=text)


def share(most: float = 1.0) -> Range:
    """Return the shares from 0 to `most`."""
    return Range(at_least=0, at_most=most, share=True)


SHARE_BELOW_1 = Range(at_least=0, below=1, share=True)


def is_union(kind: Any) -> bool:
    """Return whether a setting may be of several types; one of them a `Literal` makes another kind of union."""
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def is_nullable(kind: Any) -> bool:
    """Return whether a setting of type `kind` may be null."""
    return is_union(kind) and types.NoneType in typing.get_args(kind)
