"""Reads Excel workbooks as rows of raw cells; cells whose content is not what a reader sees become a `Defect`."""

import re
import warnings
import zipfile
import zlib
from io import BytesIO
from pathlib import Path
from typing import Any

from aullm_dist.data.sheets.cells import Defect, RawSheet, UnreadableSheet, cell_text, clean_text
from aullm_dist.data.sheets.marks import SheetMarks, read_marks

__all__ = ["read_workbook"]

# What zipfile, the XML parser and openpyxl raise on damaged files; openpyxl checks little of what it reads.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, SyntaxError, ValueError, KeyError, IndexError, TypeError,
    AttributeError, OverflowError, NotImplementedError, RuntimeError,
)  # fmt: skip
_MOST_ROWS = 1_048_576
"""Of a sheet, by the format; openpyxl makes a row of each number that is left out before the next."""
# `=4+15` typed for two AUs: the spreadsheet shows their sum.
_SUM = re.compile(r"=\s*[+-]?\s*[0-9.]+(\s*[-+*/]\s*[0-9.]+)+\s*")


def read_workbook(file: Path, content: bytes) -> list[RawSheet]:
    """Return every sheet of an .xlsx or .xlsm file.

    Raises:
        UnreadableSheet: It is no such file, or damaged.
    """
    if not content:
        raise UnreadableSheet(f"{file}: is empty (0 bytes): a download that failed? copy it again")
    try:
        # Warnings of openpyxl are about drawings and formats, which are not read.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _sheets(content)
    except DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableSheet(f"{file}: cannot be read as an .xlsx workbook ({reason:.200})") from error


def _sheets(content: bytes) -> list[RawSheet]:
    # openpyxl is imported here so that a login node can look at the corpora's tables without it.
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    marks = read_marks(content, _MOST_ROWS)
    try:
        book = load_workbook(BytesIO(content), read_only=True, data_only=True)
    except InvalidFileException as error:
        raise ValueError(str(error)) from error
    sheets = []
    try:
        for sheet in book.worksheets:
            # The stored dimensions of exported sheets are often wrong and would cut rows off.
            sheet.reset_dimensions()
            found = marks.get(sheet.title, SheetMarks())
            rows = _rows(sheet, found)
            sheets.append(RawSheet(sheet.title, rows, sheet.sheet_state != "visible", tuple(found.merged)))
    finally:
        book.close()
    return sheets


def _rows(sheet: Any, marks: SheetMarks) -> list[tuple[int, list[object]]]:
    rows = []
    for number, values in enumerate(sheet.iter_rows(values_only=True), 1):
        written = marks.formulas.get(number, {})
        styled = marks.styled.get(number, {})
        width = max(len(values), *written, 0) if written else len(values)
        cells = [
            _cell(values[at] if at < len(values) else None, written.get(at + 1), styled.get(at + 1))
            for at in range(width)
        ]
        if any(cell_text(cell) for cell in cells):
            rows.append((number, cells))
    return rows


def _cell(value: object, formula: str | None, styled: str | None) -> object:
    if formula is not None and value is None:
        return Defect(
            f"the formula {formula!r:.60} has no value: open the workbook in a spreadsheet program and save it"
        )
    if formula is not None and _SUM.fullmatch(formula):
        return Defect(f"the formula {formula!r:.60}, which shows {value!r:.20}: write it as text")
    if styled is not None:
        return Defect(f"{value!r:.60} has {styled} digits, which tell something else than they show: write it plainly")
    return clean_text(value) or None if isinstance(value, str) else value
