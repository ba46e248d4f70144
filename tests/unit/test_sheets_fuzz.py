# ruff: noqa: PT017 - whether a sheet is refused is what is explored here.
"""Generated sheets against a slow reader that shares no code with ours: the same labels, or a refusal that says where.

Each example writes a sheet in some style that means the same (delimiter, encoding, quotes, blanks, extra columns), and
half of them damage it. What the reader below finds in the very file is what may be prepared of it, and nothing else.
"""

import io
import random
import re
import tempfile
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import openpyxl
import pytest
from corpus_fixtures import CASME2_HEADER, make_casme2
from hypothesis import given, settings
from hypothesis import strategies as st

from aullm_dist.data.corpora import read_corpus
from aullm_dist.errors import UserError

SEEDS = st.integers(0, 2**32 - 1)
PROFILE = {"derandomize": True, "database": None, "deadline": None}
NAMES = ("Subject", "Filename", "OnsetFrame", "ApexFrame", "OffsetFrame", "Action Units", "Estimated Emotion")
CELLS = ["4+R12", "4", "L1+R2", "14?", "4+7+A", "1+2", "17", "12C", "/", ""]
INVISIBLE = "\u200b\ufeff\u2060\u00ad"

Labels = dict[str, tuple[int, int, frozenset[int]]]


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    return make_casme2(tmp_path_factory.mktemp("casme2")) / "CASME2_RAW_selected"


# What a patient person reads -------------------------------------------------------------------------------------


def seen(text: object) -> str:
    """A cell as it shows: invisible characters gone, blanks at the ends gone, a whole float as its integer."""
    given_text = "" if text is None else str(text)
    shown = "".join(" " if c == "\u00a0" else c for c in given_text if c not in INVISIBLE).strip()
    return shown[:-2] if re.fullmatch("[0-9]+\\.0", shown) else shown


def aus_of(text: str) -> frozenset[int] | None:
    if text in ("", "/"):
        return frozenset()
    found = set()
    for part in re.split(r"[+,;|\s]+", text):
        match = re.fullmatch(r"[LR]?([0-9]{1,2})[A-E]?\??", part)
        if match is None and part not in "ABCDELR/":
            return None
        if match is not None:
            found.add(int(match[1]))
    return frozenset(found) if found or not re.search("[A-Z]", text) else None


def labels_of_rows(rows: list[list[str]], *, widths: bool) -> Labels:
    """The labels that stand in rows of shown cells; rows in which anything is doubtful are left out."""
    top = next((n for n, row in enumerate(rows) if set(NAMES) <= {" ".join(c.strip("\"'").split()) for c in row}), None)
    if top is None:
        return {}
    head = [" ".join(cell.strip("\"'").split()) for cell in rows[top]]
    at = {name: head.index(name) for name in NAMES}
    lengths = {len(row) for row in rows[top + 1 :] if any(row)}
    found: Labels = {}
    for row in rows[top + 1 :]:
        if not any(row):
            continue
        if widths and len(row) > len(head) and (len(lengths) > 1 or any(row[len(head) :])):
            continue
        if len(row) <= max(at.values()):
            if widths:
                continue
            row = row + [""] * (len(head) - len(row))
        beside = at["Action Units"] + 1
        if beside < len(row) and (beside >= len(head) or not head[beside]) and re.search("[0-9]", row[beside]):
            continue
        cells = {name: row[place] for name, place in at.items()}
        numbers = [cells["OnsetFrame"], cells["OffsetFrame"]]
        aus = aus_of(cells["Action Units"])
        if not all(re.fullmatch("[0-9]{1,9}", each) for each in numbers) or aus is None:
            continue
        if not re.fullmatch("[0-9]{1,3}", cells["Subject"]) or re.match("[0-9]", cells["Estimated Emotion"]):
            continue
        if "\n" in cells["Filename"]:
            continue
        name = f"casme2/sub{int(cells['Subject']):02d}/{cells['Filename']}"
        # A second row of a clip is left out and reported, whatever it says.
        found.setdefault(name, (int(numbers[0]), int(numbers[1]), aus))
    return found


def split_slowly(text: str, delimiter: str) -> list[list[str]]:
    """Split a CSV text character by character; rows behind a quote that never ends are not there."""
    rows, row, cell, quoted, was_quoted = [], [], "", False, False
    place = 0
    while place < len(text):
        c = text[place]
        if quoted:
            if c == '"' and text[place + 1 : place + 2] == '"':
                cell += '"'
                place += 1
            elif c == '"':
                quoted = False
            else:
                cell += c
        elif c == '"' and not cell.strip(" "):
            quoted, was_quoted, cell = True, True, ""
        elif c == delimiter or c in "\r\n":
            row.append(seen(cell))
            cell, was_quoted = "", False
            if c != delimiter:
                if c == "\r" and text[place + 1 : place + 2] == "\n":
                    place += 1
                rows.append(row)
                row = []
        else:
            cell += c
        place += 1
    if quoted:
        return rows
    if cell or row or was_quoted:
        rows.append([*row, seen(cell)])
    return rows


def read_xml(content: bytes) -> list[list[str]]:
    """The cells of the first sheet that is shown, read from the XML; formulas without a value are a question mark."""
    package = zipfile.ZipFile(io.BytesIO(content))
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    strings = []
    if "xl/sharedStrings.xml" in package.namelist():
        root = ElementTree.fromstring(package.read("xl/sharedStrings.xml"))
        strings = ["".join(t.text or "" for t in item.iter(f"{space}t")) for item in root.iter(f"{space}si")]
    sheet = ElementTree.fromstring(package.read("xl/worksheets/sheet1.xml"))
    rows: list[list[str]] = []
    for row in sheet.iter(f"{space}row"):
        while len(rows) < int(row.get("r")):
            rows.append([])
        for cell in row.iter(f"{space}c"):
            letters = re.match("[A-Z]+", cell.get("r"))[0]
            column = 0
            for letter in letters:
                column = 26 * column + ord(letter) - 64
            value = cell.findtext(f"{space}v")
            if cell.get("t") == "s" and value is not None:
                value = strings[int(value)]
            elif cell.get("t") == "inlineStr":
                value = "".join(t.text or "" for t in cell.iter(f"{space}t"))
            elif cell.get("t") == "b":
                value = str(value == "1")
            elif value is not None and re.fullmatch(r"[0-9]+(\.0)?", value):
                value = str(int(float(value)))
            if cell.find(f"{space}f") is not None and not value:
                value = "?"
            rows[-1] += [""] * (column - len(rows[-1]))
            rows[-1][column - 1] = seen(value)
    return rows


# Sheets in many styles -------------------------------------------------------------------------------------------


def truth(rng: random.Random) -> list[list[object]]:
    clips = [(1, "EP02_01f", 46, 86), (1, "EP03_02", 98, 104), (2, "EP01_11f", 9, 14), (17, "EP05_09", 5, 11)]
    return [
        [subject, clip, onset, rng.choice([onset + 1, "/"]), offset, rng.choice(CELLS), rng.choice(["others", "fear"])]
        for subject, clip, onset, offset in clips
    ]


def arranged(rng: random.Random, clips: list[list[object]]) -> list[list[object]]:
    """Put the columns of NAMES among others, as releases do; each name may have blanks that nobody sees."""
    order = [name for name in CASME2_HEADER if name] if rng.random() < 0.5 else rng.sample(NAMES, len(NAMES))
    header: list[object] = list(order)
    rows: list[list[object]] = [[clip[NAMES.index(name)] for name in order] for clip in clips]
    for extra in rng.sample(["remarks", "Duration", "", "Unnamed: 9"], rng.randrange(3)):
        place = rng.randint(0, len(header))
        header.insert(place, extra)
        for row in rows:
            row.insert(place, "" if extra in ("", "Unnamed: 9") else rng.choice(["", "x", "12"]))
    if rng.random() < 0.3:
        header = [f" {name}\u200b".replace(" ", "\u00a0") for name in header]
    table = [header, *rows]
    if rng.random() < 0.3:
        table.insert(0, ["Coded in 2014"])
    return table


def as_text(rng: random.Random, cell: object) -> str:
    text = str(cell)
    if isinstance(cell, int) and rng.random() < 0.3:
        text += ".0"
    return text + rng.choice(["", "", "", "\u200b", "\u00a0"])


def write_csv(rng: random.Random, table: list[list[object]]) -> tuple[str, str]:
    """Return text and delimiter of the table in a random style."""
    delimiter, end = rng.choice(",;\t|"), rng.choice(["\n", "\r\n"])
    always = rng.random() < 0.3
    more = rng.randrange(3) if rng.random() < 0.2 else 0
    lines = []
    for row in table:
        cells = [as_text(rng, cell) if cell != "" else "" for cell in row] + [""] * more
        quoted = [f'"{c}"' if always or delimiter in c or '"' in c else c for c in cells]
        lines.append((delimiter + (" " if rng.random() < 0.1 and delimiter != "\t" else "")).join(quoted))
        if rng.random() < 0.1:
            lines.append("")
    return end.join(lines) + (end if rng.random() < 0.8 else ""), delimiter


def damage(rng: random.Random, text: str, delimiter: str) -> str:
    kind = rng.randrange(7)
    place = rng.randrange(len(text))
    if kind == 0:
        return text[:place]
    if kind == 1:
        return text[:place] + rng.choice([delimiter, '"', "+", "\n", "9", "\0"]) + text[place:]
    if kind == 2:
        return text[:place] + text[place + rng.randint(1, 6) :]
    if kind == 3:
        return text.replace("+", delimiter, 1)
    lines = text.splitlines(keepends=True)
    number = rng.randrange(len(lines))
    if kind == 4:
        lines.insert(number, lines[rng.randrange(len(lines))])
    elif kind == 5:
        lines[number] = lines[number].rstrip("\r\n") + delimiter + rng.choice(["", "15", "x"]) + "\n"
    else:
        lines[number] = lines[number].rsplit(delimiter, rng.randint(1, 3))[0] + "\n"
    return "".join(lines)


def prepared(folder: Path) -> Labels | str:
    try:
        index = read_corpus("casme2", folder, bad_rows="skip")
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    for note in index.notes:
        assert "\n" not in str(note)
    return {record.sample_id: (record.onset, record.offset, frozenset(record.aus)) for record in index.records}


def compare(ours: Labels | str, theirs: Labels, *, damaged: bool) -> None:
    """No label that the slow reader does not find; of a sheet that is not damaged, every one that it finds."""
    if isinstance(ours, str):
        assert damaged, ours
        return
    for name, label in ours.items():
        assert theirs.get(name) == label, (name, label, theirs.get(name))
    if not damaged:
        assert ours == theirs


def check_csv(seed: int, frames: Path) -> None:
    rng = random.Random(seed)
    text, delimiter = write_csv(rng, arranged(rng, truth(rng)))
    damaged = rng.random() < 0.5
    if damaged:
        text = damage(rng, text, delimiter)
    encoding = rng.choice(["utf-8", "utf-8-sig", "utf-16"])
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "CASME2_RAW_selected").symlink_to(frames)
        (Path(folder) / "sheet.csv").write_bytes(text.encode(encoding))
        theirs = labels_of_rows(split_slowly(text, delimiter), widths=True)
        compare(prepared(Path(folder)), theirs, damaged=damaged)


def check_xlsx(seed: int, frames: Path) -> None:
    rng = random.Random(seed)
    table = arranged(rng, truth(rng))
    book = openpyxl.Workbook()
    sheet = book.active
    for row in table:
        sheet.append([cell if rng.random() < 0.7 or cell == "" else as_text(rng, cell) for cell in row])
    damaged = rng.random() < 0.6
    if damaged:
        place = sheet.cell(rng.randint(1, sheet.max_row), rng.randint(1, sheet.max_column + 2))
        kind = rng.randrange(5)
        if kind == 0:
            place.value = rng.choice(["=1+2", "=A1", '=CONCATENATE("4","+","12")'])
        elif kind == 1:
            place.value = rng.choice([15, "15", 4.5, True, "x", "4+15", "#N/A"])
        elif kind == 2:
            last = sheet.cell(place.row + rng.randrange(3), place.column + rng.randrange(2))
            sheet.merge_cells(f"{place.coordinate}:{last.coordinate}")
        elif kind == 3:
            sheet.cell(rng.randint(60, 2000), rng.randint(1, 60)).value = rng.choice(["x", 4])
        else:
            sheet.delete_cols(rng.randint(1, sheet.max_column))
    content = io.BytesIO()
    book.save(content)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "CASME2_RAW_selected").symlink_to(frames)
        (Path(folder) / "sheet.xlsx").write_bytes(content.getvalue())
        ours = prepared(Path(folder))
        theirs = labels_of_rows(read_xml(content.getvalue()), widths=False)
    if damaged and not isinstance(ours, str) and sheet.merged_cells.ranges:
        # A merged subject holds for each of its rows, which the slow reader does not know.
        ours = {name: label for name, label in ours.items() if name in theirs or label[2]}
        theirs = {**{name: label for name, label in ours.items() if name not in theirs}, **theirs}
    compare(ours, theirs, damaged=damaged)


@settings(max_examples=200, **PROFILE)
@given(SEEDS)
def test_generated_csv_sheets_have_the_labels_that_stand_in_them(frames, seed):
    check_csv(seed, frames)


@settings(max_examples=60, **PROFILE)
@given(SEEDS)
def test_generated_workbooks_have_the_labels_that_stand_in_them(frames, seed):
    check_xlsx(seed, frames)
