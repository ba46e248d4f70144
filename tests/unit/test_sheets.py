"""Annotation sheets: whatever bears content is read, named in a note, or refused; never taken for something else."""

import csv
import io
import zipfile
from pathlib import Path

import openpyxl
import pytest
from corpus_fixtures import CASME2_HEADER, CASME2_ROWS, casme2_row, make_casme2
from openpyxl.cell.rich_text import CellRichText, TextBlock
from openpyxl.cell.text import InlineFont

from aullm_dist.data.corpora import read_corpus
from aullm_dist.data.sheets import cell_text, clean_text, column_key
from aullm_dist.errors import UserError

TRUTH = {
    "casme2/sub01/EP02_01f": (4, 12),
    "casme2/sub01/EP03_02": (4,),
    "casme2/sub02/EP01_11f": (1, 2),
    "casme2/sub17/EP05_09": (14,),
}
AU = CASME2_HEADER.index("Action Units")


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    root = make_casme2(tmp_path_factory.mktemp("casme2"))
    return root / "CASME2_RAW_selected"


@pytest.fixture
def root(frames, tmp_path) -> Path:
    (tmp_path / "CASME2_RAW_selected").symlink_to(frames)
    return tmp_path


def table() -> list[list[object]]:
    return [list(CASME2_HEADER), *(list(row) for row in CASME2_ROWS)]


def write_csv(root: Path, rows, name="sheet.csv", encoding="utf-8", **style) -> Path:
    text = io.StringIO()
    csv.writer(text, **style).writerows([["" if cell is None else cell for cell in row] for row in rows])
    (root / name).write_bytes(text.getvalue().encode(encoding))
    return root / name


def write_xlsx(root: Path, rows, change=lambda book, sheet: None, name="sheet.xlsx") -> Path:
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    change(book, book.active)
    book.save(root / name)
    return root / name


def labels(root: Path, **options) -> dict[str, tuple[int, ...]]:
    return {record.sample_id: record.aus for record in read_corpus("casme2", root, **options).records}


def refusal(root: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_corpus("casme2", root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def notes(root: Path) -> str:
    return "\n".join(map(str, read_corpus("casme2", root).notes))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_every_delimiter_encoding_and_quoting_is_read_the_same(root, delimiter, encoding, quoting):
    write_csv(root, table(), encoding=encoding, delimiter=delimiter, quoting=quoting)
    assert labels(root) == TRUTH


def test_headers_and_cells_with_what_nobody_sees(root):
    rows = table()
    rows[0] = [name and f"\u200b{name.replace(' ', chr(0xA0))}\ufeff" for name in rows[0]]
    for row in rows[1:]:
        row[0], row[3], row[4], row[5] = f"{row[0]}.0", f"\u00a0{row[3]}.0", f"{row[4]}\u200b", f"{row[5]}.00"
        row[1] = f"{row[1]}\u2060"
        row[AU] = f"\u200e{row[AU]}\u00a0"
    file = write_csv(root, rows)
    assert labels(root) == TRUTH
    file.unlink()
    write_xlsx(root, rows)
    assert labels(root) == TRUTH


def test_blanks_behind_delimiters_and_quotes_around_names(root):
    lines = [", ".join("" if cell is None else f'"{cell}"' for cell in row) for row in table()]
    (root / "sheet.csv").write_text("\n".join(lines) + "\n")
    assert labels(root) == TRUTH
    assert column_key(" 'Action  Units' ") == column_key("Action Units") == "action units"


def test_an_invisible_character_between_two_digits_is_refused(root):
    rows = table()
    rows[1][AU] = "1\u200b2"
    write_csv(root, rows)
    assert "row 2" in refusal(root)
    assert clean_text("1\u200b2") == "1\u200b2"
    assert clean_text("\u200b12\u200b") == "12"


def test_the_first_line_of_excel_names_the_delimiter(root):
    file = write_csv(root, table(), delimiter=";")
    file.write_text("sep=;\n" + file.read_text())
    assert labels(root) == TRUTH


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("1,EP02_01f,,46,59,86,,4,12,happiness", "row 2, 10 cells, where the header has 9"),
        ("1,EP02_01f,,46,59,86", "row 2, column Action Units: the row ends before it"),
        ('1,"EP02_01f,,46,59,86,,4,happiness', "check the quotes from row 2 on"),
        ("1,EP02_01f,,46,59,86,,4,15", "row 2, column Estimated Emotion: '15'; allowed: a word"),
        ("1,EP02_01f,,46,59,86,,=4+12,happiness", "row 2 (sub01/EP02_01f), column Action Units"),
        ("1,EP02_01f,,46,59,8\0,,4,happiness", "line 2: holds NUL characters"),
    ],
)
def test_a_row_whose_cells_may_have_slipped_is_refused(root, line, part):
    file = write_csv(root, table(), lineterminator="\n")
    lines = file.read_text().split("\n")
    lines[1] = line
    file.write_text("\n".join(lines))
    assert part in refusal(root)


def test_a_bad_row_of_a_csv_is_left_out_alone_where_that_is_asked_for(root):
    file = write_csv(root, table(), lineterminator="\n")
    file.write_text(file.read_text().replace("4+R12", "4,12"))
    assert labels(root, bad_rows="skip") == {name: aus for name, aus in TRUTH.items() if not name.endswith("02_01f")}


def test_rows_that_all_have_empty_cells_more_are_read(root):
    write_csv(root, [table()[0], *([*row, "", ""] for row in table()[1:])])
    assert labels(root) == TRUTH


def test_a_last_line_without_an_end_is_noted(root):
    file = write_csv(root, table())
    file.write_text(file.read_text().rstrip())
    assert labels(root) == TRUTH
    assert "the last line (5) has no end" in notes(root)


def set_cell(place: str, value: object):
    def change(book, sheet):
        sheet[place] = value

    return change


def merge(area: str):
    return lambda book, sheet: sheet.merge_cells(area)


def styled(text: str, **font):
    return CellRichText("4+", TextBlock(InlineFont(**font), text))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (set_cell("H2", "=4+12"), "row 2, column Action Units: the formula '=4+12' has no value"),
        (set_cell("D2", "=40+6"), "row 2, column OnsetFrame: the formula '=40+6' has no value"),
        (set_cell("A2", '=CONCATENATE("1","")'), "row 2, column Subject: the formula"),
        (set_cell("H2", styled("2", vertAlign="superscript")), "row 2, column Action Units: '4+2' has raised digits"),
        (set_cell("H2", styled("2", vertAlign="subscript")), "row 2, column Action Units: '4+2' has lowered digits"),
        (set_cell("H2", styled("2", strike=True)), "row 2, column Action Units: '4+2' has crossed-out digits"),
        (merge("H2:H3"), "row 2, column Action Units: the cells H2:H3 are merged"),
        (merge("D2:D3"), "row 2, column OnsetFrame: the cells D2:D3 are merged"),
        (merge("H2:I2"), "row 2, column Action Units: the cells H2:I2 are merged"),
        (merge("A2:B2"), "row 2, column Subject: the cells A2:B2 are merged"),
        (set_cell("I2", 15), "row 2, column Estimated Emotion: '15'; allowed: a word"),
        (set_cell("H2", True), "row 2"),
    ],
)
def test_a_cell_that_does_not_say_what_it_shows_is_refused(root, change, part):
    write_xlsx(root, table(), change)
    assert part in refusal(root)


def test_aus_that_go_on_in_a_column_without_a_name_are_refused_and_other_content_is_noted(root):
    header = [*CASME2_HEADER[: AU + 1], None, "Estimated Emotion"]
    rows = [[*row[: AU + 1], None, row[-1]] for row in CASME2_ROWS]
    rows[1][AU + 1] = "15"
    file = write_xlsx(root, [header, *rows])
    assert "row 3, column Action Units: column I, which has no name, holds '15', next to the AUs" in refusal(root)
    rows[1][AU + 1] = "see the video"
    rows[2][2] = "9"
    write_xlsx(root, [header, *rows], name=file.name)
    assert labels(root) == TRUTH
    assert "column C has no name, and content in 1 rows: not read (the first is row 4: '9')" in notes(root)
    assert "column I has no name, and content in 1 rows: not read (the first is row 3: 'see the video')" in notes(root)


def test_subjects_merged_downwards_hold_for_each_row(root):
    rows = table()
    rows[2][0] = None
    write_xlsx(root, rows, merge("A2:A3"))
    assert labels(root) == TRUTH
    assert "1 ranges of merged cells" in notes(root)


@pytest.mark.parametrize(("area", "told"), [("A9:B9", False), ("K2:L3", False), ("I2:J2", False), ("I2:I3", True)])
def test_merged_cells_that_change_nothing_are_not_told(root, area, told):
    """Below the table, beside it, and of one column over a nameless one; one down a column is."""
    rows = table()
    rows[2][8] = None if told else rows[2][8]
    write_xlsx(root, rows, merge(area))
    index = read_corpus("casme2", root)
    assert any("ranges of merged cells" in str(note) for note in index.notes) is told


def test_two_columns_for_one_thing_are_refused_where_they_differ(root):
    rows = [[*row, row[AU]] for row in table()]
    file = write_xlsx(root, rows)
    assert labels(root) == TRUTH
    assert "two columns are called 'action units', with the same content" in notes(root)
    rows[3][-1] = "17"
    write_xlsx(root, rows, name=file.name)
    assert "two columns are called 'Action Units', and differ in 1 rows (the first is row 4)" in refusal(root)


def test_two_names_of_one_column_are_refused_where_they_differ(tmp_path):
    from corpus_fixtures import CASME3A_HEADER, CASME3A_ROWS, make_casme3a

    root = make_casme3a(tmp_path)
    sheet = next(root.glob("*.xlsx"))
    rows = [[*row, row[5]] for row in CASME3A_ROWS]
    write_xlsx(root, [[*CASME3A_HEADER, "Action Units"], *rows], name=sheet.name)
    assert len(read_corpus("casme3a", root).records) == 5
    rows[0][-1] = "17"
    write_xlsx(root, [[*CASME3A_HEADER, "Action Units"], *rows], name=sheet.name)
    with pytest.raises(UserError, match="row 2: the columns 'AU' and 'Action Units' stand for one thing, and differ"):
        read_corpus("casme3a", root)


def second_sheet(state: str, aus: str = "17"):
    def change(book, sheet):
        other = book.create_sheet("old", 0)
        for row in table():
            other.append([*row[:AU], aus if row[0] != "Subject" else row[AU], row[-1]])
        other.sheet_state = state

    return change


def test_a_hidden_sheet_is_not_read_before_one_that_is_shown(root):
    write_xlsx(root, table(), second_sheet("hidden"))
    assert labels(root) == TRUTH
    assert "sheet 'old' not used: sheet 'Sheet' is read" in notes(root)


def test_two_sheets_that_both_fit_and_differ_are_refused(root):
    write_xlsx(root, table(), second_sheet("visible"))
    assert "the sheets 'old' and 'Sheet' both have the columns" in refusal(root)


def test_a_hidden_sheet_that_is_the_only_one_is_told(root):
    def hide(book, sheet):
        book.create_sheet("notes").append(["nothing here"])
        sheet.sheet_state = "hidden"

    write_xlsx(root, table(), hide)
    assert labels(root) == TRUTH
    assert "sheet 'Sheet' is hidden, and the only one" in notes(root)
    assert "sheets not read, as they do not have the columns: 'notes'" in notes(root)


def test_rows_above_the_header_are_noted(root):
    write_xlsx(root, [["Coded in 2014"], *table()])
    assert labels(root) == TRUTH
    assert "1 rows above the header (row 2) not read: 1" in notes(root)


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("z.xlsx", b"", "z.xlsx: is empty (0 bytes)"),
        ("z.xlsx", b"PK\x03\x04 cut short", "z.xlsx: cannot be read as an .xlsx workbook"),
        ("z.xls", b"\xd0\xcf\x11\xe0" + ",".join(filter(None, CASME2_HEADER)).encode("utf-16-le"), "old .xls format"),
        ("z.csv", "\u00fc".join(filter(None, CASME2_HEADER)).encode("latin-1"), "z.csv: cannot be read as a .csv file"),
        ("z.csv", b"\0" * 500, "z.csv: is empty|z.csv line 1: holds NUL"),
    ],
)
def test_a_newer_sheet_that_cannot_be_read_is_refused_and_an_older_one_noted(root, name, content, part):
    write_xlsx(root, table(), name="sheet.xlsx")
    (root / name).write_bytes(content)
    found = refusal(root)
    assert any(each in found for each in part.split("|"))
    assert "by its name it comes after sheet.xlsx: move it away to use that one" in found
    (root / name).rename(root / f"a{name}")
    assert labels(root) == TRUTH
    assert f"a{name}: not used: " in notes(root)


def test_a_file_that_cannot_be_this_sheet_disturbs_nobody_and_is_noted(root):
    write_xlsx(root, table(), name="sheet.xlsx")
    (root / "zz.csv").write_bytes("caf\u00e9;1\n".encode("latin-1"))
    (root / "zz.xls").write_bytes(b"\xd0\xcf\x11\xe0 other things")
    (root / "zz.xlsx").write_bytes(write_xlsx(root, [["x", "y"]], name="zz.xlsx").read_bytes())
    assert labels(root) == TRUTH
    for name in ("zz.csv", "zz.xls", "zz.xlsx"):
        assert f"{name}: not used: " in notes(root)


def test_every_file_is_named_where_none_fits(root):
    (root / "boxes.csv").write_text("clip,left\n")
    (root / "sheet.xls").write_bytes(b"\xd0\xcf\x11\xe0" + bytes(600))
    found = refusal(root)
    assert "sheet.xls: the old .xls format is not read; save it as .xlsx" in found
    assert "boxes.csv: not a workbook of CASME II" in found


def with_part(file: Path, part: str, old: bytes, new: bytes) -> None:
    """Replace bytes in one part of a workbook."""
    parts = {}
    with zipfile.ZipFile(file) as package:
        parts = {name: package.read(name) for name in package.namelist()}
    assert old in parts[part]
    parts[part] = parts[part].replace(old, new)
    with zipfile.ZipFile(file, "w") as package:
        for name, content in parts.items():
            package.writestr(name, content)


def test_a_sum_that_was_computed_is_no_au(root):
    """Someone typed =4+15 and sees 19."""
    file = write_xlsx(root, table(), set_cell("H2", "=4+15"))
    with_part(file, "xl/worksheets/sheet1.xml", b"<f>4+15</f><v />", b"<f>4+15</f><v>19</v>")
    assert "row 2, column Action Units: the formula '=4+15', which shows 19: write it as text" in refusal(root)
    with_part(file, "xl/worksheets/sheet1.xml", b"<f>4+15</f><v>19</v>", b"<f>LOOKUP(A1)</f><v>12</v>")
    assert labels(root) == {**TRUTH, "casme2/sub01/EP02_01f": (12,)}


@pytest.mark.parametrize("number", [b"99999999", b"4294967296"])
def test_a_row_number_beyond_the_format_costs_nothing(root, number):
    file = write_xlsx(root, [*table(), casme2_row(9, "x", 1, 2, 3, "4")])
    with_part(file, "xl/worksheets/sheet1.xml", b'<row r="6"', b'<row r="' + number + b'"')
    assert f"row {number.decode()} stands after row 5" in refusal(root)


def test_rows_that_do_not_ascend_are_refused(root):
    file = write_xlsx(root, table())
    with_part(file, "xl/worksheets/sheet1.xml", b'<row r="4"', b'<row r="2"')
    assert "row 2 stands after row 3" in refusal(root)


def test_whole_floats_are_integers_in_text_too():
    assert [cell_text(cell) for cell in ("1012.0", 1012.0, "007.00", "1.5", " a ")] == [
        "1012",
        "1012",
        "007",
        "1.5",
        "a",
    ]
