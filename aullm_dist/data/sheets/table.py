"""Finds the table of an annotation sheet by its header, tolerates what stands around it, and notes that.

Releases of one corpus differ in notes above the table, extra or unnamed columns and the sheet's name, so the table is
found by the row that names its columns. Cells stay raw: what a cell means is decided by the corpus that reads it.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from aullm_dist.data.sheets.cells import Merged, RawSheet, UnreadableSheet, cell_text, column_key, column_letter
from aullm_dist.data.sheets.csvfile import DELIMITERS, decoded, variants
from aullm_dist.data.sheets.xlsx import read_workbook
from aullm_dist.errors import UserError
from aullm_dist.files import read_regular

__all__ = ["NotThisTable", "Row", "Table", "read_tables"]

# A table starts near the top; SAMM's is the deepest, on row 14.
_HEADER_ROWS = 60


class NotThisTable(UserError):
    """A file that can be read, and none of whose sheets names the columns."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row below the header: `number` as the spreadsheet shows it, `index` from 0 at the first row below the
    header."""

    number: int
    index: int
    cells: dict[str, object]
    """Raw cells by normalised column name (see `column_key`); a row of a CSV file may end before some of them."""
    unnamed: Mapping[int, str]
    """Texts in columns without a name, by position."""
    problem: str = ""
    """Why the row as a whole cannot be trusted."""

    def __getitem__(self, column: str) -> object:
        return self.cells.get(column_key(column))


@dataclass(frozen=True, slots=True)
class Table:
    """The table of one sheet.

    Attributes:
        columns: The header's own names, without the empty ones.
        positions: Place of each column from 0, by normalised name; of two of one name the first.
        contradictions: Columns that are there twice, with the numbers of the rows in which they differ.
        digest: SHA-256 of the file.
    """

    file: Path
    sheet: str
    header_row: int
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    positions: Mapping[str, int]
    contradictions: Mapping[str, tuple[int, ...]]
    hidden: bool
    notes: tuple[str, ...]
    digest: str

    def sha256(self) -> str:
        """Return the hash of the workbook file."""
        return self.digest

    def columns_called(self, key: str) -> str:
        """Return how the header writes the column of this normalised name."""
        return next(name for name in self.columns if column_key(name) == key)

    def same_content(self, other: "Table") -> bool:
        """Whether two tables say the same under the same names."""
        return [row.cells for row in self.rows] == [row.cells for row in other.rows]


def read_tables(file: Path, required: Sequence[tuple[str, ...]], *, corpus: str) -> list[Table]:
    """Read each sheet of a file with a row that names all `required` columns, each by one of its names.

    Raises:
        UnreadableSheet: The file is damaged, or no workbook.
        NotThisTable: None of its sheets has such a row: it belongs to another corpus.
    """
    try:
        content = read_regular(file)
    except OSError as error:
        raise UnreadableSheet(f"{file}: cannot be read ({error.strerror})") from error
    search = _Search(file, required, hashlib.sha256(content).hexdigest())
    if file.suffix.lower() in (".csv", ".tsv"):
        return search.in_text(decoded(file, content), corpus)
    return search.in_sheets(read_workbook(file, content), corpus)


class _Search:
    """Looks for the header in the sheets of one file."""

    def __init__(self, file: Path, required: Sequence[tuple[str, ...]], digest: str) -> None:
        self._file, self._digest = file, digest
        self._wanted = {frozenset(map(column_key, names)): "|".join(names) for names in required}
        self._best: tuple[int, str, Sequence[object]] = (0, "", [])

    def in_text(self, text: str, corpus: str) -> list[Table]:
        broken = ""
        for variant in variants(self._file, text):
            header = self._header(variant.sheet, f"read with {DELIMITERS.get(variant.delimiter, 'sep=')}")
            if header is not None and variant.problem:
                raise UnreadableSheet(f"{self._file} {variant.problem}")
            if header is not None:
                return [self._table(variant.sheet, header)]
            broken = broken or variant.problem
        if broken and not self._best[0]:
            raise UnreadableSheet(f"{self._file} {broken}")
        raise self._nothing(corpus)

    def in_sheets(self, sheets: Sequence[RawSheet], corpus: str) -> list[Table]:
        headers = [self._header(sheet, f"sheet {sheet.title!r}") for sheet in sheets]
        tables = [self._table(sheet, at) for sheet, at in zip(sheets, headers, strict=True) if at is not None]
        if not tables:
            raise self._nothing(corpus)
        others = [sheet.title for sheet, at in zip(sheets, headers, strict=True) if at is None and sheet.rows]
        if not others:
            return tables
        note = f"sheets not read, as they do not have the columns: {', '.join(map(repr, others))}"
        return [replace(table, notes=(*table.notes, note)) for table in tables]

    def _header(self, sheet: RawSheet, where: str) -> int | None:
        """Return the place of the header among the rows of a sheet, None where there is none."""
        for place, (number, cells) in enumerate(sheet.rows):
            if number > _HEADER_ROWS:
                break
            named = {column_key(cell) for cell in cells}
            hits = sum(not keys.isdisjoint(named) for keys in self._wanted)
            if hits == len(self._wanted):
                return place
            if hits > self._best[0]:
                self._best = (hits, f"{where} row {number}", cells)
        return None

    def _nothing(self, corpus: str) -> NotThisTable:
        _, where, cells = self._best
        named = {column_key(cell) for cell in cells}
        missing = ", ".join(name for keys, name in self._wanted.items() if keys.isdisjoint(named))
        place = f"its best header ({where}) lacks the columns" if where else "no sheet has the columns"
        return NotThisTable(
            f"{self._file}: not a workbook of {corpus}: {place} {missing}; expected: {', '.join(self._wanted.values())}"
        )

    def _table(self, sheet: RawSheet, header: int) -> Table:
        number, head = sheet.rows[header]
        keys = [column_key(cell) for cell in head]
        positions: dict[str, int] = {}
        for place, key in enumerate(keys):
            if key:
                positions.setdefault(key, place)
        below = sheet.rows[header + 1 :]
        ragged = len({len(cells) for _, cells in below}) > 1
        rows: list[Row] = []
        twice: dict[str, list[int]] = {key: [] for key in keys if key and keys.count(key) > 1}
        unnamed = _Unnamed()
        for row_number, cells in below:
            row = _row(row_number, row_number - number - 1, keys, cells)
            unnamed.add(row)
            for key, differing in twice.items():
                if len({cell_text(cell) for name, cell in zip(keys, cells, strict=False) if name == key}) > 1:
                    differing.append(row_number)
            if sheet.fixed_width and len(cells) > len(keys) and (ragged or any(cells[len(keys) :])):
                problem = f"{len(cells)} cells, where the header has {len(keys)}"
                row = replace(row, problem=f"{problem}: is a cell with the delimiter in it not in quotes?")
            if any(cell_text(cell) for cell in row.cells.values()):
                rows.append(row)
        notes = [*sheet.notes, *unnamed.notes()]
        if header:
            above = ", ".join(str(each) for each, _ in sheet.rows[:header][:4])
            notes.append(f"{header} rows above the header (row {number}) not read: {above}")
        notes += [f"two columns are called {key!r}, with the same content" for key, rows_ in twice.items() if not rows_]
        return Table(
            file=self._file, sheet=sheet.title, header_row=number,
            columns=tuple(str(cell).strip() for cell, key in zip(head, keys, strict=True) if key),
            rows=tuple(_spread(rows, sheet, keys, number, notes)), positions=positions,
            contradictions={key: tuple(rows_) for key, rows_ in twice.items() if rows_},
            hidden=sheet.hidden, notes=tuple(notes), digest=self._digest,
        )  # fmt: skip


def _row(number: int, index: int, keys: Sequence[str], cells: Sequence[object]) -> Row:
    named: dict[str, object] = {}
    unnamed: dict[int, str] = {}
    for place, cell in enumerate(cells):
        key = keys[place] if place < len(keys) else ""
        if key:
            named.setdefault(key, cell)
        elif text := cell_text(cell):
            unnamed[place] = text
    return Row(number, index, named, unnamed)


class _Unnamed:
    """Counts what stands in columns without a name."""

    def __init__(self) -> None:
        self._found: dict[int, list[tuple[int, str]]] = {}

    def add(self, row: Row) -> None:
        for place, text in row.unnamed.items():
            self._found.setdefault(place, []).append((row.number, text))

    def notes(self) -> list[str]:
        return [
            f"column {column_letter(place)} has no name, and content in {len(found)} rows: not read (the first is row "
            f"{found[0][0]}: {found[0][1]!r:.60})"
            for place, found in sorted(self._found.items())
        ]


def _spread(rows: Sequence[Row], sheet: RawSheet, keys: Sequence[str], header: int, notes: list[str]) -> list[Row]:
    """Mark the cells of merged ranges, each of which shows one value for several rows or columns.

    A range down one column gives its value to each of its rows as a `Merged`, which the reader of the column takes or
    refuses; what a range across columns means cannot be known.
    """
    by_number = {row.number: row for row in rows}
    ranges = 0
    for first, last, left, right in sheet.merged:
        covered = [row for row in rows if max(first, header + 1) <= row.number <= last]
        names = {keys[place] for place in range(left - 1, min(right, len(keys)))} - {""}
        if not covered or not names or (first == last and len(names) == 1):
            continue
        ranges += 1
        where = f"{column_letter(left - 1)}{first}:{column_letter(right - 1)}{last}"
        anchor = by_number.get(first)
        for row in covered:
            for name in names:
                own = row.cells.get(name)
                value = anchor.cells.get(name) if anchor is not None and len(names) == 1 else None
                hidden = row is not anchor and cell_text(own) not in ("", cell_text(value))
                row.cells[name] = Merged(where, None if hidden else value)
    if ranges:
        notes.append(f"{ranges} ranges of merged cells: each row of one has the value that the range shows")
    return list(rows)
