import csv

import pytest
from corpus_fixtures import (
    CASME2_HEADER,
    CASME2_ROWS,
    CASME3A_HEADER,
    CASME3A_ROWS,
    MAKERS,
    MMEW_HEADER,
    MMEW_ROWS,
    casme2_row,
    make_casme,
    make_casme2,
    make_casme3a,
    make_casme3a_videos,
    make_casme3c,
    make_fourdme,
    make_mmew,
    make_samm,
    write_book,
    write_frames,
)

from aullm_dist.data.corpora import CORPORA, base, read_corpus
from aullm_dist.data.corpora.layout import find_frames_root
from aullm_dist.data.listing import list_frames
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
    for name in ("reg_img10.jpg", "reg_img9.JPG", "reg_img0100.jpeg", "Thumbs.db", "._reg_img9.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert list(list_frames(tmp_path)) == [9, 10, 100]
    (tmp_path / "reg_img010.jpg").touch()
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


@pytest.mark.parametrize(
    ("corpus", "aus", "fps", "corrections", "counts", "drawn"),
    [
        ("casme", (1, 4, 9, 14), 60.0, (5, 146083), (189, 1622), ((90, 160), (16, 28), (20, 900))),
        ("casme2", (1, 2, 4, 7, 12, 14, 15, 17), 200.0, (21, 726229), (256, 2679), ((136, 112), (50, 84), (900, 960))),
        ("samm", (2, 4, 7, 12), 200.0, (9, 3950039), (159, 1309), ((130, 192), (56, 92), (900, 6000))),
        ("4dme", (1, 2, 4, 6, 7, 12, 17, 45), 60.0, (2, 158076), (267, 2373), ((96, 128), (16, 27), (20, 120))),
        ("mmew", (1, 2, 4, 5, 7, 10, 12, 14), 90.0, (16, 432472), (300, 2718), ((116, 116), (30, 50), None)),
        (
            "casme3a",
            (1, 2, 4, 5, 7, 9, 10, 12, 14, 17),
            30.0,
            (6, 12262941),
            (860, 5824),
            ((90, 160), (8, 18), (1, 900)),
        ),
        ("casme3c", (1, 2, 4, 5, 7, 9, 10, 12, 14, 17), None, (0, 0), (0, 0), ((90, 160), (8, 18), (1, 900))),
    ],
)
def test_tables_of_a_corpus_are_those_that_were_transcribed(corpus, aus, fps, corrections, counts, drawn):
    """Weighted sums: a number that changes by a slip of the hand changes one of them."""
    spec = CORPORA[corpus]
    assert (spec.aus, spec.fps) == (aus, fps)
    assert spec.drops_frames == corpus.startswith("casme3"), "their clips lack frames, and are whole"
    frames = ("onset", "apex", "offset", "length")
    weighted = sum(
        (erratum.row + 1) * sum(place * (getattr(erratum, name) or 0) for place, name in enumerate(frames, 1))
        for erratum in spec.errata
    )
    assert (len(spec.errata), weighted) == corrections
    assert (spec.published_clips, sum(au * count for au, count in spec.published_aus.items())) == counts
    assert (spec.synthetic.frame_size, spec.synthetic.clip_lengths, spec.synthetic.first_numbers) == drawn


@pytest.mark.parametrize(("below", "found"), [("a/b/c", True), ("a/b/c/d", False)])
def test_frames_lie_three_folders_below_the_root_at_most(tmp_path, below, found):
    frames = tmp_path / below
    (frames / "sub01").mkdir(parents=True)
    arguments = (tmp_path, ["CASME2_RAW_selected"], ["sub01"], "CASME II")
    notes = []
    if found:
        assert find_frames_root(*arguments, notes_to=lambda *note: notes.append(note)) == frames
        assert notes == []
    else:
        with pytest.raises(UserError, match="no frames of CASME II found"):
            find_frames_root(*arguments, notes_to=lambda *note: notes.append(note))


def test_of_several_folders_of_frames_the_first_name_wins_and_the_nearest(tmp_path):
    for name in ("second", "deep/first", "other"):
        (tmp_path / name / "sub01").mkdir(parents=True)
    notes = []
    chosen = find_frames_root(
        tmp_path, ["first", "second"], ["sub01"], "X", notes_to=lambda where, what: notes.append((where, what))
    )
    assert chosen == tmp_path / "deep" / "first"
    assert [where for where, _ in notes] == [str(tmp_path / "second")]
    assert find_frames_root(
        tmp_path / "deep", ["first"], ["nobody"], "X", notes_to=lambda *note: None
    ) == tmp_path / "deep" / "first"  # fmt: skip


def test_three_names_are_listed_and_the_rest_is_not():
    assert [base._some("abcd"[:n]) for n in (1, 3, 4)] == ["a", "a, b, c", "a, b, c, ..."]


@pytest.mark.parametrize(
    ("corpus", "number", "by_au", "total"),
    [
        ("casme", 19, 2137, 189),
        ("casme2", 33, 4163, 252),
        ("samm", 26, 2686, 159),
        ("4dme", 28, 6185, 266),
        ("mmew", 26, 3809, 310),
        ("casme3a", 23, 9383, 860),
        ("casme3c", 23, 9383, 860),
    ],
)
def test_combinations_that_are_drawn_are_those_that_were_aimed_at(corpus, number, by_au, total):
    """Weighted sums, as above."""
    weights = CORPORA[corpus].synthetic.combinations
    assert (len(weights), pytest.approx(sum(weights.values()))) == (number, total)
    places = {aus: sum(place * au for place, au in enumerate(sorted(aus), 1)) for aus in weights}
    assert sum(weight * places[aus] for aus, weight in weights.items()) == pytest.approx(by_au)
