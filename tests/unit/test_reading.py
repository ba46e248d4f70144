"""Folders of frames, videos and arrays: one and the same clip, whichever way it comes."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from aullm_dist.data.crops import get_crop
from aullm_dist.data.reading import clip_of_arrays, read_clip
from aullm_dist.data.tables import is_dataset
from aullm_dist.errors import UserError


def moving_spot(num_frames: int = 9, width: int = 96, height: int = 80, seed: int = 0) -> np.ndarray:
    """Return RGB frames `[T, H, W, 3]` of a coloured spot that moves over coloured noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    ground = rng.integers(0, 100, (height, width, 3))
    frames = []
    for number in range(num_frames):
        spot = np.exp(-((x - 30 - 2 * number) ** 2 + (y - 40) ** 2) / 200.0)[..., None] * np.array([150, 90, 30])
        frames.append((ground + spot).clip(0, 255).astype(np.uint8))
    return np.stack(frames)


def write_video(path: Path, frames: np.ndarray, codec: str = "FFV1") -> Path:
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 30, (width, height))
    assert writer.isOpened()
    for frame in frames:
        writer.write(np.ascontiguousarray(frame[..., ::-1]))
    writer.release()
    return path


def write_folder(path: Path, frames: np.ndarray, first: int = 7) -> Path:
    path.mkdir(parents=True)
    for number, frame in enumerate(frames, first):
        Image.fromarray(frame).save(path / f"img{number}.png")
    return path


@pytest.mark.parametrize("crop", ["none", "center", "landmarks"])
def test_a_clip_is_the_same_whichever_way_it_comes(tmp_path, crop):
    if crop == "landmarks":
        (tmp_path / "eyes.csv").write_text("clip,eye1_x,eye1_y,eye2_x,eye2_y\n*,30,35,62,45\n")
        crop = f"landmarks:{tmp_path / 'eyes.csv'}"
    frames, fitted = moving_spot(), get_crop(crop)
    folder = read_clip(write_folder(tmp_path / "sub01" / "clip", frames), size=32, crop=fitted)
    video = read_clip(write_video(tmp_path / "clip.avi", frames), size=32, crop=fitted)
    arrays = clip_of_arrays(frames, size=32, crop=fitted)
    floats = clip_of_arrays(frames / 255, size=32, crop=fitted)
    assert folder.frames.shape == (9, 32, 32)
    assert folder.frames.std() > 5
    for other in (video, arrays, floats):
        np.testing.assert_array_equal(folder.frames, other.frames)
    assert folder.frame_numbers.tolist() == list(range(7, 16))
    assert video.frame_numbers.tolist() == list(range(9))


@pytest.mark.parametrize("codec", ["MJPG", "mp4v"])
def test_lossy_videos_come_close(tmp_path, codec):
    frames = moving_spot()
    ending = {"MJPG": "avi", "mp4v": "mp4"}[codec]
    video = read_clip(write_video(tmp_path / f"v.{ending}", frames, codec), size=32, crop=get_crop("none"))
    wanted = clip_of_arrays(frames, size=32, crop=get_crop("none"))
    assert np.abs(video.frames.astype(int) - wanted.frames).mean() < 4


def test_the_crop_sees_the_onset_frame_and_frames_outside_the_span_are_left_out(tmp_path):
    frames = moving_spot()
    # A larger frame before the onset does not disturb: nobody asks for it.
    folder = write_folder(tmp_path / "clip", frames)
    Image.new("L", (10, 10)).save(folder / "img3.png")
    clip = read_clip(folder, size=32, crop=get_crop("center"), onset=9, offset=12)
    assert clip.frame_numbers.tolist() == [9, 10, 11, 12]
    video = write_video(tmp_path / "clip.avi", frames)
    same = read_clip(video, size=32, crop=get_crop("center"), onset=2, offset=5)
    np.testing.assert_array_equal(clip.frames, same.frames)
    some = read_clip(video, size=32, crop=get_crop("center"), onset=2, offset=5, only={2, 4})
    assert some.frame_numbers.tolist() == [2, 4]
    np.testing.assert_array_equal(some.frames, same.frames[[0, 2]])


@pytest.mark.parametrize(
    ("given", "span", "message"),
    [
        ("nowhere", {}, "nowhere: does not exist; give a folder of frames, a video file or a prepared dataset"),
        ("empty", {}, "empty: no frames in it; allowed: numbered .jpg"),
        (".", {}, "its folder clip has some: give the folders of clips"),
        ("clip", {"onset": 2}, "onset 2 lies outside of the clip; allowed: its frames 7..15"),
        ("clip", {"offset": 16}, "offset 16 lies outside of the clip; allowed: its frames 7..15"),
        ("clip.avi", {"offset": 9}, "offset 9 lies outside of the clip; allowed: its frames 0..8"),
        ("clip.avi", {"onset": 9}, "onset 9 lies outside of the clip; allowed: its frames 0..8"),
        ("clip", {"onset": 9, "offset": 9}, "onset 9, offset 9; allowed: an onset before the offset"),
        ("clip", {"onset": 15}, "clip: 1 frame from onset to offset; allowed: 2 or more"),
        ("unequal", {}, "img16.png: 20x10 pixels in a clip of 96x80"),
        ("damaged", {}, "img16.png: cannot be read as an image"),
        ("text.mp4", {}, "text.mp4: cannot be read as a video: it is a text file; allowed: AVI, MP4 and MOV"),
        ("cut.avi", {}, "bytes shorter than it says: it was cut short"),
        ("clip", {"crop": "cascade"}, "clip: no face found in the onset frame; allowed: an upright face"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, given, span, message):
    frames = moving_spot()
    for name in ("clip", "unequal", "damaged"):
        write_folder(tmp_path / name, frames)
    Image.new("L", (20, 10)).save(tmp_path / "unequal" / "img16.png")
    (tmp_path / "damaged" / "img16.png").write_bytes((tmp_path / "clip" / "img7.png").read_bytes()[:400])
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.avi").write_bytes(write_video(tmp_path / "clip.avi", frames).read_bytes()[:100])
    with pytest.raises(UserError) as caught:
        read_clip(tmp_path / given, size=32, **{**span, "crop": get_crop(span.get("crop", "none"))})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"no video", b"\0\0\0\x18ftypisom" + bytes(500)])
def test_the_libraries_say_nothing_of_their_own_about_a_damaged_video(tmp_path, content):
    (tmp_path / "text.mp4").write_bytes(content)
    code = (
        "import sys; from aullm_dist.data.crops import get_crop; from aullm_dist.data.reading import read_clip\n"
        "try: read_clip(sys.argv[1], size=32, crop=get_crop('none'))\n"
        "except ValueError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "text.mp4")]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot be read as a video" in said.stdout
    assert said.stderr == ""


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((3, 8), np.uint8), "shape [3, 8]; allowed: gray [T, H, W] or RGB [T, H, W, 3]"),
        (np.zeros((3, 8, 8, 4), np.uint8), "shape [3, 8, 8, 4]"),
        (np.zeros((1, 8, 8), np.uint8), "frames: 1 frame; allowed: 2 or more"),
        (np.zeros((0, 8, 8), np.uint8), "frames: 0 frames; allowed: 2 or more"),
        (np.zeros((3, 8, 8), np.int64), "type int64; allowed: uint8, or floats in 0..1"),
        (np.full((3, 8, 8), 200.0), "floats outside of 0..1; divide by the largest gray level"),
        (np.full((3, 8, 8), np.nan), "floats outside of 0..1"),
        ([np.zeros((8, 8), np.uint8), np.zeros((8, 9), np.uint8)], "frames[1]: shape [8, 9] in a clip of [8, 8]"),
    ],
)
def test_bad_arrays_are_refused(frames, message):
    with pytest.raises(UserError) as caught:
        clip_of_arrays(frames, size=32, crop=get_crop("none"))
    assert message in str(caught.value)


def test_a_dataset_is_told_from_a_folder_of_frames(tiny_dataset, tmp_path):
    assert is_dataset(tiny_dataset)
    assert not is_dataset(tmp_path)
