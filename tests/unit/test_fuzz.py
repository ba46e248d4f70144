# ruff: noqa: PT017 - whether an input is refused is what is explored here; what a refusal says is checked where it is.
"""Damaged cells, workbooks and clip trees: never a traceback, never a guessed label, every refusal says where.

Ten thousand AU cells and some hundreds of releases are generated anew at each change of this file, and the same ones
otherwise.
"""

import os
import random
import re
import shutil
import string
import tempfile
import unicodedata
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from corpus_fixtures import CASME2_ROWS, MAKERS
from hypothesis import given, settings
from hypothesis import strategies as st
from openpyxl import Workbook, load_workbook

from aullm_dist.data.annotations import Annotation, AnnotationError, parse_aus
from aullm_dist.data.corpora import CORPORA, read_corpus
from aullm_dist.data.preparation.matching import plan_clips
from aullm_dist.data.preparation.shards import ShardTask, run_shard
from aullm_dist.data.sheets import cell_text
from aullm_dist.errors import UserError

SEEDS = st.integers(0, 2**32 - 1)
PROFILE = {"derandomize": True, "database": None, "deadline": None}
CELLS_PER_EXAMPLE = 100

PIECES = [
    "4", "12", "1", "07", "45", "R12", "L14", "AU4", "A1B", "12C", "14?", "12(k)", "( K )", "?", "+", "+", " + ", ",",
    ";", "&", "|", " ", "/", "-", "or", " or ", "A", "AU", "\uff0b", "\uff0c", "\u3001", "\uff11", "1417",
    "banana", "4.0", ".",
    "\u00b2", "\u0664", "\u00bd", "\u2460", "\u212a", "(k", "0", "00",
    "100", "\n", "\t", "\x00", "\u200b", "e", "1e1", "'", "=4+7",
]  # fmt: skip


def digit_runs(cell: object) -> list[int]:
    """Every number a reader sees in a cell, full-width digits included."""
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    text = "".join(unicodedata.normalize("NFKC", c) if "\uff10" <= c <= "\uff19" else c for c in str(cell))
    if re.fullmatch(r"\s*[0-9]{1,2}\.0+\s*", text):
        text = text.split(".")[0]
    return [int(run) for run in re.findall(r"[0-9]+", text)]


def assert_read_or_refused(cell: object, *, whole: bool = True) -> None:
    """A label is the numbers of its cell, no more and no fewer, or there is none and one line that shows the cell."""
    try:
        annotation = parse_aus(cell)
    except AnnotationError as error:
        assert "\n" not in str(error)
        assert "allowed" in str(error)
        assert repr(cell)[:20] in str(error)
        return
    assert isinstance(annotation, Annotation)
    numbers = {unit.number for unit in annotation.units}
    seen = [] if cell is None or cell != cell else digit_runs(cell)
    assert annotation.active <= numbers <= set(seen), (cell, numbers)
    assert all(0 < number < 100 for number in numbers)
    if "or" not in str(cell).lower() and whole:
        assert numbers == set(seen), (cell, numbers)


@settings(max_examples=200, **PROFILE)
@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=12),  # the default, but found in no time
        st.text(alphabet="0123456789LRAUBkor+,?() /-.", max_size=14),
        st.floats(),
        st.integers(-200, 2000),
        st.booleans(),
        st.none(),
        st.dates(),
        st.binary(max_size=3),
    )
)
def test_any_cell_is_read_or_refused(cell):
    assert_read_or_refused(cell)


@settings(max_examples=100, **PROFILE)
@given(SEEDS)
def test_ten_thousand_cells_like_those_of_annotators(seed):
    rng = random.Random(seed)
    for _ in range(CELLS_PER_EXAMPLE):
        cell = "".join(rng.choices(PIECES, k=rng.randint(1, 6)))
        if rng.random() < 0.2:
            cut = rng.randrange(len(cell))
            cell = cell[:cut] + rng.choice(string.printable) + cell[cut + 1 :]
        assert_read_or_refused(cell)


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    # Clips of few frames: every example links a whole tree.
    rows = {"casme2": CASME2_ROWS[1:]}
    return {name: make(tmp_path_factory.mktemp(name), rows.get(name)) for name, make in MAKERS.items()}


def sheet_of(root: Path) -> Path:
    return min(root.glob("*.xlsx"), key=lambda path: "extras" in path.name)


@pytest.fixture(scope="module")
def tables(releases):
    found = {}
    for name, root in releases.items():
        book = load_workbook(sheet_of(root))
        found[name] = [list(row) for row in book.active.iter_rows(values_only=True)]
    return found


@pytest.fixture(scope="module")
def true_labels(releases):
    return {
        name: {reading.row: reading.ours for reading in read_corpus(name, root).readings}
        for name, root in releases.items()
    }


def assert_index_or_refusal(name: str, root: Path, part: str) -> None:
    """Reading gives labels that stand in their cells, or one line that names the file."""
    for mode in ("skip", "stop"):
        try:
            index = read_corpus(name, root, bad_rows=mode)
        except UserError as error:
            assert "\n" not in str(error)
            assert part in str(error) or str(root) in str(error)
            continue
        for reading in index.readings:
            if reading.ours is not None:
                seen = digit_runs(cell_text(reading.cell))
                assert reading.ours <= set(seen)
        for note in index.notes:
            assert "\n" not in str(note)


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut the file, flip bytes, or damage the text of one of its parts and pack it again."""
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        changed = bytearray(data)
        for _ in range(rng.randint(1, 30)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        return bytes(changed)
    packed = BytesIO()
    with zipfile.ZipFile(BytesIO(data)) as source, zipfile.ZipFile(packed, "w") as target:
        names = source.namelist()
        victim = rng.choice([name for name in names if name.endswith(".xml")])
        for name in names:
            text = bytearray(source.read(name))
            if name == victim:
                if kind == 2:
                    for _ in range(rng.randint(1, 8)):
                        text[rng.randrange(len(text))] = rng.choice(b'<>/"=&;019aZ \x00')
                elif rng.random() < 0.5:
                    continue
                else:
                    start = rng.randrange(len(text))
                    del text[start : start + rng.randint(1, 200)]
            target.writestr(name, bytes(text))
    return packed.getvalue()


@settings(max_examples=150, **PROFILE)
@given(SEEDS)
def test_damaged_workbooks_are_read_or_refused(releases, seed):
    rng = random.Random(seed)
    name = rng.choice(sorted(releases))
    original = sheet_of(releases[name])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        frames = next(path for path in releases[name].iterdir() if path.is_dir() and "Macro" not in path.name)
        (root / frames.name).symlink_to(frames)
        (root / original.name).write_bytes(damage_bytes(original.read_bytes(), rng))
        assert_index_or_refusal(name, root, original.name)


STRANGE_CELLS = [
    None, "", "/", "-", 0, -1, 1.5, 4.0, True, "banana", "1417", "4\u00b2", "\uff14", "#N/A", "10\n20", "1e3", 10**12,
    float("nan"), "../x", "a/b", ".", "..", "\x00"[:0], "12 or 15", "{subject}",
    "nul", "\u0664", "x" * 300, 99999999999999999999,
]  # fmt: skip


@settings(max_examples=80, **PROFILE)
@given(SEEDS)
def test_a_strange_cell_is_refused_by_file_row_and_column_or_changes_that_clip_alone(
    releases, tables, true_labels, seed
):
    rng = random.Random(seed)
    name = rng.choice(sorted(releases))
    rows = [list(row) for row in tables[name]]
    columns = CORPORA[name].columns
    wanted = [names for names in columns.required() if names not in ((columns.emotion,), columns.emotion)]
    names = rng.choice(wanted)
    top = next(number for number, row in enumerate(rows) if any(cell in names for cell in row))
    column = next(position for position, cell in enumerate(rows[top]) if cell in names)
    number = rng.randrange(top + 1, len(rows))
    rows[number][column] = rng.choice(STRANGE_CELLS)
    before = true_labels[name]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        frames = next(path for path in releases[name].iterdir() if path.is_dir() and "Macro" not in path.name)
        (root / frames.name).symlink_to(frames)
        book = Workbook()
        for row in rows:
            book.active.append(row)
        file = root / sheet_of(releases[name]).name
        book.save(file)
        try:
            read_corpus(name, root)
        except UserError as error:
            message = str(error)
            assert file.name in message
            assert f"row {number + 1}" in message or "has a row already" in message
            assert rows[top][column] in message or "has a row already" in message
        after = {reading.row: reading.ours for reading in read_corpus(name, root, bad_rows="skip").readings}
        changed = {row for row in before if before[row] != after.get(row)}
        # A row that took over another's name makes that other one the second of the two.
        assert changed <= {number + 1} or any(after.get(row, frozenset()) is None for row in changed)


def rewrite(path: Path, content: bytes) -> None:
    """Put new content in place of a file that shares its own with the release it was linked from."""
    path.unlink()
    path.write_bytes(content)


def damage_tree(root: Path, rng: random.Random) -> None:
    """One to four defects in the folders and frames of a release."""
    for _ in range(rng.randint(1, 4)):
        everything = [path for path in root.rglob("*") if path.suffix != ".xlsx"]
        if not everything:
            return
        path = rng.choice(everything)
        kind = rng.randrange(9)
        if kind == 0:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        elif kind == 1 and path.is_file():
            rewrite(path, path.read_bytes()[: rng.randrange(400)])
        elif kind == 2 and path.is_file():
            rewrite(path, rng.randbytes(200))
        elif kind == 3:
            path.rename(path.with_name(path.name.swapcase()))
        elif kind == 4:
            path.with_name(f"0{path.name}").write_bytes(b"")
        elif kind == 5 and path.is_file():
            path.unlink()
            path.mkdir()
        elif kind == 6 and path.is_dir():
            shutil.rmtree(path)
            path.write_bytes(b"a file")
        elif kind == 7:
            path.with_name("loop").symlink_to(path.parent, target_is_directory=True)
            return
        elif kind == 8:
            path.with_name(f"{path.stem}\u00b2 x.jpg").write_bytes(b"")


@settings(max_examples=120, **PROFILE)
@given(SEEDS)
def test_damaged_clip_trees_are_read_or_refused(releases, seed):
    rng = random.Random(seed)
    name = rng.choice(sorted(releases))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "release"
        shutil.copytree(releases[name], root, copy_function=os.link)
        damage_tree(root, rng)
        mode = rng.choice(["stop", "repair", "skip"])
        try:
            plans, notes = plan_clips(read_corpus(name, root, bad_rows="skip"), mode)
            assert all("\n" not in str(note) for note in notes)
            run_shard(ShardTask(Path(folder), f"shard-{mode}", tuple(plans), 8, "none", "none", mode))
        except UserError as error:
            assert "\n" not in str(error)
            assert str(root) in str(error) or name in str(error)
