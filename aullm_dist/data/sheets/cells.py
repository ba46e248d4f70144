"""Converts cells of annotation sheets to raw values and to text, the same for every column and file type."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

from aullm_dist.errors import UserError

__all__ = ["Defect", "Merged", "RawSheet", "UnreadableSheet", "cell_text", "clean_text", "column_key", "column_letter"]

_WHOLE_FLOAT = re.compile(r"([0-9]+)\.0+")
_QUOTES = "\"'\u2018\u2019\u201c\u201d"
# Shown in no column: zero-width spaces and joiners, byte-order marks, soft hyphens, marks of writing direction.
_INVISIBLE = {"Cf"}


class UnreadableSheet(UserError):
    """A sheet file that is damaged, empty, or of a format that is not read."""


@dataclass(frozen=True, slots=True)
class Defect:
    """A cell whose content cannot be used, such as a formula that was never computed."""

    reason: str

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True, slots=True)
class Merged:
    """A cell of a merged range, with the value that the range shows; None where that may not be the cell's own."""

    where: str
    value: object

    def __str__(self) -> str:
        return cell_text(self.value)

    @property
    def reason(self) -> str:
        """Say what a column that takes no merged cells wants."""
        return f"the cells {self.where} are merged; give each row its own"


@dataclass(slots=True)
class RawSheet:
    """One sheet as read: rows that bear content, by the number that a spreadsheet shows.

    Attributes:
        title: Name of the sheet.
        rows: (number from 1, cells) in ascending order; blank rows are left out.
        hidden: Whether spreadsheet programs hide the sheet.
        merged: Ranges of merged cells: first and last row, first and last column, all from 1.
        fixed_width: Whether a row says by its length how many cells it has, as in a CSV file.
        notes: What a reader should know.
    """

    title: str
    rows: list[tuple[int, list[object]]]
    hidden: bool = False
    merged: Sequence[tuple[int, int, int, int]] = ()
    fixed_width: bool = False
    notes: list[str] = field(default_factory=list)


def clean_text(text: str) -> str:
    """Return text without what no reader sees: invisible characters are dropped, every kind of blank becomes a blank.

    Between two digits an invisible character stays: `4<zero-width space>5` may be one number or two, and is refused.
    """
    if text.isascii() and text.isprintable():
        return text.strip()
    kept = []
    for position, character in enumerate(text):
        category = unicodedata.category(character)
        if category in _INVISIBLE:
            around = text[position - 1 : position] + text[position + 1 : position + 2]
            kept.append(character if len(around) == 2 and around.isdigit() else "")
        else:
            kept.append(" " if category == "Zs" else character)
    return "".join(kept).strip()


def cell_text(cell: object) -> str:
    """Return a cell as stripped text, a whole float (`1012.0`, number or text) as its integer, an empty cell as ""."""
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = str(cell).strip()
    whole = _WHOLE_FLOAT.fullmatch(text)
    return whole[1] if whole else text


def column_key(name: object) -> str:
    """Normalise a column name: lower case, single spaces, no quotes around it.

    Inner spaces stay, they tell SAMM from CASME II. `Unnamed: 3`, which pandas writes over a column without a name, is
    no name.
    """
    if name is None:
        return ""
    text = " ".join(clean_text(str(name)).split()).casefold()
    if len(text) > 1 and text[0] in _QUOTES and text[-1] in _QUOTES:
        text = text[1:-1].strip()
    return "" if re.fullmatch(r"unnamed: ?[0-9]+(_level_[0-9]+)?", text) else text


def column_letter(position: int) -> str:
    """Return what spreadsheets call the column at `position`, from 0: A, B, ..., Z, AA."""
    letters = ""
    number = position + 1
    while number:
        number, rest = divmod(number - 1, 26)
        letters = chr(ord("A") + rest) + letters
    return letters
