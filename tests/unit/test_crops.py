"""Crops: what each keeps, that it is decided once, and what is told where nothing can be kept."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aullm_dist.data.clips import ClipStore
from aullm_dist.data.crops import Crop, NoRegion, Region, crop_for, crop_names, get_crop, registry
from aullm_dist.data.frames import Cutter, load_clip
from aullm_dist.data.preparation import shards
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.data.synthetic import SyntheticSpec, write_corpus
from aullm_dist.errors import UserError


def spots(width: int, height: int, *places: tuple[float, float]) -> Image.Image:
    """Return a picture with bright spots, each as wide as a twentieth of the picture, on a gray ground."""
    y, x = np.mgrid[:height, :width]
    picture = np.full((height, width), 40.0)
    for column, row in places:
        picture += 200 * np.exp(-((x - column) ** 2 + (y - row) ** 2) / (2 * (width / 40) ** 2))
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


def brightest(picture: np.ndarray) -> tuple[float, float]:
    """Return (x, y) of the centre of brightness, in fractions."""
    weight = picture.astype(float) - picture.min()
    weight[weight < weight.max() / 2] = 0
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]] + 0.5
    return float((x * weight).sum() / weight.sum() / picture.shape[1]), float(
        (y * weight).sum() / weight.sum() / picture.shape[0]
    )


def cut(image: Image.Image, text: str, size: int = 64, clip: str = "clip") -> np.ndarray:
    return Cutter(size, get_crop(text), clip).cut_image(image, "frame 0")


def table(path: Path, header: str, *rows: str) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


class _Counting(Crop):
    identity = "counting"

    def __init__(self) -> None:
        self.fitted: list[tuple[str, tuple[int, int], str]] = []

    def fit(self, onset: Image.Image, clip: str) -> Region:
        self.fitted.append((clip, onset.size, onset.mode))
        return Region(left=len(self.fitted) / 4 - 0.25, right=len(self.fitted) / 4)


def test_a_crop_is_fitted_once_on_the_whole_onset_frame(tmp_path):
    files = [tmp_path / f"img{number}.jpg" for number in range(3)]
    for file in files:
        Image.new("RGB", (640, 480), (9, 99, 200)).save(file)
    crop = _Counting()
    stack, failures = load_clip(files, size=16, crop=crop, clip="casme2/sub01/x")
    assert (stack.shape, failures) == ((3, 16, 16), [])
    assert crop.fitted == [("casme2/sub01/x", (640, 480), "RGB")]


def test_a_small_face_in_a_large_jpeg_keeps_its_detail(tmp_path):
    """The decoder may not scale the whole frame down to what a small part of it needs more of."""
    stripes = np.zeros((1024, 1024), np.uint8)
    stripes[:, ::4] = stripes[:, 1::4] = 255
    picture = Image.fromarray(stripes)
    picture.save(tmp_path / "img1.jpg", quality=95)
    box = table(tmp_path / "boxes.csv", "clip,left,top,right,bottom", "*,480,480,544,544")
    (from_file,), _ = load_clip([tmp_path / "img1.jpg"], size=64, crop=get_crop(f"boxes:{box}"), clip="clip")
    assert np.abs(from_file.astype(int) - stripes[480:544, 480:544]).max() < 40


def test_boxes_keep_what_the_row_says(tmp_path):
    image = spots(200, 100, (150, 25))
    file = table(tmp_path / "b.csv", "note,clip,left,top,right,bottom", "x,one,100,0,200,50", "y,*,0,0,200,100")
    assert brightest(cut(image, f"boxes:{file}", clip="one")) == pytest.approx((0.5, 0.5), abs=0.02)
    assert brightest(cut(image, f"boxes:{file}", clip="two")) == pytest.approx((0.75, 0.25), abs=0.02)


@pytest.mark.parametrize("tilt", [-20.0, 0.0, 35.0])
def test_landmarks_bring_the_eyes_to_one_place(tmp_path, tilt):
    """However the head is tilted, the eyes come to the same place of the square, and so does the chin below them."""
    turn = np.deg2rad(tilt)
    across, down = np.array([np.cos(turn), np.sin(turn)]), np.array([-np.sin(turn), np.cos(turn)])
    middle = np.array([210.0, 140.0])
    eyes = middle - 30 * across, middle + 30 * across
    chin = middle + 72 * down
    # The second eye first: which is which does not matter.
    row = ",".join(f"{value:.3f}" for value in (*eyes[1], *eyes[0]))
    file = table(tmp_path / "l.csv", "clip,eye1_x,eye1_y,eye2_x,eye2_y", f"clip,{row}")
    found = [brightest(cut(spots(400, 320, tuple(place)), f"landmarks:{file}")) for place in (*eyes, chin)]
    side = 60 / 0.42
    expected = [(0.29, 0.38), (0.71, 0.38), (0.5, 0.38 + 72 / side)]
    for place, wanted in zip(found, expected, strict=True):
        assert place == pytest.approx(wanted, abs=0.015)


def test_what_lies_outside_the_frame_repeats_its_border(tmp_path):
    file = table(tmp_path / "l.csv", "clip,eye1_x,eye1_y,eye2_x,eye2_y", "clip,2,10,40,20")
    kept = cut(Image.new("L", (60, 60), 77), f"landmarks:{file}")
    assert set(np.unique(kept)) == {77}


def test_the_cascade_finds_the_face_wherever_it_is(tmp_path):
    spec = SyntheticSpec(corpus="casme2", subjects=1, clips_per_subject=1, num_frames=(8, 8), frame_size=(160, 160))
    write_corpus(spec, tmp_path)
    face = Image.open(sorted(tmp_path.rglob("*.jpg"))[0]).convert("L")
    kept = []
    for left, top in ((10, 30), (300, 150)):
        frame = Image.new("L", (500, 330), 128)
        frame.paste(face, (left, top))
        region = get_crop("cascade").fit(frame, "clip")
        kept.append(np.array([region.left * 500 - left, region.top * 330 - top, (region.right - region.left) * 500]))
        assert (region.right - region.left) * 500 == pytest.approx((region.bottom - region.top) * 330)
    # The same part of the face, but for the steps of the search.
    assert np.abs(kept[0] - kept[1]).max() < 8
    assert 100 < kept[0][2] < 200


def test_no_face_is_told_and_not_guessed():
    with pytest.raises(NoRegion, match="no face found in the onset frame; allowed: an upright face from the front"):
        get_crop("cascade").fit(Image.new("L", (200, 200), 90), "clip")


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ("dlib", None, "--crop dlib: allowed: none, center, cascade, mtcnn, boxes, landmarks"),
        ("center:0.5", None, "center takes no argument"),
        ("boxes", None, "--crop boxes: the file is missing; write boxes:FILE.csv"),
        ("boxes:nowhere.csv", None, "nowhere.csv: cannot be read (No such file or directory)"),
        ("boxes:{file}", ["clip,left,top,right", "*,0,0,1"], "column bottom is missing; allowed: a CSV with"),
        (
            "boxes:{file}",
            ["clip,left,top,right,bottom", "a,0,0,1,1", "a,0,0,1,1"],
            "line 3, clip 'a' has a row already, line 2",
        ),
        ("boxes:{file}", ["clip,left,top,right,bottom,top", "a,0,0,1,1,0"], "two columns are called top; keep one"),
        ("boxes:{file}", ["clip,left,top,right,bottom", "a,0,0,x,1"], "line 2, column right: 'x'; allowed: a number"),
        ("boxes:{file}", ["clip,left,top,right,bottom", "a,0,0,nan,1"], "line 2, column right: 'nan'"),
        ("boxes:{file}", ["clip,left,top,right,bottom", "b,0,0,1,1"], "no row for this clip in {file}"),
        ("boxes:{file}", ["clip,left,top,right,bottom", "a,0,0,51,40"], "allowed: 0 <= left < right <= 50"),
        ("landmarks:{file}", ["clip,eye1_x,eye1_y,eye2_x,eye2_y", "a,9,9,9,9"], "one pixel or more apart"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(tmp_path, text, rows, message):
    file = tmp_path / "places.csv"
    if rows:
        table(file, *rows)
    with pytest.raises(UserError) as caught:
        cut(Image.new("L", (50, 40)), text.format(file=file), clip="a")
    assert message.format(file=file) in str(caught.value)
    assert "\n" not in str(caught.value)


class _Point:
    """Stands for an installed package's entry point."""

    name, value = "elsewhere", "elsewhere:make"

    def __init__(self, made: object) -> None:
        self.made = made

    def load(self) -> object:
        if self.made is ImportError:
            raise ImportError("no module")
        return lambda argument: self.made if argument is None else f"{argument}"


def test_other_packages_add_crops(monkeypatch):
    crop = _Counting()
    monkeypatch.setattr(
        registry, "entry_points", lambda group: [_Point(crop)] if group == registry.ENTRY_POINTS else []
    )
    assert crop_names()[-1] == "elsewhere"
    assert get_crop("elsewhere") is crop
    with pytest.raises(UserError, match=r"elsewhere:make returned no aullm_dist.data.crops.Crop"):
        get_crop("elsewhere:argument")
    crop.identity = None
    with pytest.raises(UserError, match=r"returned no aullm_dist.data.crops.Crop with an identity"):
        get_crop("elsewhere")
    monkeypatch.setattr(registry, "entry_points", lambda group: [_Point(ImportError)])
    with pytest.raises(UserError, match=r"elsewhere:make cannot be loaded \(no module\)"):
        get_crop("elsewhere")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    spec = SyntheticSpec(corpus="casme2", subjects=2, clips_per_subject=1, num_frames=(8, 8), frame_size=(64, 64))
    write_corpus(spec, folder := tmp_path_factory.mktemp("crops") / "corpus")
    return folder


def test_a_preparation_records_its_crop_and_leaves_out_clips_without_one(corpus, tmp_path):
    ids = sorted(f"casme2/{path.parent.name}/{path.name}" for path in corpus.glob("CASME2_RAW*/*/*"))
    header = "clip,left,top,right,bottom"
    file = table(tmp_path / "boxes.csv", header, f"{ids[0]},0,0,32,32")
    with pytest.raises(UserError, match=rf"{ids[1]}: no row for this clip in .*; choose another --crop, or use --bad"):
        prepare("casme2", corpus, tmp_path / "out", PrepareOptions(size=16, crop=f"boxes:{file}", num_workers=1))
    assert not (tmp_path / "out").exists()
    options = {"size": 16, "crop": f"boxes:{file}", "num_workers": 1, "bad_clips": "skip"}
    report = prepare("casme2", corpus, tmp_path / "out", PrepareOptions(**options))
    assert (report["crop"], report["crop_argument"], report["num_clips"]) == ("boxes", str(file), 1)
    assert [skip["where"] for skip in report["skips"]] == [ids[1]]
    assert prepare("casme2", corpus, tmp_path / "out", PrepareOptions(**options))["already_prepared"]
    # Other boxes are another preparation, though the file has the same name.
    table(file, header, f"{ids[0]},0,0,32,30")
    with pytest.raises(UserError, match="prepared from other input or with other options"):
        prepare("casme2", corpus, tmp_path / "out", PrepareOptions(**options))


def test_datasets_of_another_crop_are_refused(corpus, tmp_path):
    for crop in ("none", "center"):
        prepare("casme2", corpus, tmp_path / crop, PrepareOptions(size=16, crop=crop, num_workers=1))
    assert ClipStore([tmp_path / "center"], 16).crops == ("center",)
    assert ClipStore([tmp_path / "center"], 16, ["center"]).crops == ("center",)
    with pytest.raises(
        UserError, match=r"none: was prepared with crop none, but center is wanted, .*with --crop center"
    ):
        ClipStore([tmp_path / "none"], 16, ["center"])
    for name in ("report.json", "MANIFEST.json"):  # as of an early version
        (tmp_path / "none" / name).unlink()
    assert ClipStore([tmp_path / "none"], 16).crops == ("unrecorded",)


def test_a_prediction_takes_the_crop_that_the_model_was_trained_on(tmp_path):
    assert crop_for(["center"]).identity == "center"
    assert crop_for(["center", "none"], "none").identity == "none"
    assert crop_for(["counting"], crop := _Counting()) is crop
    assert crop_for([], "cascade").identity == "cascade"
    for trained, wanted, message in (
        (["center"], "none", "crop none: the model was trained on clips cut with center; allowed: center"),
        (["center"], _Counting(), "crop counting: the model was trained on clips cut with center"),
        (["boxes"], None, "give --crop boxes:FILE.csv for these"),
        (["center", "none"], None, "was trained on clips cut with center or none; say which"),
        (["detector-of-others"], None, "was trained on clips cut with detector-of-others; say which"),
        ([], None, "does not say how its clips were cut; say which"),
    ):
        with pytest.raises(UserError) as caught:
            crop_for(trained, wanted)
        assert message in str(caught.value)


def test_a_table_that_changes_during_a_preparation_is_noticed(tmp_path):
    file = table(tmp_path / "boxes.csv", "clip,left,top,right,bottom", "*,0,0,32,32")
    text, before = f"boxes:{file}", get_crop(f"boxes:{file}").fingerprint
    table(file, "clip,left,top,right,bottom", "*,0,0,32,31")
    with pytest.raises(UserError, match="changed during the preparation; start it again"):
        shards._crop(text, before)
