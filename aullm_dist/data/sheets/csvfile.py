"""Reads CSV files as rows of text: any common delimiter, with or without a byte-order mark, no guesses about damage."""

import codecs
import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aullm_dist.data.sheets.cells import RawSheet, UnreadableSheet, clean_text

__all__ = ["Variant", "decoded", "variants"]

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Variant:
    """A file read with one delimiter: what was read, and what is wrong with its quotes from some line on."""

    delimiter: str
    sheet: RawSheet
    problem: str = ""


def decoded(file: Path, content: bytes) -> str:
    """Return the text of a CSV file in UTF-8, or in UTF-16 or UTF-32 with a byte-order mark, as Excel writes it.

    Raises:
        UnreadableSheet: It is empty, of another encoding, or holds NUL characters, as a damaged copy does.
    """
    if not content.strip():
        raise UnreadableSheet(f"{file}: is empty ({len(content)} bytes); copy it again")
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableSheet(
            f"{file}: cannot be read as a .csv file in UTF-8 ({error}); save it as CSV in UTF-8"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UnreadableSheet(f"{file} line {line}: holds NUL characters: a damaged copy, or no text; copy it again")
    return text


def variants(file: Path, text: str) -> Iterator[Variant]:
    """Yield the file as each delimiter reads it, commas first."""
    separator = text[:4].casefold()
    skipped = separator.startswith("sep=") and len(text) > 4
    # Excel's own first line, `sep=;`, names the delimiter and is no row.
    for delimiter in [text[4]] if skipped else DELIMITERS:
        yield _read(file, text, delimiter, skip_first=skipped)


def _read(file: Path, text: str, delimiter: str, *, skip_first: bool) -> Variant:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    rows: list[tuple[int, list[object]]] = []
    number, problem = 0, ""
    try:
        for number, row in enumerate(reader, 1):
            cells: list[object] = [clean_text(cell) or None for cell in row]
            if any(cells) and not (skip_first and number == 1):
                rows.append((number, cells))
    except csv.Error as error:
        problem = f"line {reader.line_num}: {error}; check the quotes from row {number + 1} on"
    notes = []
    if text and not text.endswith(("\n", "\r")):
        notes.append(f"the last line ({rows[-1][0] if rows else 1}) has no end: see that the file was copied in full")
    return Variant(delimiter, RawSheet(file.stem, rows, fixed_width=True, notes=notes), problem)
