import argparse
import json
import os
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np
import pytest
from corpus_fixtures import CASME2_HEADER, CASME2_ROWS, casme2_row, make_casme2, make_fourdme, make_samm, write_book
from datasets import List, Value
from PIL import Image

from aullm_dist.commands import prepare as prepare_command
from aullm_dist.data.crops import get_crop
from aullm_dist.data.frames import load_clip
from aullm_dist.data.preparation import prepare as prepare_module
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.data.preparation.report import render_report
from aullm_dist.errors import UserError

TEXT, INTEGER, INTEGERS = Value("string"), Value("int32"), List(Value("int32"))
COLUMNS = {
    "sample_id": TEXT,
    "corpus": TEXT,
    "subject": TEXT,
    "onset": INTEGER,
    "apex": INTEGER,
    "offset": INTEGER,
    "fps": Value("float32"),
    "aus": INTEGERS,
    "emotion": TEXT,
    "num_frames": INTEGER,
    "height": INTEGER,
    "width": INTEGER,
    "frame_numbers": INTEGERS,
    "frames": Value("binary"),
}


def run(root: Path, corpus: str = "casme2", **options):
    progress = options.pop("progress", None)
    chosen = PrepareOptions(**{"size": 16, "num_workers": 1, **options})
    return prepare(corpus, root, root.parent / "out", chosen, progress)


def arrays(row):
    return np.frombuffer(row["frames"], np.uint8).reshape(row["num_frames"], row["height"], row["width"])


@pytest.fixture
def release(tmp_path):
    return make_casme2(tmp_path / "release")


def clip_folder(release: Path, name: str = "sub01/EP02_01f") -> Path:
    return release / "CASME2_RAW_selected" / name


@pytest.mark.parametrize(
    ("corpus", "make", "first"),
    [
        ("casme2", make_casme2, ("casme2/sub01/EP02_01f", [4, 12], range(46, 87))),
        ("samm", make_samm, ("samm/006/006_1_2", [4, 7], range(562, 571))),
        ("4dme", make_fourdme, ("4dme/S1/S1_1st_001_01_1", [4, 7], range(120, 130))),
    ],
)
def test_dataset_has_the_contracted_columns_and_whole_clips(tmp_path, corpus, make, first):
    report = run(make(tmp_path / "release"), corpus)
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    assert dict(dataset.features) == COLUMNS
    assert dataset.column_names == list(COLUMNS)
    row = dataset[0]
    sample_id, aus, numbers = first
    assert (row["sample_id"], row["aus"], row["frame_numbers"]) == (sample_id, aus, list(numbers))
    assert row["subject"] == sample_id.rsplit("/", 1)[0]
    frames = arrays(row)
    assert frames.shape == (len(numbers), 16, 16)
    # The fixture writes the frame's number as its gray level: right frames, in numerical order.
    for frame, number in zip(frames, numbers, strict=True):
        assert np.abs(frame.astype(int) - number % 200).max() <= 2
    assert report["num_clips"] == len(dataset)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["aus"] == report["aus"]
    assert not (tmp_path / "out.partial").exists()


def test_report_counts_and_text(release):
    report = run(release)
    assert report["aus"] == {"1": 1, "2": 1, "4": 2, "12": 1, "14": 1}
    assert report["subjects"] == {"casme2/sub01": 2, "casme2/sub02": 1, "casme2/sub17": 1}
    assert report["workbook"]["file"].endswith("CASME2-coding-20190701.xlsx")
    assert len(report["workbook"]["sha256"]) == 64
    assert report["synthetic"] is False
    text = render_report(report)
    assert "CASME II: 4 clips, 61 frames, 3 subjects" in text
    assert any(line.split() == ["AU4", "Brow", "Lowerer", "2", "50.0%"] for line in text.splitlines())
    assert "casme2/sub01/EP03_02 (row 3): apex missing: set to the middle frame 101" in text
    assert "published" not in next(line for line in text.splitlines() if line.startswith("AU "))


def test_published_counts_stand_beside_a_release_of_the_published_size(release):
    report = run(release)
    shown = render_report({**report, "num_clips": 255})
    assert next(line for line in shown.splitlines() if line.startswith("AU4 ")).split()[-1] == "130"
    # 5 % of 256 clips are 12.8.
    heads = {n: render_report({**report, "num_clips": n}).splitlines()[4] for n in (243, 244, 268, 269)}
    beside = {n: head.startswith("AU ") and head.endswith("published") for n, head in heads.items()}
    assert beside == {243: False, 244: True, 268: True, 269: False}


def test_lists_of_a_report_are_cut_after_ten(release):
    notes = [{"where": f"row {i}", "what": "a note"} for i in range(11)]
    report = {**run(release), "notes": notes}
    lines = render_report(report).splitlines()
    assert "noted (11)" in lines
    assert sum("a note" in line for line in lines) == 10
    assert "  ... and 1 more in report.json" in lines
    assert "more in report.json" not in render_report({**report, "notes": notes[:10]})


def break_missing(release):
    for number in (50, 51, 60):
        (clip_folder(release) / f"img{number}.jpg").unlink()


def break_folder(release):
    clip_folder(release).rename(release / "elsewhere")


def break_image(release):
    path = clip_folder(release) / "img50.jpg"
    path.write_bytes(path.read_bytes()[:200])


def break_size(release):
    Image.new("RGB", (20, 20)).save(clip_folder(release) / "img50.jpg")


def break_twice(release):
    Image.new("RGB", (40, 30)).save(clip_folder(release) / "img050.jpg")


def break_all_but_one(release):
    for number in range(47, 87):
        (clip_folder(release) / f"img{number}.jpg").unlink()


def break_row(*row):
    return lambda release: write_book(
        release / "CASME2-coding-20190701.xlsx", [CASME2_HEADER, casme2_row(*row), *CASME2_ROWS[1:]]
    )


BAD = {
    "missing": (break_missing, ["sub01/EP02_01f", "frames 50-51, 60 of 46..86"], 38),
    "folder": (break_folder, ["sub01/EP02_01f", "no clip folder"], 0),
    "truncated": (break_image, ["sub01/EP02_01f", "img50.jpg: cannot be read as an image"], 40),
    "size": (break_size, ["sub01/EP02_01f", "img50.jpg: 20x20 pixels in a clip of 40x30"], 40),
    "ambiguous": (break_twice, ["sub01/EP02_01f", "img050.jpg and img50.jpg are both frame 50"], 0),
    "one frame": (break_all_but_one, ["sub01/EP02_01f", "frames 47-86"], 0),
    "au cell": (break_row(1, "EP02_01f", 46, 59, 86, "banana"), ["row 2", "Action Units", "'banana'", "allowed"], 0),
    "onset": (break_row(1, "EP02_01f", 86, 59, 46, 4), ["row 2", "OnsetFrame 86 > OffsetFrame 46"], 0),
}


@pytest.mark.parametrize(("breaks", "parts", "_kept"), BAD.values(), ids=BAD)
def test_bad_input_stops_with_one_line_and_nothing_written(release, breaks, parts, _kept):
    breaks(release)
    with pytest.raises(UserError) as caught:
        run(release)
    message = str(caught.value)
    assert [part for part in [*parts, "--bad-clips repair|skip"] if part not in message] == []
    assert "\n" not in message
    assert sorted(path.name for path in release.parent.iterdir()) == ["release"]


@pytest.mark.parametrize(("breaks", "parts", "kept"), BAD.values(), ids=BAD)
def test_bad_input_is_repaired_or_skipped_by_name(release, breaks, parts, kept):
    breaks(release)
    report = run(release, bad_clips="repair")
    dataset = datasets.load_from_disk(str(release.parent / "out"))
    frames = {row["sample_id"]: row["num_frames"] for row in dataset}
    assert frames.get("casme2/sub01/EP02_01f", 0) == kept
    assert len(frames) == (4 if kept else 3)
    told = [f"{entry['where']} {entry['what']}" for entry in report["repairs" if kept else "skips"]]
    assert any(all(part in text for part in parts) for text in told), told

    skipped = prepare(
        "casme2", release, release.parent / "skip", PrepareOptions(size=16, num_workers=1, bad_clips="skip")
    )
    assert skipped["num_clips"] == 3
    told = [f"{entry['where']} {entry['what']}" for entry in skipped["skips"]]
    assert any(all(part in text for part in parts) for text in told), told


def test_repaired_clip_keeps_the_numbers_of_its_frames(release):
    break_missing(release)
    (clip_folder(release) / "img70.jpg").write_bytes(b"")
    run(release, bad_clips="repair")
    row = datasets.load_from_disk(str(release.parent / "out"))[0]
    assert row["frame_numbers"] == [number for number in range(46, 87) if number not in (50, 51, 60, 70)]
    assert np.abs(arrays(row)[:, 0, 0].astype(int) - row["frame_numbers"]).max() <= 2


def test_several_defects_are_counted_in_the_line(release):
    break_missing(release)
    (clip_folder(release, "sub02/EP01_11f") / "img10.jpg").unlink()
    with pytest.raises(UserError, match="and 1 more clips with defects"):
        run(release)


def test_nothing_usable_is_an_error(release):
    row = casme2_row(1, "EP02_01f", 46, 59, 86, "banana")
    write_book(release / "CASME2-coding-20190701.xlsx", [CASME2_HEADER, row])
    with pytest.raises(UserError, match="no usable clip .*banana"):
        run(release, bad_clips="skip")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"size": 0}, "--size 0: allowed: 8"),
        ({"crop": "centre"}, "--crop centre: allowed: none, center"),
        ({"bad_clips": "ignore"}, "--bad-clips ignore: allowed: stop, repair, skip"),
        ({"num_workers": 0}, "--workers 0: allowed: 1"),
        ({"fmt": "csv"}, "--format csv: allowed: arrow, parquet"),
    ],
)
def test_bad_arguments(release, options, part):
    with pytest.raises(UserError) as caught:
        run(release, **options)
    assert part in str(caught.value)


def test_missing_root(tmp_path):
    with pytest.raises(UserError, match=r"nowhere: does not exist"):
        run(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_preparation_is_resumed(tmp_path, monkeypatch):
    rows = [casme2_row(1, f"EP{clip:02d}_01", 9, 10, 12, 4) for clip in range(20)]
    release = make_casme2(tmp_path / "release", rows)
    run_shard, made = prepare_module.run_shard, []

    def failing(task):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(task.key)
        return run_shard(task)

    monkeypatch.setattr(prepare_module, "run_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        run(release)
    assert not (tmp_path / "out").exists()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").rglob("*.arrow")}
    assert len(finished) == 2

    # One finished shard's input changes meanwhile: that shard alone is made again.
    Image.new("RGB", (40, 30)).save(clip_folder(release, "sub01/EP00_01") / "img10.jpg")
    steps = []
    monkeypatch.setattr(prepare_module, "run_shard", lambda task: made.append(task.key) or run_shard(task))
    report = run(release, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(8, 20), (16, 20), (20, 20)]
    assert len(set(made)) == 4
    dataset = datasets.load_from_disk(str(tmp_path / "out"))
    assert dataset["sample_id"][:] == [f"casme2/sub01/EP{clip:02d}_01" for clip in range(20)]
    assert arrays(dataset[0])[1].max() == 0
    assert report["num_clips"] == 20
    assert not (tmp_path / "out.partial").exists()


def test_finished_preparation_is_left_alone(release):
    assert not run(release)["already_prepared"]
    out = release.parent / "out"
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run(release)["already_prepared"]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(UserError, match="other options"):
        run(release, size=24)
    os.utime(clip_folder(release) / "img50.jpg", ns=(1, 1))
    with pytest.raises(UserError, match="other input"):
        run(release)


def test_occupied_out_is_refused_and_kept(release):
    out = release.parent / "out"
    out.mkdir()
    run(release)  # an empty folder is fine
    (out / "report.json").unlink()
    with pytest.raises(UserError, match="out: exists and is no prepared dataset"):
        run(release)
    assert (out / "dataset_info.json").exists()


def test_a_work_folder_with_other_files_is_refused_and_kept(release):
    kept = release.parent / "out.partial" / "thesis.txt"
    kept.parent.mkdir()
    kept.touch()
    with pytest.raises(UserError, match="out.partial: holds files"):
        run(release)
    assert kept.exists()


def test_command_line(release, capsys):
    parser = argparse.ArgumentParser()
    prepare_command.add_arguments(parser)
    out = release.parent / "cli"
    args = parser.parse_args(["casme2", "--root", str(release), "--out", str(out), "--size", "16", "--workers", "1"])
    assert prepare_command.run(args) == 0
    assert "CASME II: 4 clips" in capsys.readouterr().out
    assert prepare_command.run(args) == 0
    assert "already prepared" in capsys.readouterr().out


def gradient(path: Path, width: int, height: int, mode: str = "L") -> Path:
    x = np.linspace(0, 255, width)[None].repeat(height, 0)
    Image.fromarray(x.astype(np.uint8), "L").convert(mode).save(path, quality=100)
    return path


def load(file: Path, size: int, crop: str = "none") -> np.ndarray:
    (frame,), failures = load_clip([file], size=size, crop=get_crop(crop), clip="clip")
    assert not failures
    return frame


def test_centre_crop_takes_the_largest_square(tmp_path):
    file = gradient(tmp_path / "img1.png", 90, 30)
    frame = load(file, 30, "center")
    np.testing.assert_allclose(frame, np.asarray(Image.open(file))[:, 30:60], atol=1)
    whole = load(file, 30)
    assert (whole[:, 0].max(), whole[:, -1].min()) < (5, 250)


def test_reduced_jpeg_decoding_agrees_with_full_decoding(tmp_path):
    jpeg = gradient(tmp_path / "img1.jpg", 640, 480, "RGB")
    png = gradient(tmp_path / "img1.png", 640, 480)
    difference = load(jpeg, 64).astype(int) - load(png, 64)
    assert np.abs(difference).max() <= 2


def test_a_frame_of_the_right_size_is_kept_bit_for_bit(tmp_path):
    file = gradient(tmp_path / "img1.png", 64, 64)
    np.testing.assert_array_equal(load(file, 64), np.asarray(Image.open(file)))


def test_frames_of_more_than_8_bits_are_refused(tmp_path):
    file = tmp_path / "img1.png"
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(file)
    _, ((position, reason),) = load_clip([file], size=8, crop=get_crop("none"), clip="clip")
    assert position == 0
    assert "allowed: 8-bit" in reason


def test_nothing_is_written_into_the_release(release):
    before = sorted(release.rglob("*"))
    with pytest.raises(UserError, match="lies inside --root"):
        prepare("casme2", release, release / "prepared", PrepareOptions(size=16))
    assert before == sorted(release.rglob("*"))


class _Pool:
    """Stands for a pool of processes: works in this one, and remembers how it was asked."""

    made: ClassVar[list[dict]] = []

    def __init__(self, workers, mp_context):
        self.made.append({"workers": workers, "start": mp_context.get_start_method()})

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return False

    def submit(self, function, *arguments):
        self.made[-1]["main"] = vars(sys.modules["__main__"]).get("__file__")
        future = Future()
        try:
            future.set_result(function(*arguments))
        except UserError as error:
            future.set_exception(error)
        return future

    def shutdown(self, cancel_futures):
        self.made[-1]["cancelled"] = cancel_futures


def test_processes_report_each_shard_and_leave_the_main_script_alone(release, monkeypatch):
    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", _Pool)
    monkeypatch.setattr(prepare_module, "_CLIPS_PER_SHARD", 1)
    _Pool.made.clear()
    steps, main = [], sys.modules["__main__"]
    report = run(release, num_workers=2, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(done, report["num_clips"]) for done in range(report["num_clips"] + 1)]
    assert _Pool.made == [{"workers": 2, "start": "spawn", "main": None, "cancelled": True}]
    assert sys.modules["__main__"] is main
