"""Reads what openpyxl leaves out of a workbook: formulas, merged cells, raised, lowered and crossed-out digits.

Read from the XML itself (ECMA-376, parts 18.2 to 18.4); sheets are found by the relationships of the package.
"""

import posixpath
import re
import zipfile
from dataclasses import dataclass, field
from io import BytesIO
from xml.etree import ElementTree

__all__ = ["SheetMarks", "read_marks"]

_CELL = re.compile(r"([A-Z]{1,3})([0-9]{1,9})")
_DIGIT = re.compile(r"[0-9]")


@dataclass(slots=True)
class SheetMarks:
    """Of one sheet, by row and then by column, both from 1."""

    formulas: dict[int, dict[int, str]] = field(default_factory=dict)
    styled: dict[int, dict[int, str]] = field(default_factory=dict)
    """"raised", "lowered" or "crossed-out": how digits of a cell's text are set apart from the rest of it."""
    merged: list[tuple[int, int, int, int]] = field(default_factory=list)
    """First row, last row, first column, last column."""


def read_marks(content: bytes, most_rows: int) -> dict[str, SheetMarks]:
    """Return the marks of every sheet by its title.

    Raises:
        ValueError, KeyError, zipfile.BadZipFile, SyntaxError: The workbook is damaged, has a row beyond `most_rows`,
            or rows that do not ascend, of which openpyxl would drop some.
    """
    with zipfile.ZipFile(BytesIO(content)) as package:
        book = next(iter(_targets(package, "", "officeDocument").values()))
        parts = _targets(package, book, "worksheet")
        strings = next(iter(_targets(package, book, "sharedStrings").values()), None)
        styled = _styled_strings(package, strings) if strings else {}
        marks = {}
        for element in ElementTree.fromstring(package.read(book)).iter():
            if _name(element) == "sheet":
                part = next((parts[value] for key, value in element.items() if _local(key) == "id" and value in parts),
                            None)  # fmt: skip
                if part is not None:
                    marks[element.get("name", "")] = _marks(package, part, styled, most_rows)
        return marks


def _targets(package: zipfile.ZipFile, part: str, kind: str) -> dict[str, str]:
    """Return the parts that `part` ("" for the package) relates to as `kind`, by their id."""
    folder, name = posixpath.split(part)
    relations = posixpath.join(folder, "_rels", f"{name}.rels")
    found = {}
    for element in ElementTree.fromstring(package.read(relations)):
        if element.get("Type", "").endswith(f"/{kind}"):
            target = element.get("Target", "")
            path = target.lstrip("/") if target.startswith("/") else posixpath.join(folder, target)
            found[element.get("Id", "")] = posixpath.normpath(path)
    return found


def _styled_strings(package: zipfile.ZipFile, part: str) -> dict[int, str]:
    found = {}
    strings = ElementTree.fromstring(package.read(part))
    for number, item in enumerate(child for child in strings if _name(child) == "si"):
        if style := _style(item):
            found[number] = style
    return found


def _style(text: ElementTree.Element) -> str | None:
    """Return how digits in some runs of a rich text are set apart, None where none are."""
    for run in (child for child in text if _name(child) == "r"):
        written = "".join(child.text or "" for child in run if _name(child) == "t")
        if not _DIGIT.search(written):
            continue
        for mark in run.iter():
            if _name(mark) == "vertAlign" and mark.get("val") in ("superscript", "subscript"):
                return "raised" if mark.get("val") == "superscript" else "lowered"
            if _name(mark) == "strike" and mark.get("val", "1") not in ("0", "false"):
                return "crossed-out"
    return None


def _marks(package: zipfile.ZipFile, part: str, styled: dict[int, str], most_rows: int) -> SheetMarks:
    marks = SheetMarks()
    row = before = column = 0
    with package.open(part) as source:
        for event, element in ElementTree.iterparse(source, events=("start", "end")):
            name = _name(element)
            if event == "start":
                if name == "row":
                    row, column = _row_number(element, row), 0
                    if not before < row <= most_rows:
                        raise ValueError(f"row {row} stands after row {before}; allowed: ascending, up to {most_rows}")
                    before = row
                elif name == "c":
                    place = _CELL.fullmatch(element.get("r", ""))
                    column = _column(place[1]) if place else column + 1
                continue
            if name == "c":
                _mark_cell(marks, element, (row, column), styled)
            elif name == "mergeCell":
                marks.merged.append(_range(element.get("ref", "")))
            if name in ("c", "row"):
                element.clear()
    return marks


def _mark_cell(marks: SheetMarks, cell: ElementTree.Element, place: tuple[int, int], styled: dict[int, str]) -> None:
    row, column = place
    for child in cell:
        name = _name(child)
        if name == "f":
            marks.formulas.setdefault(row, {})[column] = f"={child.text or '...'}"
        style = None
        if name == "v" and cell.get("t") == "s" and (child.text or "").isdigit():
            style = styled.get(int(child.text or ""))
        elif name == "is":
            style = _style(child)
        if style:
            marks.styled.setdefault(row, {})[column] = style


def _row_number(element: ElementTree.Element, before: int) -> int:
    text = element.get("r")
    return before + 1 if text is None else int(float(text))


def _range(text: str) -> tuple[int, int, int, int]:
    places = [_CELL.fullmatch(part) for part in text.split(":")]
    first, last = places[0], places[-1]
    if first is None or last is None:
        raise ValueError(f"merged cells {text!r:.40} are no range")
    return int(first[2]), int(last[2]), _column(first[1]), _column(last[1])


def _column(letters: str) -> int:
    number = 0
    for letter in letters:
        number = 26 * number + ord(letter) - ord("A") + 1
    return number


def _name(element: ElementTree.Element) -> str:
    return _local(element.tag)


def _local(name: str) -> str:
    return name.rpartition("}")[2]
