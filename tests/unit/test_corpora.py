import pytest
from corpus_fixtures import (
    CASME2_HEADER,
    CASME2_ROWS,
    SAMM_HEADER,
    casme2_row,
    fourdme_row,
    make_casme2,
    make_fourdme,
    make_samm,
    samm_row,
    write_book,
    write_frames,
)

from aullm_dist.data.corpora import CORPORA, read_corpus
from aullm_dist.data.corpora.layout import list_frames
from aullm_dist.errors import UserError


def notes_of(index, kind):
    return [str(note) for note in index.notes if note.kind == kind]


def error_of(name, root):
    with pytest.raises(UserError) as caught:
        read_corpus(name, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_casme2(tmp_path):
    write_frames(make_casme2(tmp_path) / "CASME2_RAW_selected" / "sub09" / "EP02_02f", "img{}.jpg", range(1, 4))
    index = read_corpus("casme2", tmp_path)
    first, second, third, fourth = index.records
    assert (first.sample_id, first.subject) == ("casme2/sub01/EP02_01f", "casme2/sub01")
    assert (first.onset, first.apex, first.offset, first.fps) == (46, 59, 86, 200.0)
    assert (first.aus, first.emotion) == ((4, 12), "happiness")
    assert second.apex == 101  # '/' -> (98 + 104) // 2
    assert second.aus == (4,)
    assert (third.aus, third.emotion) == ((1, 2), "contempt")
    assert (fourth.aus, fourth.subject) == ((14,), "casme2/sub17")
    assert first.folder == tmp_path / "CASME2_RAW_selected" / "sub01" / "EP02_01f"
    assert "casme2/sub01/EP03_02 (row 3): apex missing: set to the middle frame 101" in notes_of(index, "repaired")
    assert any("casme2/sub09/EP02_02f" in text and "without a row" in text for text in notes_of(index, "skipped"))
    assert any("22 published corrections" in text for text in notes_of(index, "unmatched"))


def casme2_long(defects, length=64):
    """A sheet long enough for the published corrections up to row 60; `defects` replaces rows by index."""
    return [
        defects.get(row, casme2_row(row // 9 + 1, f"EP{row:02d}_01", 20 + row, 30 + row, 60 + row, "4+7"))
        for row in range(length)
    ]


def test_casme2_corrections_apply_only_where_the_defect_is(tmp_path):
    defects = {
        29: casme2_row(4, "EP29_01", 250, "/", 300, 4),  # the published apex 279 fits
        35: casme2_row(4, "EP35_01", 100, "/", 120, 4),  # the published apex 68 lies outside
        60: casme2_row(7, "EP60_01", 60, "/", 9, 4),  # offset before onset: 91, then apex 78
    }
    write_book(tmp_path / "CASME2-coding-20190701.xlsx", [CASME2_HEADER, *casme2_long(defects)])
    (tmp_path / "CASME2_RAW_selected" / "sub01").mkdir(parents=True)
    index = read_corpus("casme2", tmp_path)
    by_clip = {record.sample_id.rsplit("/")[-1]: record for record in index.records}
    assert by_clip["EP29_01"].apex == 279
    assert by_clip["EP35_01"].apex == 110
    assert (by_clip["EP60_01"].apex, by_clip["EP60_01"].offset) == (78, 91)
    assert by_clip["EP43_01"].apex == 73  # has an apex of its own: kept
    repaired, unmatched = notes_of(index, "repaired"), notes_of(index, "unmatched")
    assert sum("published correction" in text for text in repaired) == 3
    assert any("EP35_01" in text and "68" in text for text in unmatched)
    assert any("EP43_01" in text for text in unmatched)


@pytest.mark.parametrize(("has_extra", "corrected"), [(True, 237), (False, 236)])
def test_casme2_corrections_move_up_in_the_sheet_without_the_extra_clip(tmp_path, has_extra, corrected):
    rows = [casme2_row(row // 10 + 1, f"EP{row:03d}_01", 100, 120, 200, 4) for row in range(242)]
    if has_extra:
        rows[222] = casme2_row(24, "EP02_07", 100, 120, 200, 4)
    rows[corrected][4] = "/"
    write_book(tmp_path / "coding.xlsx", [CASME2_HEADER, *rows])
    (tmp_path / "CASME2_RAW_selected").mkdir()
    assert read_corpus("casme2", tmp_path).records[corrected].apex == 153


def test_samm(tmp_path):
    index = read_corpus("samm", make_samm(tmp_path))
    first, second, third = index.records
    assert (first.sample_id, first.subject) == ("samm/006/006_1_2", "samm/006")
    assert (first.aus, first.emotion, first.fps) == ((4, 7), "anger", 200.0)
    assert second.subject == "samm/006"  # the number 6 in the sheet
    assert (second.aus, second.emotion) == ((1, 2), "others")
    assert third.aus == (14,)
    assert list(list_frames(third.folder)) == list(range(9996, 10006))
    (choice,) = [text for text in notes_of(index, "repaired") if "013_1_8 (row 17)" in text]
    assert "the first was taken (AU14)" in choice


def test_samm_corrections(tmp_path):
    rows = [samm_row("006", f"006_1_{row}", 1000, 1010, 1020, "4") for row in range(134)]
    rows[15][8] = "R12 or R15"
    rows[18][8] = "R12 + R15"
    rows[41][8] = "4 or 7"  # an "or" cell, but not the one that the correction L14 is for
    rows[56] = samm_row("007", "007_9_9", 5700, 5720, 5793, "4")
    rows[125] = samm_row("028", "028_4_1", 1100, 2105, 1120, "4")
    rows[132] = samm_row("032", "032_3_1", 900, 2105, 1120, "4")
    root = make_samm(tmp_path, [])
    write_book(root / "SAMM_Micro_FACS_Codes_v2.xlsx", [*([["note"]] * 13), SAMM_HEADER, *rows])
    write_frames(root / "SAMM" / "007" / "007_9_9", "007_{:05d}.jpg", range(5700, 5740), mode="L")
    index = read_corpus("samm", root)
    assert index.records[15].aus == (12, 15)
    assert index.records[41].aus == (4,)
    assert index.records[56].offset == 5739  # frame 5793 is not on disk, 5739 is
    assert index.records[125].apex == 1105
    assert index.records[132].apex == (900 + 1120) // 2
    unmatched = {text.split("(row ")[1].split(")")[0] for text in notes_of(index, "unmatched") if "(row " in text}
    assert unmatched == {str(row + 15) for row in (41, 64, 132, 133)}
    assert any(
        "R12 + R15: the published correction is in the sheet already" in text for text in notes_of(index, "noted")
    )


def test_fourdme(tmp_path):
    index = read_corpus("4dme", make_fourdme(tmp_path))
    first, second, third = index.records
    assert (first.sample_id, first.subject) == ("4dme/S1/S1_1st_001_01_1", "4dme/S1")
    assert (first.aus, first.emotion, first.fps) == ((4, 7), "negative+repression", 60.0)
    assert (second.aus, second.emotion) == ((2, 45), "positive+surprise")
    assert (second.onset, second.apex, second.offset) == (95, 99, 103)
    assert third.aus == (1, 2)
    assert any("AU1, AU4" in text and "AU1, AU2" in text for text in notes_of(index, "noted"))
    assert not any("S1_1st_001_01_2" in text for text in notes_of(index, "noted"))  # static AU12: marked or not
    assert any("4dme/S13/S13_1st_001_01_1: clip folder without a row" in text for text in notes_of(index, "skipped"))


def fourdme_long(first, second):
    rows = [fourdme_row("S1", f"clip_{row}", 10, 12, 20, "Positive", "AU12", {12}) for row in range(148)]
    rows[144], rows[145] = first, second
    return rows


@pytest.mark.parametrize(
    ("first", "second", "aus"),
    [
        # All columns from the AUs on carry the other row's values: the emotion text gives it away.
        (
            fourdme_row("S1", "a", 10, 12, 20, "Positive", "AU4", {4}, ["Negative"]),
            fourdme_row("S1", "b", 10, 12, 20, "Negative", "AU12", {12}, ["Positive"]),
            ((12,), (4,)),
        ),
        # Only the text is exchanged: the one-hot columns give it away.
        (
            fourdme_row("S1", "a", 10, 12, 20, "Others", "AU4", {12}),
            fourdme_row("S1", "b", 10, 12, 20, "Others", "AU12", {4}),
            ((12,), (4,)),
        ),
        # Nothing contradicts: kept.
        (
            fourdme_row("S1", "a", 10, 12, 20, "Negative", "AU4", {4}),
            fourdme_row("S1", "b", 10, 12, 20, "Positive", "AU12", {12}),
            ((4,), (12,)),
        ),
    ],
    ids=["all-columns", "text-only", "consistent"],
)
def test_fourdme_exchange_of_two_rows(tmp_path, first, second, aus):
    index = read_corpus("4dme", make_fourdme(tmp_path, fourdme_long(first, second), frames=False))
    assert (index.records[144].aus, index.records[145].aus) == aus
    exchanged = aus == ((12,), (4,))
    assert sum("exchanged" in text for text in notes_of(index, "repaired")) == (2 if exchanged else 0)
    assert sum("exchange" in text for text in notes_of(index, "unmatched")) == (0 if exchanged else 2)
    assert not notes_of(index, "noted")


@pytest.mark.parametrize("name", sorted(CORPORA))
@pytest.mark.parametrize("where", [".", "..", "frames"])
def test_root_may_be_above_or_the_frames_themselves(tmp_path, name, where):
    make = {"casme2": make_casme2, "samm": make_samm, "4dme": make_fourdme}[name]
    release = make(tmp_path / "corpora" / "release")
    frames = {"casme2": "CASME2_RAW_selected", "samm": "SAMM", "4dme": "gray_micro"}[name]
    root = release / frames if where == "frames" else release / where
    assert all(record.folder.is_dir() for record in read_corpus(name, root).records)


def test_folders_are_matched_without_regard_to_case(tmp_path):
    make_casme2(tmp_path)
    (tmp_path / "CASME2_RAW_selected").rename(tmp_path / "casme2_raw_SELECTED")
    (tmp_path / "casme2_raw_SELECTED" / "sub01").rename(tmp_path / "casme2_raw_SELECTED" / "Sub01")
    assert all(record.folder.is_dir() for record in read_corpus("casme2", tmp_path).records)


def test_the_raw_folder_is_preferred_to_the_cropped_one(tmp_path):
    make_casme2(tmp_path)
    write_frames(tmp_path / "Cropped" / "sub01" / "EP02_01f", "reg_img{}.jpg", range(46, 87))
    index = read_corpus("casme2", tmp_path)
    assert index.frames_root.name == "CASME2_RAW_selected"
    assert any("Cropped" in text for text in notes_of(index, "noted"))
    assert read_corpus("casme2", tmp_path / "Cropped").frames_root.name == "Cropped"


def test_frames_are_numbered_by_the_last_digits(tmp_path):
    for name in ("reg_img10.jpg", "reg_img9.JPG", "S01_0100.png", "Thumbs.db", "._reg_img9.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert list(list_frames(tmp_path)) == [9, 10, 100]
    (tmp_path / "img010.jpg").touch()
    with pytest.raises(UserError, match="both frame 10"):
        list_frames(tmp_path)


@pytest.mark.parametrize(("name", "make"), [("casme2", make_samm), ("samm", make_casme2), ("4dme", make_casme2)])
def test_workbook_of_another_corpus(tmp_path, name, make):
    make(tmp_path)
    message = error_of(name, tmp_path)
    assert ".xlsx: not a workbook of" in message
    assert CORPORA[name].columns.onset in message.split("; expected:")[0]


def test_missing_root_workbook_and_frames(tmp_path):
    assert "nowhere: does not exist" in error_of("casme2", tmp_path / "nowhere")
    assert "no annotation workbook" in error_of("casme2", tmp_path)
    (tmp_path / "coding.xls").touch()
    assert "coding.xls: the old .xls format" in error_of("casme2", tmp_path)
    (tmp_path / "coding.xlsx").write_text("no zip")
    assert "coding.xlsx: cannot be read" in error_of("casme2", tmp_path)
    write_book(tmp_path / "coding.xlsx", [CASME2_HEADER, *CASME2_ROWS])
    assert "no frames of CASME II found; expected: a folder named CASME2_RAW_selected" in error_of("casme2", tmp_path)


def test_unknown_corpus_names_the_nearest(tmp_path):
    assert "did you mean casme2?" in error_of("casme22", tmp_path)


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        (
            casme2_row(3, "EP09_01", 5, 8, 11, "banana"),
            ["row 6", "sub03/EP09_01", "Action Units", "'banana'", "allowed"],
        ),
        (casme2_row(3, "EP09_01", 50, 45, 40, 4), ["row 6", "sub03/EP09_01", "OnsetFrame 50 > OffsetFrame 40"]),
        (casme2_row(3, "EP09_01", "ten", 45, 40, 4), ["row 6", "OnsetFrame", "'ten'"]),
        (casme2_row(3, "EP09_01", 5, 8, None, 4), ["row 6", "OffsetFrame", "empty"]),
        (casme2_row("x7", "EP09_01", 5, 8, 11, 4), ["row 6", "Subject", "'x7'"]),
        (casme2_row(3, "../EP09", 5, 8, 11, 4), ["row 6", "Filename", "'../EP09'"]),
        (casme2_row(1, "EP02_01f", 46, 59, 86, 4), ["row 6", "sub01/EP02_01f", "has a row already"]),
    ],
    ids=["au", "order", "number", "empty", "subject", "path", "twice"],
)
def test_bad_rows_stop_or_are_skipped_by_name(tmp_path, row, parts):
    root = make_casme2(tmp_path)
    write_book(root / "CASME2-coding-20190701.xlsx", [CASME2_HEADER, *CASME2_ROWS, row])
    message = error_of("casme2", root)
    assert "CASME2-coding-20190701.xlsx" in message
    assert [part for part in parts if part not in message] == []
    index = read_corpus("casme2", root, bad_rows="skip")
    assert len(index.records) == len(CASME2_ROWS)
    assert any(parts[-1] in text for text in notes_of(index, "skipped"))


def test_extra_and_unnamed_columns_and_blank_rows_do_no_harm(tmp_path):
    root = make_casme2(tmp_path)
    rows = [[None, *row, "remark"] for row in CASME2_ROWS]
    header = ["Unnamed: 0", *(name or "Unnamed" for name in CASME2_HEADER), "shade"]
    write_book(root / "CASME2-coding-20190701.xlsx", [header, rows[0], [], *rows[1:]])
    index = read_corpus("casme2", root)
    assert len(index.records) == 4
    assert index.table.rows[1].number == 4


def test_the_later_of_two_releases_of_a_sheet_is_read(tmp_path):
    root = make_casme2(tmp_path)
    write_book(root / "CASME2-coding-20140508.xlsx", [CASME2_HEADER, CASME2_ROWS[0]])
    index = read_corpus("casme2", root)
    assert index.table.file.name == "CASME2-coding-20190701.xlsx"
    assert any("20140508" in text for text in notes_of(index, "noted"))


def test_published_positives_sum_to_the_published_totals():
    assert {name: sum(spec.published_aus.values()) for name, spec in CORPORA.items()} == {
        "casme2": 363,
        "samm": 168,
        "4dme": 401,
    }
