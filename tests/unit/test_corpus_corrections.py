"""Published corrections: by row number where the sheet and the defect fit, and by clip from a file of one's own."""

import json
from types import SimpleNamespace

import pytest
from corpus_fixtures import (
    CASME2_HEADER,
    CASME3A_HEADER,
    CASME_HEADER,
    MMEW_HEADER,
    SAMM_HEADER,
    casme2_row,
    casme3a_row,
    casme_row,
    fourdme_row,
    make_casme2,
    make_fourdme,
    make_samm,
    mmew_row,
    samm_row,
    write_book,
    write_frames,
)

from aullm_dist.data.corpora import read_corpus
from aullm_dist.data.corpora.errata import _inside, _ordered, _shows, freeze
from aullm_dist.errors import UserError


def notes_of(index, kind):
    return [str(note) for note in index.notes if note.kind == kind]


def casme2_long(defects, length=256):
    """A sheet of the length that the published corrections were made for; `defects` replaces rows by index."""
    rows = [
        defects.get(row, casme2_row(row // 11 + 1, f"EP{row:02d}_01", 20 + row, 30 + row, 60 + row, "4+7"))
        for row in range(length)
    ]
    if length == 256:
        rows[222] = casme2_row(24, "EP02_07", 100, 120, 200, 4)
    return rows


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


@pytest.mark.parametrize("length", [255, 257, 64])
def test_corrections_are_not_applied_to_another_version_of_the_sheet(tmp_path, length):
    defects = {29: casme2_row(4, "EP29_01", 250, "/", 300, 4)}
    rows = casme2_long(defects, length)
    if length == 255:  # the right number of rows for the sheet without the extra clip, but it is there
        rows[100] = casme2_row(24, "EP02_07", 100, 120, 200, 4)
    write_book(tmp_path / "coding.xlsx", [CASME2_HEADER, *rows])
    (tmp_path / "CASME2_RAW_selected").mkdir()
    index = read_corpus("casme2", tmp_path)
    assert index.records[29].apex == 275
    assert any("published corrections not applied" in text for text in notes_of(index, "unmatched"))
    assert index.corrections == ()


@pytest.mark.parametrize(("has_extra", "corrected"), [(True, 237), (False, 236)])
def test_casme2_corrections_move_up_in_the_sheet_without_the_extra_clip(tmp_path, has_extra, corrected):
    rows = [casme2_row(row // 10 + 1, f"EP{row:03d}_01", 100, 120, 200, 4) for row in range(255 + has_extra)]
    if has_extra:
        rows[222] = casme2_row(24, "EP02_07", 100, 120, 200, 4)
    rows[corrected][4] = "/"
    write_book(tmp_path / "coding.xlsx", [CASME2_HEADER, *rows])
    (tmp_path / "CASME2_RAW_selected").mkdir()
    assert read_corpus("casme2", tmp_path).records[corrected].apex == 153


def test_samm_corrections(tmp_path):
    rows = [samm_row("006", f"006_1_{row}", 1000, 1010, 1020, "4") for row in range(159)]
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
    assert any("41" in str(item.row - 15) and item.state == "does not fit" for item in index.corrections)
    assert index.records[56].offset == 5739  # frame 5793 is not on disk, 5739 is
    assert index.records[125].apex == 1105
    assert index.records[132].apex == (900 + 1120) // 2
    unmatched = {text.split("(row ")[1].split(")")[0] for text in notes_of(index, "unmatched") if "(row " in text}
    assert unmatched == {str(row + 15) for row in (41, 64, 132, 133, 154)}
    assert any(
        "R12 + R15: the published correction is in the sheet already" in text for text in notes_of(index, "noted")
    )


def fourdme_long(first, second):
    rows = [fourdme_row("S1", f"clip_{row}", 10, 12, 20, "Positive", "AU12", {12}) for row in range(267)]
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
    assert not [text for text in notes_of(index, "noted") if "columns mark" in text]


def test_casme_corrections(tmp_path):
    rows = [casme_row(row // 10 + 1, f"EP{row:03d}", 200, 210, 220, 4) for row in range(189)]
    rows[40] = casme_row(5, "EP040", 108, 99, 60, 4)  # offset before onset, apex before both
    rows[43] = casme_row(5, "EP043", 57, 90, 74, 4)  # apex outside the interval
    rows[54] = casme_row(6, "EP054", 20, 30, 10, 4)  # offset before onset
    rows[140] = casme_row(15, "EP140", 100, 120, 150, 4)  # offset 150 is not on disk, 142 is
    write_book(tmp_path / "casme.xlsx", [CASME_HEADER, *rows])
    write_frames(tmp_path / "CASME_raw_selected" / "sub15" / "EP140", "EP140-{}.jpg", range(100, 143))
    index = read_corpus("casme", tmp_path)
    triple = {row: (r.onset, r.apex, r.offset) for row, r in enumerate(index.records)}
    assert triple[40] == (100, 120, 149)
    assert triple[43] == (57, 65, 74)
    assert (triple[54], triple[140]) == ((20, 30, 40), (100, 120, 142))
    assert triple[42] == (200, 210, 220)  # shows no defect: kept
    states = {(item.clip[-3:], item.column): item.state for item in index.corrections}
    assert states["042", "onset"] == states["042", "apex"] == "does not fit"
    assert states["043", "onset"] == "already there"


def test_mmew_corrections(tmp_path):
    rows = [mmew_row(f"S{row // 9 + 1:02d}-01-{row:03d}", 1, 30, 60, 4, "fear") for row in range(300)]
    rows[33][3:5] = [75, 40]  # apex and offset exchanged: 40 and 75
    rows[35][3:5] = ["/", 54]  # no apex: 15
    write_book(tmp_path / "MMEW_Micro_Exp.xlsx", [MMEW_HEADER, *rows])
    (tmp_path / "Micro_Expression").mkdir()
    index = read_corpus("mmew", tmp_path)
    assert (index.records[33].apex, index.records[33].offset) == (40, 75)
    assert (index.records[35].apex, index.records[35].offset) == (15, 54)
    assert (index.records[36].apex, index.records[36].offset) == (30, 60)


def test_casme3a_corrections(tmp_path):
    rows = [casme3a_row(f"spNO.{row}", "a", 10, 20, 30, 4) for row in range(860)]
    rows[128][2:5] = [100, 90, 140]  # apex before onset: 123
    rows[749][2:5] = [2700, 2650, 2660]  # onset after offset: 2647
    rows[750][2:5] = [0, 0, 20]  # frame 0 is not on disk, frame 1 is
    rows[796][2:5] = [1800, 1810, 184]  # offset before onset: 1845
    write_book(tmp_path / "labels.xlsx", [CASME3A_HEADER, *rows], sheet="label")
    write_frames(tmp_path / "Part_A_ME_clip" / "frame" / "spNO.750_a_0", "{}.jpg", range(1, 21))
    index = read_corpus("casme3a", tmp_path)
    triple = {row: (r.onset, r.apex, r.offset) for row, r in enumerate(index.records)}
    assert (triple[128], triple[749]) == ((100, 123, 140), (2647, 2650, 2660))
    assert (triple[750], triple[796]) == ((1, 1, 20), (1800, 1810, 1845))
    assert triple[708] == (10, 20, 30)


def test_frozen_corrections_follow_their_clips_to_another_sheet(tmp_path):
    defects = {
        29: casme2_row(4, "EP29_01", 250, "/", 300, 4),
        60: casme2_row(7, "EP60_01", 60, "/", 9, 4),
    }
    rows = casme2_long(defects)
    write_book(tmp_path / "coding.xlsx", [CASME2_HEADER, *rows])
    (tmp_path / "CASME2_RAW_selected").mkdir()
    frozen = tmp_path / "frozen.json"
    assert freeze(read_corpus("casme2", tmp_path), frozen) == 3
    corrections = json.loads(frozen.read_text())["corrections"]
    kept = [(item["clip"], item["column"], item["found"], item["value"]) for item in corrections]
    assert ("sub07/EP60_01", "offset", 9, 91) in kept
    assert ("sub07/EP60_01", "apex", None, 78) in kept
    # Rows shifted, and one of the clips was corrected by its makers meanwhile: row numbers would be of no use.
    fewer = [row for row in rows[10:] if row[1] != "EP60_01"] + [casme2_row(7, "EP60_01", 60, 70, 95, 4)]
    write_book(tmp_path / "coding.xlsx", [CASME2_HEADER, *fewer])
    index = read_corpus("casme2", tmp_path, errata=frozen)
    by_clip = {record.sample_id.rsplit("/")[-1]: record for record in index.records}
    assert by_clip["EP29_01"].apex == 279
    assert (by_clip["EP60_01"].apex, by_clip["EP60_01"].offset) == (70, 95)
    assert sum("frozen correction" in text for text in notes_of(index, "unmatched")) == 2


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("{", "not valid JSON"),
        ("[]", "holds list"),
        ("{}", "key corrections is missing"),
        ('{"corpus": "samm", "corrections": []}', "corrections of corpus 'samm'"),
        ('{"corpus": "casme2", "corrections": [{"clip": "a", "column": "fps"}]}', "corrections[0]"),
        (
            '{"corpus": "casme2", "corrections": [{"clip": "a", "column": "apex", "found": 1, "value": "x"}]}',
            "value 'x'; allowed: a frame number",
        ),
    ],
)
def test_a_bad_file_of_corrections_is_refused(tmp_path, content, part):
    root = make_casme2(tmp_path)
    (root / "frozen.json").write_text(content)
    with pytest.raises(UserError) as caught:
        read_corpus("casme2", root, errata=root / "frozen.json")
    assert part in str(caught.value)


@pytest.mark.parametrize(
    ("column", "row", "wanted", "shows"),
    [
        ("offset", (20, 30, None), {"offset": 40}, True),
        ("offset", (20, 30, 19), {"offset": 40}, True),  # before onset
        ("offset", (20, 30, 29), {"offset": 40}, True),  # before the apex
        ("offset", (20, 30, 30), {"offset": 40}, False),
        ("offset", (20, None, 30), {"offset": 40}, False),
        ("offset", (20, None, 30), {"offset": 40, "apex": 31}, True),  # the published apex where the row has none
        ("offset", (20, 25, 30), {"offset": 40, "apex": 31}, False),  # and not where it has one
        ("offset", (20, 30, 50), {"offset": 40, "apex": 30}, True),  # the row that the offset was published for
        ("offset", (20, 30, 40), {"offset": 40, "apex": 30}, False),
        ("offset", (20, 31, 50), {"offset": 40, "apex": 30}, False),
        ("offset", (20, None, 50), {"offset": 40}, False),
        ("onset", (31, 30, 40), {"onset": 20}, True),
        ("onset", (30, 30, 30), {"onset": 20}, False),
        ("onset", (35, None, 30), {"onset": 20}, True),
        ("onset", (25, None, None), {"onset": 20, "apex": 24}, True),
        ("onset", (25, None, None), {"onset": 20}, False),
        ("offset", (20, 30, 61), {"offset": 40}, True),  # not on disk, and the corrected one is
        ("offset", (20, 30, 61), {"offset": 62}, False),
        ("offset", (20, 30, 60), {"offset": 40}, False),
    ],
)
def test_the_defect_that_a_correction_of_a_frame_is_for(column, row, wanted, shows):
    clip = SimpleNamespace(**dict(zip(("onset", "apex", "offset"), row, strict=True)))
    on_disk = dict.fromkeys(range(15, 61), "a frame")
    assert _shows(clip, column, wanted, on_disk) is shows


@pytest.mark.parametrize(
    ("sheet", "wanted", "shows"),
    [
        ("4 or 7", "4", True),
        ("4 or 7", "4+7", True),
        ("4 or 7", "12", False),
        ("4", "4", False),
        ("4 or 7", "?", False),
    ],
)
def test_aus_are_corrected_where_the_sheet_leaves_a_choice(sheet, wanted, shows):
    assert _shows(SimpleNamespace(aus=sheet), "aus", {"aus": wanted}, {}) is shows


def test_the_order_of_a_corrected_row():
    assert _ordered(10, 20, 30, apex_corrected=True)
    assert _ordered(10, 10, 10, apex_corrected=True)
    assert not _ordered(10, 9, 30, apex_corrected=True)
    assert not _ordered(10, 31, 30, apex_corrected=True)
    assert _ordered(10, 9, 30, apex_corrected=False)
    assert not _ordered(31, 31, 30, apex_corrected=False)
    assert not _ordered(None, 20, 30, apex_corrected=False)
    assert not _ordered(10, 20, None, apex_corrected=False)
    inside = [(None, 1, 2), (1, 1, 1), (0, 1, 2), (3, 1, 2), (0, None, 2), (3, 1, None), (3, None, 2)]
    assert [_inside(*row) for row in inside] == [False, True, False, False, True, True, False]
