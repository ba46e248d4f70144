"""Reads annotation sheets (.xlsx, .csv): every cell with content is used, named in a note, or refused."""

from aullm_dist.data.sheets.cells import (
    Defect,
    Merged,
    UnreadableSheet,
    cell_text,
    clean_text,
    column_key,
    column_letter,
)
from aullm_dist.data.sheets.find import SHEET_SUFFIXES, FoundSheets, find_workbooks, may_name_columns
from aullm_dist.data.sheets.table import NotThisTable, Row, Table, read_tables

__all__ = [
    "SHEET_SUFFIXES",
    "Defect",
    "FoundSheets",
    "Merged",
    "NotThisTable",
    "Row",
    "Table",
    "UnreadableSheet",
    "cell_text",
    "clean_text",
    "column_key",
    "column_letter",
    "find_workbooks",
    "may_name_columns",
    "read_tables",
]
