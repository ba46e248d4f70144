"""Our label tables against the published rules of the field's harness, and the explanation of every difference."""

import re

import pytest
from corpus_fixtures import MAKERS, SAMM_HEADER, make_casme2, make_samm, samm_row, write_book
from openpyxl import load_workbook

from aullm_dist.cli import main
from aullm_dist.data.annotations import parse_aus
from aullm_dist.data.corpora import CORPORA, get_corpus, read_corpus
from aullm_dist.data.corpora.explain import AuDifference, ClipChange, as_json, explain, harness_aus, render_differences
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.data.preparation.report import render_report
from aullm_dist.data.synthetic import SyntheticSpec, plan_clips

# Column of the AU text, and how a row is called, in the releases as they are.
TEXT = {"casme": "AU", "casme2": "Action Units", "samm": "Action Units", "4dme": "AUs", "mmew": "Action Units",
        "casme3a": "AU", "casme3c": "au"}  # fmt: skip


def sheet_of(corpus, folder, **size):
    """The sheet of a synthetic corpus of about the field's size, without its pictures."""
    spec = SyntheticSpec(corpus=corpus, **{"subjects": 26, "clips_per_subject": 10, **size})
    layout = spec.facts.layout(plan_clips(spec), spec.context_frames)
    rows = [*layout.rows_above, layout.header, *(clip.row for clip in layout.clips)]
    (folder / layout.clips[0].folder.split("/")[0]).mkdir(parents=True)
    return write_book(folder / layout.workbook, rows)


def published_rule(corpus, cell):
    """MEB's rule, written down from its description: split at '+', keep digits, drop what is left empty."""
    text = str(cell)
    if corpus == "casme3c":  # commas; row 16 has a Chinese one
        text = "+".join(re.split("[,\uff0c]", text))
    labels = set()
    for piece in text.split("+"):
        static = corpus == "4dme" and piece.endswith("(k)")
        digits = re.sub(r"\D", "", piece)
        if digits and not static:
            labels.add(int(digits))
    return labels


@pytest.mark.parametrize("corpus", sorted(CORPORA))
def test_label_tables_are_those_of_the_published_rules(corpus, tmp_path):
    rows = list(load_workbook(sheet_of(corpus, tmp_path)).active.iter_rows(values_only=True))
    top = next(number for number, row in enumerate(rows) if TEXT[corpus] in row)
    column = rows[top].index(TEXT[corpus])
    expected = [published_rule(corpus, row[column]) for row in rows[top + 1 :]]
    index = read_corpus(corpus, tmp_path)
    assert [set(record.aus) for record in index.records] == expected
    assert len(expected) == 260
    assert any(len(labels) > 1 for labels in expected)
    counts = {au: sum(au in labels for labels in expected) for au in get_corpus(corpus).published_aus}
    found = explain(get_corpus(corpus), index, [record.sample_id for record in index.records], index.notes)
    assert not [item for item in found if item.changes]
    assert {item.au: item.here for item in found} == {
        au: count for au, count in counts.items() if count != get_corpus(corpus).published_aus[au]
    }


@pytest.mark.parametrize("corpus", sorted(name for name, spec in CORPORA.items() if spec.published_aus))
def test_a_sheet_with_the_published_counts_is_told_so(corpus, tmp_path):
    """Of the published size, each AU in as many clips as published: nothing is lost or added on the way."""
    spec = get_corpus(corpus)
    clips = spec.published_clips
    path = sheet_of(corpus, tmp_path, subjects=30, clips_per_subject=clips // 30 + 1)
    book = load_workbook(path)
    rows = list(book.active.iter_rows())
    top = next(number for number, row in enumerate(rows) if TEXT[corpus] in [cell.value for cell in row])
    column = next(position for position, cell in enumerate(rows[top]) if cell.value == TEXT[corpus])
    labels = [[] for _ in range(clips)]
    for step, (au, count) in enumerate(spec.published_aus.items()):
        for number in range(count):
            labels[(7 * step + number) % clips].append(str(au))
    for row, aus in zip(rows[top + 1 :], labels, strict=False):
        row[column].value = "+".join(aus) or "/"
    book.active.delete_rows(top + 2 + clips, len(rows))
    if spec.errata_extra_clip:
        row, name = spec.errata_extra_clip
        rows[top + 1 + row][0].value, rows[top + 1 + row][1].value = int(name[3:5]), name.split("/")[1]
    book.save(path)
    index = read_corpus(corpus, tmp_path)
    kept = [record.sample_id for record in index.records]
    assert len(kept) == clips
    assert explain(spec, index, kept, index.notes) == []
    assert not [note for note in index.notes if "were made for a sheet" in note.text]
    # The row numbers hold, and no row shows a defect.
    assert bool(index.corrections) == bool(spec.errata)
    assert not [item for item in index.corrections if item.state == "applied"]
    # One clip left out of the dataset is found again under each of its AUs, and under no other.
    without = next(number for number, aus in enumerate(labels) if len(aus) == 2)
    gone = explain(spec, index, kept[:without] + kept[without + 1 :], index.notes)
    assert [str(item.au) for item in gone] == labels[without]
    assert all([change.change for change in item.changes] == [-1] for item in gone)


@pytest.mark.parametrize("corpus", sorted(CORPORA))
def test_hand_written_releases_agree_with_the_published_rules(corpus, tmp_path):
    index = read_corpus(corpus, MAKERS[corpus](tmp_path))
    for reading in index.readings:
        if reading.ours is not None and " or " not in str(reading.cell):
            assert reading.ours == published_rule(corpus, reading.cell) == harness_aus(reading.cell, get_corpus(corpus))


@pytest.mark.parametrize(
    ("cell", "harness", "ours"),
    [("R14A or 17A", {1417}, {14}), ("4,7", {47}, {4, 7}), ("AU4(k)+L7", {4, 7}, {7})],
)
def test_where_this_project_differs_from_the_rule_on_purpose(cell, harness, ours):
    """An alternative and a comma make one number of two there; a static AU is a positive outside of 4DME."""
    assert harness_aus(cell, get_corpus("samm")) == harness
    assert parse_aus(cell).active == ours


def test_the_corrected_cells_of_samm_become_what_the_harness_has(tmp_path):
    rows = [samm_row("006", f"006_1_{row}", 1000, 1010, 1020, "1") for row in range(159)]
    raw = {15: "R12 or R15", 18: "12 or 15", 41: "L14 or 15", 64: "R14 or 17", 154: "R14A or 17A"}
    for row, cell in raw.items():
        rows[row][8] = cell
    root = make_samm(tmp_path, [])
    write_book(root / "SAMM_Micro_FACS_Codes_v2.xlsx", [*([["note"]] * 13), SAMM_HEADER, *rows])
    (root / "SAMM" / "006").mkdir(parents=True)
    index = read_corpus("samm", root)
    labels = {row: set(index.records[row].aus) for row in raw}
    assert labels == {15: {12, 15}, 18: {12, 15}, 41: {14}, 64: {14}, 154: {14}}
    assert all(reading.ours == harness_aus(reading.cell, get_corpus("samm")) for reading in index.readings)


def test_every_clip_behind_a_difference_is_named(tmp_path, capsys):
    """A clip left out, a cell read otherwise and the sheet itself: together they make up each difference."""
    rows = [samm_row("006", f"006_1_{row}", 10, 11, 12, "4") for row in range(3)]
    rows += [samm_row("006", "006_2_1", 10, 11, 12, "banana4"), samm_row("006", "006_2_2", 10, 11, 12, "7 or 9")]
    root = make_samm(tmp_path, rows)
    for frame in (root / "SAMM" / "006" / "006_1_1").iterdir():
        frame.unlink()
    assert main(["prepare", "samm", "--root", str(root), "--explain"]) == 0
    out = capsys.readouterr().out
    assert "SAMM: 3 clips here, 159 published" in out
    assert "AU4: 2 here, 23 published (-21)" in out
    (gone,) = [line for line in out.splitlines() if "006_1_1" in line]
    assert "-1  samm/006/006_1_1 (row 16): left out" in gone
    assert "are missing" in gone
    (banana,) = [line for line in out.splitlines() if "006_2_1" in line]
    assert "-1  samm/006/006_2_1 (row 18): left out" in banana
    assert "by the harness's own rule it has 4 clips" in out
    assert "+1  samm/006/006_2_2 (row 19): cell '7 or 9' is read otherwise" in out
    for block in re.split(r"\n(?=AU)", out)[1:]:
        total = int(re.search(r"published \(([+-]\d+)\)", block)[1])
        assert total == sum(map(int, re.findall(r"^  ([+-]\d+)  ", block, re.MULTILINE)))


def test_the_report_says_that_counts_differ(tmp_path):
    report = prepare("samm", make_samm(tmp_path / "release"), tmp_path / "out", PrepareOptions(size=8, num_workers=1))
    assert report["differences"]["AU4"]["here"] == 1
    assert report["differences"]["AU4"]["in_the_sheet_itself"] == 1 - 23
    text = render_report({**report, "num_clips": 158})
    assert "not as published: AU1, AU2, AU4" in text
    assert "--explain" in text


def test_freezing_needs_no_dataset(tmp_path, capsys):
    root = make_casme2(tmp_path / "release")
    file = tmp_path / "frozen.json"
    assert main(["prepare", "casme2", "--root", str(root), "--freeze-errata", str(file)]) == 0
    assert "0 corrections of this sheet written" in capsys.readouterr().out
    assert main(["prepare", "casme2", "--root", str(root)]) == 2
    assert "--out is missing" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [0, 40, 41])
def test_a_difference_names_forty_clips_and_counts_the_rest(changes):
    spec = get_corpus("casme2")
    clips = tuple(ClipChange(f"casme2/clip{i}", i, -1 if i else 1, "a reason") for i in range(changes))
    difference = AuDifference(au=4, here=12, by_harness=11, published=9, changes=clips)
    first, second, *lines = render_differences(spec, [difference], 200).splitlines()
    assert first == f"{spec.title}: 200 clips here, {spec.published_clips} published"
    assert second == "AU4: 12 here, 9 published (+3)"
    named = [line for line in lines if "a reason" in line]
    assert named[:2] == ["  +1  casme2/clip0 (row 0): a reason", "  -1  casme2/clip1 (row 1): a reason"][:changes]
    assert len(named) == min(changes, 40)
    assert [line for line in lines if "more clips" in line] == ["  ... and 1 more clips"] * (changes > 40)
    assert lines[-1].startswith("  +2  the sheet itself: by the harness's own rule it has 11 clips")
    kept = as_json([difference])["AU4"]
    assert (kept["here"], kept["published"], kept["in_the_sheet_itself"], len(kept["clips"])) == (12, 9, 2, changes)
    assert "as published for every AU" in render_differences(spec, [], 256)
