"""Parses AU cells as annotators of micro-expression corpora write them.

One parser for every corpus: `4+R12`, `L1+R2`, `A1B+A2C`, `AUR2+12(k)+45`, `14?`, `R14A or 17A`, a lone `/`, and the
floats and full-width punctuation that spreadsheets add. Whatever fits no rule is an error and never a guess, because
a wrong AU (`1417`) is invisible later. Corrections of single rows are the corpora's business, not this module's.
"""

import math
import numbers
import re
import unicodedata
from dataclasses import dataclass, replace
from typing import Literal, get_args

from aullm_dist.errors import UserError

__all__ = ["ActionUnit", "Alternatives", "Annotation", "AnnotationError", "has_alternatives", "parse_aus"]

Alternatives = Literal["first", "all", "drop"]

ALLOWED = (
    "AU numbers 1-99, each with an optional side (L R U A B T M W) before and intensity (A-E), '?' or '(k)' after, "
    "joined by '+', ',', ';', '&', '|' or spaces; 'or' between alternatives; '/' or '-' for none"
)

_EMPTY = {"", "/", "-"}
_WHOLE_NUMBER = re.compile(r"[0-9]{1,2}\.0+")
_STATIC_SPACED = re.compile(r"\(\s*k\s*\)", re.IGNORECASE)
_OR = re.compile(r"(?<![A-Za-z])or(?![A-Za-z])", re.IGNORECASE)
_SEPARATORS = re.compile(r"[+,;&|\s]+")
_TOKEN = re.compile(
    r"(?:AU)?(?P<side>[LRUABTMW])?(?P<number>[0-9]{1,2})(?P<intensity>[A-E])?(?P<marks>(?:\?|\(K\))*)", re.IGNORECASE
)
_MARKS = re.compile(r"(?:\?|\(K\))+", re.IGNORECASE)
_LETTERS = {"A", "B", "C", "D", "E", "L", "R", "U", "T", "M", "W", "AU"}


class AnnotationError(UserError):
    """An AU cell that fits no rule of the grammar."""


@dataclass(frozen=True, slots=True)
class ActionUnit:
    """One coded AU; `side` and `intensity` are upper-case letters or None.

    `static` marks an AU that is present but does not move during the clip, written `(k)` in 4DME.
    """

    number: int
    side: str | None = None
    intensity: str | None = None
    uncertain: bool = False
    static: bool = False


@dataclass(frozen=True, slots=True)
class Annotation:
    """The AUs of one cell, in the order written; `uncertain` is also set where alternatives were chosen or dropped."""

    units: tuple[ActionUnit, ...] = ()
    uncertain: bool = False
    dropped: tuple[str, ...] = ()
    """Letters that stood alone, as in `4+7+A`: sides or intensities without their AU."""

    @property
    def active(self) -> frozenset[int]:
        """Numbers of the AUs that move in the clip: the positive labels. Static AUs are left out."""
        return frozenset(unit.number for unit in self.units if not unit.static)


def parse_aus(cell: object, *, alternatives: Alternatives = "first") -> Annotation:
    """Parse one AU cell.

    Args:
        cell: What the workbook holds: text, an integer, an integral float, or None / NaN for no AU.
        alternatives: What `R14A or 17A` means: the "first" alternative, the union of "all", or "drop" for no label at
            all.

    Raises:
        AnnotationError: The cell fits no rule.
    """
    if alternatives not in get_args(Alternatives):
        raise ValueError(f"alternatives={alternatives!r}; allowed: {', '.join(get_args(Alternatives))}")
    text = _cell_text(cell)
    if text in _EMPTY:
        return Annotation()
    choices = [_parse_units(part, cell) for part in _OR.split(text)]
    if len(choices) == 1:
        return Annotation(choices[0], any(unit.uncertain for unit in choices[0]), _lone_letters(text))
    if not all(choices):
        raise _error(cell, "an alternative of 'or' names no AU")
    kept = {"first": choices[0], "all": tuple(unit for units in choices for unit in units), "drop": ()}[alternatives]
    return Annotation(tuple(replace(unit, uncertain=True) for unit in kept), True, _lone_letters(text))


def has_alternatives(cell: object) -> bool:
    """Whether the cell is text that offers alternatives (`R14A or 17A`)."""
    return isinstance(cell, str) and _OR.search(cell) is not None


def _cell_text(cell: object) -> str:
    """Bring a cell to normalised text; NFKC turns full-width plus signs, commas and question marks into ASCII."""
    if cell is None:
        return ""
    if isinstance(cell, str):
        for character in cell:
            # NFKC would make 42 of a 4 with a raised 2, and 1/2 of a half sign.
            full_width = "\uff10" <= character <= "\uff19"
            if not (character.isascii() or full_width) and any(
                map(str.isdigit, unicodedata.normalize("NFKC", character))
            ):
                raise _error(cell, f"{character!r} is no digit that an AU is written with")
        text = unicodedata.normalize("NFKC", cell).replace("\u3001", ",")
        text = _STATIC_SPACED.sub("(k)", text).strip()
        # A number cell that was saved as text: "4.0" is AU4, as the number 4.0 is.
        return text.split(".")[0] if _WHOLE_NUMBER.fullmatch(text) else text
    if isinstance(cell, bool) or not isinstance(cell, numbers.Real):
        raise _error(cell, f"a cell of type {type(cell).__name__}")
    if isinstance(cell, numbers.Integral):
        return str(int(cell))
    if math.isnan(cell):
        return ""
    if not math.isfinite(cell) or cell != math.trunc(cell):
        raise _error(cell, "not a whole number")
    return str(math.trunc(cell))


def _parse_units(text: str, cell: object) -> tuple[ActionUnit, ...]:
    units: list[ActionUnit] = []
    for token in _SEPARATORS.split(text):
        if token in _EMPTY or token.upper() in _LETTERS:
            continue
        match = _TOKEN.fullmatch(token)
        if match and int(match["number"]) > 0:
            side, intensity = match["side"], match["intensity"]
            unit = ActionUnit(int(match["number"]), side and side.upper(), intensity and intensity.upper())
            units.append(_mark(unit, match["marks"]))
        elif _MARKS.fullmatch(token) and units:
            units[-1] = _mark(units[-1], token)
        else:
            raise _error(cell, f"{_shown(token)} is no AU")
    if not units and (letters := _lone_letters(text)):
        raise _error(cell, f"{_shown(letters[0])} stands alone, and no AU is named")
    return tuple(units)


def _lone_letters(text: str) -> tuple[str, ...]:
    return tuple(token for token in _SEPARATORS.split(text) if token.upper() in _LETTERS)


def _mark(unit: ActionUnit, marks: str) -> ActionUnit:
    return replace(unit, uncertain=unit.uncertain or "?" in marks, static=unit.static or "(" in marks)


def _error(cell: object, reason: str) -> AnnotationError:
    return AnnotationError(f"AU cell {_shown(cell)}: {reason}; allowed: {ALLOWED}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
