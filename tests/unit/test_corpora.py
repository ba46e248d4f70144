import csv
import json

import pytest
from corpus_fixtures import (
    CASME2_HEADER,
    CASME2_ROWS,
    CASME3A_HEADER,
    CASME3A_ROWS,
    CASME_HEADER,
    MAKERS,
    MMEW_HEADER,
    MMEW_ROWS,
    SAMM_HEADER,
    casme2_row,
    casme3a_row,
    casme_row,
    fourdme_row,
    make_casme,
    make_casme2,
    make_casme3a,
    make_casme3a_videos,
    make_casme3c,
    make_fourdme,
    make_mmew,
    make_samm,
    mmew_row,
    samm_row,
    write_book,
    write_frames,
)

from aullm_dist.data.corpora import CORPORA, read_corpus
from aullm_dist.data.corpora.errata import freeze
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
    assert any(
        "21 published corrections not applied: they were made for a sheet of 256 or 255 rows, this one has 4" in text
        for text in notes_of(index, "unmatched")
    )


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


def test_fourdme(tmp_path):
    index = read_corpus("4dme", make_fourdme(tmp_path))
    first, second, third = index.records
    assert (first.sample_id, first.subject) == ("4dme/S1/S1_1st_001_01_1", "4dme/S1")
    assert (first.aus, first.emotion, first.fps) == ((4, 7), "negative+repression", 60.0)
    assert (second.aus, second.emotion) == ((2, 45), "positive+surprise")
    assert (second.onset, second.apex, second.offset) == (95, 99, 103)
    assert third.aus == (1, 2)
    assert any("AU1, AU4" in text and "AU1, AU2" in text for text in notes_of(index, "noted"))
    # Static AU12 may be marked in its column or not; that it counts as no positive is told.
    (told,) = [text for text in notes_of(index, "noted") if "S1_1st_001_01_2" in text]
    assert "AU12 marked (k), held and not moving: no positive" in told
    assert any("4dme/S13/S13_1st_001_01_1: clip folder without a row" in text for text in notes_of(index, "skipped"))


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


def test_casme(tmp_path):
    index = read_corpus("casme", make_casme(tmp_path))
    first, second = index.records
    assert (first.sample_id, first.subject, first.fps) == ("casme/sub01/EP01_5", "casme/sub01", 60.0)
    assert (first.onset, first.apex, first.offset) == (98, 100, 103)  # the first of two apex columns
    assert (first.aus, first.emotion) == ((4, 9), "contempt")
    assert (second.aus, second.emotion) == ((14,), "repression")
    assert list(list_frames(first.folder)) == list(range(98, 104))
    assert list(list_frames(second.folder)) == [9, 10, 11, 12]
    assert any("columns not read: ApexF2" in text for text in notes_of(index, "noted"))


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


def test_mmew(tmp_path):
    index = read_corpus("mmew", make_mmew(tmp_path))
    first, second, third = index.records
    assert (first.sample_id, first.subject, first.fps) == ("mmew/S01/S01-07-001", "mmew/S01", 90.0)
    assert (second.aus, second.emotion) == ((4, 14), "others")
    assert second.folder == tmp_path / "Micro_Expression" / "repression" / "S02-06-003"
    assert third.folder == tmp_path / "Micro_Expression" / "others" / "S02-06-004"
    assert third.aus == ()
    assert index.frames_root == tmp_path / "Micro_Expression"
    assert not [text for text in notes_of(index, "noted") if "Macro" in text]


def test_mmew_as_its_makers_describe_it(tmp_path):
    """dpailab.com: `S03/happiness/S03-01-002/1.jpg`."""
    make_mmew(tmp_path)
    for clip in list((tmp_path / "Micro_Expression").glob("*/*")):
        target = tmp_path / "Micro_Expression" / clip.name[:3] / clip.parent.name
        target.mkdir(parents=True, exist_ok=True)
        clip.rename(target / clip.name)
    index = read_corpus("mmew", tmp_path)
    assert [record.folder.relative_to(tmp_path).as_posix() for record in index.records] == [
        "Micro_Expression/S01/happiness/S01-07-001",
        "Micro_Expression/S02/repression/S02-06-003",
        "Micro_Expression/S02/others/S02-06-004",
    ]


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


@pytest.mark.parametrize("make", [make_casme3a, make_casme3a_videos], ids=["clips", "videos"])
def test_casme3a(tmp_path, make):
    index = read_corpus("casme3a", make(tmp_path))
    assert [record.sample_id for record in index.records] == [
        f"casme3a/{name}" for name in ("spNO.1/a_8", "spNO.10/a_116", "spNO.10/b_9", "spNO.10/b_98", "spNO.2/c_5")
    ]
    first, second, third, fourth, fifth = index.records
    assert (first.subject, first.fps, first.aus, first.emotion) == ("casme3a/spNO.1", 30.0, (1, 2), "surprise")
    assert (second.emotion, fourth.emotion) == ("others", "others")
    assert (third.aus, fourth.aus) == ((4, 14), (14,))
    assert "depth" not in str(first.folder)
    assert set(range(third.onset, third.offset + 1)) <= set(list_frames(third.folder))
    assert 6 not in list_frames(fifth.folder)
    (twice,) = notes_of(index, "skipped")
    assert "casme3a/spNO.2/c_5 (row 7): the row repeats an earlier one word for word" in twice
    case = [text for text in notes_of(index, "noted") if "another case" in text]
    assert len(case) == (1 if make is make_casme3a else 0)


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


def test_casme3a_of_a_sheet_with_macro_expressions_too(tmp_path):
    root = make_casme3a(tmp_path)
    rows = [["Micro-expression", *row] for row in CASME3A_ROWS[:3]] + [["Macro-expression", *CASME3A_ROWS[3]]]
    write_book(root / "zz_all.xlsx", [["Expression type", *CASME3A_HEADER], *rows])
    assert read_corpus("casme3a", root).table.file.name.startswith("cas(me)3")
    next(root.glob("cas(me)3*")).unlink()
    index = read_corpus("casme3a", root)
    assert [record.sample_id for record in index.records][-1] == "casme3a/spNO.10/b_9"
    assert any("1 rows left out" in text for text in notes_of(index, "noted"))


def test_casme3c(tmp_path):
    index = read_corpus("casme3c", make_casme3c(tmp_path))
    first, second, third = index.records
    assert (first.sample_id, first.subject, first.fps) == ("casme3c/01/1_8", "casme3c/01", None)
    assert (first.aus, second.aus, third.aus) == ((4, 7), (12,), (1, 2))
    assert (first.apex, second.apex, third.apex) == (10, 99, 6)
    assert any("casme3c/12/1_3 (row 4)" in text and "full-width" in text for text in notes_of(index, "noted"))


def test_a_sheet_with_the_same_columns_is_told_by_the_names_of_its_clips(tmp_path):
    make_mmew(tmp_path / "MMEW")
    make_casme2(tmp_path / "CASME2")
    for name, file in (("mmew", "MMEW_Micro_Exp.xlsx"), ("casme2", "CASME2-coding-20190701.xlsx")):
        index = read_corpus(name, tmp_path)
        assert index.table.file.name == file
        assert all(record.folder for record in index.records)


def test_a_sheet_exported_as_text(tmp_path):
    root = make_mmew(tmp_path)
    (root / "MMEW_Micro_Exp.xlsx").unlink()
    with open(root / "MMEW_Micro_Exp.csv", "w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows([MMEW_HEADER, *MMEW_ROWS])
    index = read_corpus("mmew", root)
    assert [record.aus for record in index.records] == [(12,), (4, 14), ()]
    (root / "MMEW_Micro_Exp.csv").write_bytes("Subject,Filename,\xff\xfe".encode("latin-1"))
    assert "MMEW_Micro_Exp.csv: cannot be read as a .csv file in UTF-8" in error_of("mmew", root)


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
        ("{", "cannot be read as corrections"),
        ("[]", "key corrections is missing"),
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


@pytest.mark.parametrize("name", sorted(CORPORA))
@pytest.mark.parametrize("where", [".", "..", "frames"])
def test_root_may_be_above_or_the_frames_themselves(tmp_path, name, where):
    release = MAKERS[name](tmp_path / "corpora" / "release")
    frames = {
        "casme": "CASME_raw_selected", "casme2": "CASME2_RAW_selected", "samm": "SAMM", "4dme": "gray_micro",
        "mmew": "Micro_Expression", "casme3a": "Part_A_ME_clip", "casme3c": "part_C",
    }[name]  # fmt: skip
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
        "casme": 217,
        "casme2": 363,
        "samm": 168,
        "4dme": 401,
        "mmew": 444,
        "casme3a": 928,
        "casme3c": 0,
    }
