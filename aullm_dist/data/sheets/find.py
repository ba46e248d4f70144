"""Finds files of a release that may be annotation sheets, including formats that are not read."""

import io
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aullm_dist.data.sheets.cells import column_key
from aullm_dist.errors import UserError

__all__ = ["SHEET_SUFFIXES", "FoundSheets", "find_workbooks", "may_name_columns"]

READ = {".xlsx", ".xlsm", ".csv", ".tsv"}
_OTHERS = {".xls", ".ods", ".xlsb", ".numbers", ".xltx"}
SHEET_SUFFIXES = READ | _OTHERS
_SEARCHED_BYTES = 50_000_000


@dataclass(frozen=True, slots=True)
class FoundSheets:
    """Files that may be sheets, in the order of the folders; `others` are of formats that are not read."""

    read: tuple[Path, ...]
    others: tuple[Path, ...]


def find_workbooks(folders: Sequence[Path]) -> FoundSheets:
    """List the sheets lying directly in `folders`, without the lock files of spreadsheet programs.

    Raises:
        UserError: There is none.
    """
    found: dict[Path, None] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            hidden = path.name.startswith(("~$", "."))
            if not hidden and path.suffix.lower() in SHEET_SUFFIXES and not path.is_dir():
                found[path] = None
    if not found:
        raise UserError(f"{folders[0]}: no annotation workbook (.xlsx, .csv) found in it or its sub-folders")
    read = tuple(path for path in found if path.suffix.lower() in READ)
    return FoundSheets(read, tuple(path for path in found if path not in read))


def may_name_columns(content: bytes, required: Sequence[tuple[str, ...]]) -> bool:
    """Whether a file of an unknown format or encoding may name all these columns; true where that cannot be known."""
    if not content.strip(b"\0 \r\n\t"):
        return True
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as package:
            parts = [item for item in package.infolist() if item.filename.endswith((".xml", ".bin"))]
            if sum(item.file_size for item in parts) > _SEARCHED_BYTES:
                return True
            content = b"".join(map(package.read, parts))
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError, ValueError):
        if content.startswith(b"PK"):
            return True  # cut short, so that its end, which lists its parts, is missing
    text = content.replace(b"\0", b"").decode("latin-1").casefold()
    return all(any(column_key(name) in text for name in names) for names in required)
