"""Frame files: what they are and whether they are whole is checked before a pixel of them is used."""

import io
import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aullm_dist.data.crops import get_crop
from aullm_dist.data.decoding.pictures import UnreadableFrame, read_picture
from aullm_dist.data.frames import Cutter
from aullm_dist.data.listing import gaps, list_folder
from aullm_dist.errors import UserError


def face(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """A picture that looks otherwise whichever way it is turned, with detail everywhere."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    gray = 40 + 1.2 * x + 0.5 * y + rng.normal(0, 6, (height, width))
    gray[: height // 4, : width // 3] += 70
    return Image.fromarray(gray.clip(0, 255).astype(np.uint8)).convert("RGB")


def cut(file: Path, size: int = 32, crop: str = "none") -> np.ndarray:
    return Cutter(size, get_crop(crop), "clip").cut_file(file)


def refusal(file: Path) -> str:
    with pytest.raises(UnreadableFrame) as caught:
        cut(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# How the upright picture is stored, by EXIF orientation (CIPA DC-008, 4.6.5): the inverse of what a viewer does.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("ending", [".png", ".jpg"])
@pytest.mark.parametrize("crop", ["none", "center"])
def test_pictures_are_read_as_a_viewer_shows_them(tmp_path, orientation, ending, crop):
    upright = face()
    upright.save(tmp_path / f"upright1{ending}", quality=95)
    exif = Image.Exif()
    exif[0x112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](np.asarray(upright))))
    stored.save(tmp_path / f"stored1{ending}", exif=exif, quality=95)
    here, there = cut(tmp_path / f"stored1{ending}", crop=crop), cut(tmp_path / f"upright1{ending}", crop=crop)
    assert np.abs(here.astype(int) - there).mean() < (0.1 if ending == ".png" else 1.5)
    assert read_picture(tmp_path / f"stored1{ending}").size == upright.size


def test_transparent_pixels_are_refused_and_opaque_ones_read(tmp_path):
    gray = np.asarray(face().convert("L"))
    alpha = np.full_like(gray, 255)
    opaque = Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)])
    opaque.save(tmp_path / "a1.png")
    Image.fromarray(gray).save(tmp_path / "b1.png")
    np.testing.assert_array_equal(cut(tmp_path / "a1.png"), cut(tmp_path / "b1.png"))
    alpha = alpha.copy()
    alpha[3, 3] = 254
    for mode in ("LA", "RGBA"):
        picture = opaque.convert(mode)
        picture.putalpha(Image.fromarray(alpha))
        picture.save(tmp_path / "c1.png")
        assert "has transparent pixels" in refusal(tmp_path / "c1.png")
    palette = Image.fromarray(gray).convert("P")
    palette.save(tmp_path / "d1.png", transparency=int(np.asarray(palette)[0, 0]))
    assert "has transparent pixels" in refusal(tmp_path / "d1.png")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 60}),
        ("JPEG", {"quality": 95, "optimize": True}),
        ("PNG", {}),
    ],
)
def test_zeroed_regions_are_found(tmp_path, kind, options):
    rng = random.Random(0)
    content = io.BytesIO()
    face(320, 240).save(content, kind, **options)
    whole = content.getvalue()
    file = tmp_path / "frame1.jpg"
    for _ in range(60):
        size = rng.choice([64, 512, 4096])
        start = rng.randrange(2, max(len(whole) - size, 3))
        file.write_bytes(whole[:start] + bytes(size) + whole[start + size :])
        assert refusal(file)
    file.write_bytes(whole)
    assert cut(file).std() > 5


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_areas_are_no_damage(tmp_path, progressive, optimize, level):
    picture = Image.new("RGB", (800, 600), (level, level, level))
    picture.paste(face(), (10, 10))
    picture.save(tmp_path / "frame1.jpg", progressive=progressive, optimize=optimize)
    assert cut(tmp_path / "frame1.jpg").shape == (32, 32)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP"])
def test_files_that_are_cut_short_are_refused(tmp_path, kind, share):
    content = io.BytesIO()
    face().save(content, kind)
    (tmp_path / "frame1.png").write_bytes(content.getvalue()[: int(share * len(content.getvalue()))])
    assert "cannot be read as an image" in refusal(tmp_path / "frame1.png")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PPM", "PDF", "EPS", "ICO"])
def test_pictures_of_another_format_are_refused_whatever_they_are_called(tmp_path, kind):
    content = io.BytesIO()
    face().save(content, kind)
    (tmp_path / "frame1.jpg").write_bytes(content.getvalue())
    assert "no JPEG, PNG or BMP picture" in refusal(tmp_path / "frame1.jpg")


def test_a_moving_picture_is_no_frame(tmp_path):
    face().save(tmp_path / "frame1.png", save_all=True, append_images=[face(seed=1)])
    assert "holds 2 pictures; allowed: one" in refusal(tmp_path / "frame1.png")


def test_no_warning_of_a_library_reaches_the_user(tmp_path):
    file = tmp_path / "frame1.jpg"
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\x01"
    face().save(file, exif=exif)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Corrupt EXIF data" in refusal(file)
    face().save(file)
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = 5000
        assert "exceeds limit of 5000 pixels" in refusal(file)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def test_pipes_links_folders_and_empty_files_are_told(tmp_path):
    os.mkfifo(tmp_path / "pipe1.jpg")
    assert "a pipe or a device" in refusal(tmp_path / "pipe1.jpg")
    (tmp_path / "link1.jpg").symlink_to("/nonexistent/content")
    assert "the link leads to /nonexistent/content, which is not there" in refusal(tmp_path / "link1.jpg")
    (tmp_path / "folder1.jpg").mkdir()
    assert "Is a directory" in refusal(tmp_path / "folder1.jpg")
    (tmp_path / "empty1.jpg").touch()
    assert "0 bytes" in refusal(tmp_path / "empty1.jpg")


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


def test_pictures_that_are_called_otherwise_are_no_frames(tmp_path):
    folder = touch(tmp_path, "img1.jpg", "img2.jpg", "img03.JPEG", "Screenshot 2024-03-01.png", "img4 (1).jpg", "x.jpg")
    listed = list_folder(folder)
    assert list(listed.frames) == [1, 2, 3]
    assert listed.left_out() == (
        "pictures not read: 3 not called as the frames are (Screenshot 2024-03-01.png, img4 (1).jpg, x.jpg)"
    )
    assert list_folder(touch(tmp_path, "a.tif", "b.TIF")).left_out().endswith("; 2 .tif")


def test_frames_that_are_called_in_several_ways_are_refused(tmp_path):
    folder = touch(tmp_path, "a1.jpg", "a2.jpg", "b3.jpg", "b4.jpg")
    with pytest.raises(UserError, match=r"called in 2 ways \(a1.jpg, b3.jpg\); allowed: frames called alike"):
        list_folder(folder)


def test_numbers_of_more_digits_than_a_number_has_are_refused(tmp_path):
    assert list(list_folder(touch(tmp_path / "a", "20240301123456789.jpg")).frames) == [20240301123456789]
    with pytest.raises(UserError, match="a number of 20 digits"):
        list_folder(touch(tmp_path / "b", "99999999999999999999.jpg"))


def test_what_a_folder_holds_instead_is_told(tmp_path):
    assert list_folder(touch(tmp_path / "a", "img1.jpg", "img2.jpg", "img5.jpg")).instead() == (
        "the folder holds frames 1-2, 5"
    )
    assert "2 .tif; allowed: numbered .jpg" in list_folder(touch(tmp_path / "b", "1.tif", "2.tif")).instead()
    touch(tmp_path / "c" / "color", "1.jpg", "2.jpg")
    assert list_folder(tmp_path / "c").instead() == "its folder color holds frames 1-2"


@pytest.mark.parametrize("seed", range(30))
def test_gaps_are_the_numbers_that_are_missing(seed):
    rng = random.Random(seed)
    first, last = sorted(rng.sample(range(60), 2))
    numbers = sorted(rng.sample(range(60), rng.randrange(20)))
    missing = [number for low, high in gaps(numbers, first, last) for number in range(low, high + 1)]
    assert missing == [number for number in range(first, last + 1) if number not in numbers]


def test_a_gap_costs_nothing_however_long_it_is():
    assert gaps([1, 5], 1, 10**15) == [(2, 4), (6, 10**15)]
