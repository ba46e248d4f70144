"""Chooses the sheet of a release that is read, and gives the reason against every other that may hold annotations."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from aullm_dist.data.corpora.layout import search_folders
from aullm_dist.data.corpora.spec import CorpusSpec, Note
from aullm_dist.data.sheets import (
    NotThisTable,
    Table,
    UnreadableSheet,
    cell_text,
    column_key,
    find_workbooks,
    may_name_columns,
    read_tables,
)
from aullm_dist.errors import UserError
from aullm_dist.files import read_regular

__all__ = ["choose_table"]


class _Left(NamedTuple):
    """A file that is not used, and whether it may be a sheet of this corpus."""

    file: Path
    why: str
    may_fit: bool
    was_read: bool = False


def choose_table(spec: CorpusSpec, root: Path, notes: list[Note]) -> Table:
    """Read the sheet of this corpus; of several releases side by side the last by name wins, and that is noted.

    Corpora may share column names: a sheet most of whose clips are called as this corpus calls them goes first.

    Raises:
        UserError: There is no sheet of the corpus, the newest cannot be read, one file has two that differ, or the
            sheet has two columns for one thing.
    """
    tables, left = _read_all(spec, root)
    if not tables:
        raise _none_fits(left)
    chosen = max(tables, key=lambda table: _rank(spec, table))
    same = [table for table in tables if table is not chosen and _rank(spec, table) == _rank(spec, chosen)]
    for table in same:
        if table.file == chosen.file and not table.same_content(chosen):
            raise UserError(
                f"{chosen.file}: the sheets {chosen.sheet!r} and {table.sheet!r} both have the columns, with other "
                "content; keep one of them"
            )
    for file, why, may_fit, _ in left:
        if may_fit and file.name.casefold() > chosen.file.name.casefold():
            raise UserError(f"{why}; by its name it comes after {chosen.file.name}: move it away to use that one")
        notes.append(Note("noted", str(file), f"not used: {why.removeprefix(f'{file}: ')}"))
    for table in tables:
        if table is not chosen:
            other = chosen.file.name if table.file.name != chosen.file.name else str(chosen.file)
            other = f"sheet {chosen.sheet!r}" if table.file == chosen.file else other
            sheet = f"sheet {table.sheet!r} " if table.file == chosen.file else ""
            notes.append(Note("noted", str(table.file), f"{sheet}not used: {other} is read; move it away to use it"))
    if chosen.hidden:
        notes.append(Note("noted", str(chosen.file), f"sheet {chosen.sheet!r} is hidden, and the only one: it is read"))
    _refuse_contradictions(spec, chosen)
    return chosen


def _read_all(spec: CorpusSpec, root: Path) -> tuple[list[Table], list[_Left]]:
    required = spec.columns.required()
    files = find_workbooks(search_folders(root, spec.frame_folders))
    tables: list[Table] = []
    left: list[_Left] = []
    for file in files.read:
        try:
            tables += read_tables(file, required, corpus=spec.title)
        except UnreadableSheet as error:
            left.append(_Left(file, str(error), _may_fit(file, required)))
        except NotThisTable as error:
            left.append(_Left(file, str(error), may_fit=False, was_read=True))
    for file in files.others:
        kind = file.suffix.lower()
        why = f"{file}: the {'old ' if kind == '.xls' else ''}{kind} format is not read; save it as .xlsx"
        left.append(_Left(file, f"{why} in the same folder", _may_fit(file, required)))
    return tables, left


def _may_fit(file: Path, required: Sequence[tuple[str, ...]]) -> bool:
    try:
        return may_name_columns(read_regular(file), required)
    except OSError:
        return True


def _none_fits(left: Sequence[_Left]) -> UserError:
    """Return the error that names each file: first those that may be the sheet, then those that are not."""
    ordered = sorted(left, key=lambda each: (not each.may_fit, each.was_read))
    others = "".join(f"; {each.why}" for each in ordered[1:3])
    more = f"; and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return UserError(f"{ordered[0].why}{others}{more}")


def _rank(spec: CorpusSpec, table: Table) -> tuple[bool, bool, str, bool]:
    columns = spec.columns.in_table(table)
    texts = [(cell_text(row[columns.subject]), cell_text(row[columns.clip])) for row in table.rows]
    named = [spec.subject_of(*both) is not None and re.match(spec.clip_like, both[1]) for both in texts]
    ours = sum(map(bool, named)) * 2 > len(named)
    # A sheet of more than these rows lists other things too; the sheet of these rows alone goes first.
    alone = spec.rows_with is None or column_key(spec.rows_with[0]) not in map(column_key, table.columns)
    return ours, alone, table.file.name.casefold(), not table.hidden


def _refuse_contradictions(spec: CorpusSpec, table: Table) -> None:
    """Refuse a sheet in which two columns say two things about one: two of one name, or two names of one column."""
    for names in spec.columns.required():
        for key in map(column_key, names):
            if key in table.contradictions:
                rows = table.contradictions[key]
                raise UserError(
                    f"{table.file} row {table.header_row}: two columns are called {table.columns_called(key)!r}, and "
                    f"differ in {len(rows)} rows (the first is row {rows[0]}); keep one of them"
                )
        there = [name for name in names if column_key(name) in table.positions]
        for other in there[1:]:
            row = next((row for row in table.rows if cell_text(row[other]) != cell_text(row[there[0]])), None)
            if row is not None:
                raise UserError(
                    f"{table.file} row {row.number}: the columns {there[0]!r} and {other!r} stand for one thing, and "
                    "differ; keep one of them"
                )
