"""Annotation sheets (.xlsx, .csv) as rows of raw cells, found by their header and tolerant to everything around it.

Releases of one corpus differ in notes above the table, extra or unnamed columns and the sheet's name, so the table is
found by the row that names its columns. Cells stay raw: what a cell means is decided by the corpus that reads it.
"""

import csv
import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from aullm_dist.errors import UserError

__all__ = ["Row", "Table", "cell_text", "column_key", "find_workbooks", "read_table"]

# A table starts near the top; SAMM's is the deepest, on row 14.
_HEADER_ROWS = 60
_READ = {".xlsx", ".csv"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row below the header: `number` as the spreadsheet shows it, `index` from 0 at the first row below the
    header."""

    number: int
    index: int
    cells: dict[str, object]
    """Raw cells by normalised column name (see `column_key`)."""

    def __getitem__(self, column: str) -> object:
        return self.cells.get(column_key(column))


@dataclass(frozen=True, slots=True)
class Table:
    """The table of one sheet; `columns` are the header's own names without the empty ones."""

    file: Path
    sheet: str
    header_row: int
    columns: tuple[str, ...]
    rows: tuple[Row, ...]

    def sha256(self) -> str:
        """Return the hash of the workbook file."""
        return hashlib.sha256(self.file.read_bytes()).hexdigest()


def column_key(name: object) -> str:
    """Normalise a column name: lower case, single spaces. Inner spaces stay, they tell SAMM from CASME II."""
    return " ".join(str(name).split()).casefold() if name is not None else ""


def cell_text(cell: object) -> str:
    """Return a cell as stripped text, an integral float as its integer, an empty cell as ""."""
    if cell is None or cell != cell:
        return ""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    return str(cell).strip()


def find_workbooks(folders: Sequence[Path]) -> list[Path]:
    """List the sheets (.xlsx, .csv) lying directly in `folders`, in the order of the folders, without lock files.

    Raises:
        UserError: There is none; an .xls file found instead is named.
    """
    found: list[Path] = []
    old: list[Path] = []
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if path.name.startswith(("~$", ".")) or path in found or not path.is_file():
                continue
            if path.suffix.lower() in _READ:
                found.append(path)
            elif path.suffix.lower() == ".xls":
                old.append(path)
    if not found and old:
        raise UserError(f"{old[0]}: the old .xls format is not read; save it as .xlsx in the same folder")
    if not found:
        raise UserError(f"{folders[0]}: no annotation workbook (.xlsx, .csv) found in it or its sub-folders")
    return found


def read_table(file: Path, required: Sequence[tuple[str, ...]], *, corpus: str) -> Table:
    """Read the first sheet with a row that names all `required` columns, each by one of its names.

    Raises:
        UserError: The file is no workbook, or none of its sheets has such a row: it belongs to another corpus.
    """
    wanted = {frozenset(map(column_key, names)): "|".join(names) for names in required}
    best: tuple[int, str, list[object]] = (0, "", [])
    for sheet, rows in _sheets(file):
        for position, cells in enumerate(rows[:_HEADER_ROWS]):
            named = {column_key(cell) for cell in cells}
            hits = sum(not keys.isdisjoint(named) for keys in wanted)
            if hits == len(wanted):
                return _table(file, sheet, rows, position)
            if hits > best[0]:
                best = (hits, f"sheet {sheet!r} row {position + 1}", cells)
    _, where, cells = best
    named = {column_key(cell) for cell in cells}
    missing = ", ".join(name for keys, name in wanted.items() if keys.isdisjoint(named))
    place = f"its best header ({where}) lacks the columns" if where else "no sheet has the columns"
    raise UserError(f"{file}: not a workbook of {corpus}: {place} {missing}; expected: {', '.join(wanted.values())}")


def _table(file: Path, sheet: str, rows: list[list[object]], header: int) -> Table:
    keys = [column_key(cell) for cell in rows[header]]
    table_rows = []
    for position in range(header + 1, len(rows)):
        cells: dict[str, object] = {}
        for key, cell in zip(keys, rows[position], strict=False):
            if key:
                cells.setdefault(key, cell)
        if any(cell_text(cell) for cell in cells.values()):
            table_rows.append(Row(position + 1, position - header - 1, cells))
    names = tuple(
        str(cell).strip() for cell in rows[header] if cell is not None and not re.match(r"Unnamed", str(cell))
    )
    return Table(file, sheet, header + 1, names, tuple(table_rows))


def _sheets(file: Path) -> Iterator[tuple[str, list[list[object]]]]:
    try:
        sheets = _csv_sheet(file) if file.suffix.lower() == ".csv" else _xlsx_sheets(file)
    except _DAMAGED as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        kind = "a .csv file in UTF-8" if file.suffix.lower() == ".csv" else "an .xlsx workbook"
        raise UserError(f"{file}: cannot be read as {kind} ({reason:.200})") from error
    yield from sheets


# What zipfile, the XML parser and openpyxl raise on damaged files; openpyxl checks little of what it reads.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, SyntaxError, ValueError, KeyError, IndexError, TypeError,
    AttributeError, OverflowError, NotImplementedError, RuntimeError, csv.Error,
)  # fmt: skip


def _xlsx_sheets(file: Path) -> list[tuple[str, list[list[object]]]]:
    # openpyxl is imported here so that a login node can look at the corpora's tables without it.
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        book = load_workbook(file, read_only=True, data_only=True)
    except InvalidFileException as error:
        raise ValueError(str(error)) from error
    try:
        sheets = []
        for sheet in book.worksheets:
            # The stored dimensions of exported sheets are often wrong and would cut rows off.
            sheet.reset_dimensions()
            sheets.append((sheet.title, [list(row) for row in sheet.iter_rows(values_only=True)]))
        return sheets
    finally:
        book.close()


def _csv_sheet(file: Path) -> list[tuple[str, list[list[object]]]]:
    """Read a sheet exported as text; its cells are text, and an empty one counts as none."""
    with open(file, encoding="utf-8-sig", newline="") as stream:
        return [(file.stem, [[cell or None for cell in row] for row in csv.reader(stream)])]
