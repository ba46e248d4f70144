"""Videos: what a file is, when each of its frames was, and the same pixels as a second decoder gives."""

import io
import os
import tarfile
import zipfile
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from aullm_dist import log
from aullm_dist.data.clips import sample_frames
from aullm_dist.data.crops import get_crop
from aullm_dist.data.decoding.videos import read_video
from aullm_dist.data.reading import read_clip
from aullm_dist.errors import UserError

EVEN = [1 / 30] * 8
UNEVEN = [0.01, 0.01, 0.01, 0.01, 0.16, 0.16, 0.02, 0.02]


def pictures(num: int = 9, width: int = 64, height: int = 48, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    ground = rng.integers(0, 60, (height, width, 3))
    return np.stack([(ground + 20 * n).clip(0, 255) for n in range(num)]).astype(np.uint8)


def write_video(path: Path, steps=EVEN, codec="ffv1", pixels="bgr0", streams=1, **options) -> np.ndarray:
    """Write a video whose frames lie `steps` seconds apart, and return its frames."""
    frames = pictures(len(steps) + 1)
    times = np.concatenate([[0.0], np.cumsum(steps)])
    base = Fraction(1, 30 if steps is EVEN else 1000)
    with av.open(str(path), "w", **options) as container:
        outputs = []
        for _ in range(streams):
            stream = container.add_stream(codec, rate=30)
            stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
            stream.time_base = stream.codec_context.time_base = base
            outputs.append(stream)
        for time, frame in zip(times, frames, strict=True):
            for stream in outputs:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture.pts, picture.time_base = round(time / base), base
                container.mux(stream.encode(picture))
        for stream in outputs:
            container.mux(stream.encode(None))
    return frames


def read(path: Path, **options):
    return read_clip(path, size=32, crop=get_crop("none"), **options)


FORMATS = [
    ("ffv1", "bgr0", "mkv"), ("ffv1", "bgr0", "avi"), ("mpeg4", "yuv420p", "mp4"), ("mpeg4", "yuv420p", "mov"),
    ("mjpeg", "yuvj420p", "avi"), ("mpeg2video", "yuv420p", "ts"), ("mpeg2video", "yuv420p", "mpg"),
    ("libvpx", "yuv420p", "webm"), ("libx264", "yuv420p", "mp4"), ("flv", "yuv420p", "flv"),
]  # fmt: skip


@pytest.mark.parametrize(("codec", "pixels", "ending"), FORMATS)
def test_frames_are_those_of_a_second_decoder(tmp_path, codec, pixels, ending):
    path = tmp_path / f"clip.{ending}"
    write_video(path, codec=codec, pixels=pixels)
    ours = list(read_video(path))
    with av.open(str(path)) as container:
        theirs = [(frame.to_ndarray(format="rgb24"), frame.time) for frame in container.decode(video=0)]
    assert len(ours) == len(theirs) == 9
    for frame, (pixels_there, time) in zip(ours, theirs, strict=True):
        # Two conversions from YUV to RGB round differently.
        assert np.abs(np.asarray(frame.image).astype(int) - pixels_there).mean() < 2.5
        # OpenCV has no time for the last frame of an MPEG program stream; the frames then count as even, which is told.
        if ending != "mpg" or frame.number < 8:
            assert abs((frame.milliseconds - ours[0].milliseconds) - 1000 * (time - theirs[0][1])) < 1.01


@pytest.mark.parametrize("ending", ["mkv", "mp4", "mov", "webm"])
def test_uneven_frames_are_sampled_by_time(tmp_path, ending, capsys):
    codec = {"mkv": ("ffv1", "bgr0"), "webm": ("libvpx", "yuv420p")}.get(ending, ("mpeg4", "yuv420p"))
    path = tmp_path / f"clip.{ending}"
    write_video(path, UNEVEN, *codec)
    log.set_up()
    clip = read(path)
    assert "frames are 10 to 160 ms apart; sampled by their times" in capsys.readouterr().err
    times = 1000 * np.concatenate([[0.0], np.cumsum(UNEVEN)])
    assert np.abs(clip.times - times).max() < 1.01
    wanted = np.interp(np.linspace(0, times[-1], 9), times, np.arange(9))
    levels = sample_frames(clip, 9).mean(axis=(1, 2)) * 255
    chosen = (levels - levels[0]) / 20
    assert np.abs(chosen - np.round(wanted)).max() < 0.75


@pytest.mark.parametrize(("codec", "pixels", "ending"), FORMATS)
def test_even_frames_are_taken_by_their_number(tmp_path, codec, pixels, ending):
    path = tmp_path / f"clip.{ending}"
    write_video(path, codec=codec, pixels=pixels)
    assert read(path).times is None


def test_two_video_streams_are_refused(tmp_path):
    for ending in ("mkv", "avi", "mp4"):
        codec = ("mpeg4", "yuv420p") if ending == "mp4" else ("ffv1", "bgr0")
        write_video(tmp_path / f"two.{ending}", codec=codec[0], pixels=codec[1], streams=2)
        with pytest.raises(UserError, match=r"two\.\w+: has 2 video streams; allowed: one"):
            read(tmp_path / f"two.{ending}")


def archives(folder: Path) -> None:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("clip.avi", b"RIFF")
    with tarfile.open(folder / "a.tgz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("x"))


def picture(kind: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 100, 50)).save(content, kind)
    return content.getvalue()


OTHERS = {
    "requirements.txt": b"".join(b"package-%d==1.%d\n" % (n, n) for n in range(120)),
    "release.nfo": b"some text\n" * 60,
    "art.ans": b"\x1b[31mred\x1b[0m\n" * 60,
    "list.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.ts\n#EXT-X-ENDLIST\n",
    "list.ffconcat": b"ffconcat version 1.0\nfile clip.avi\n",
    "session.sdp": b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
    "titles.srt": b"1\n00:00:00,000 --> 00:00:01,000\nhello\n",
    "page.html": b"<html>404</html>",
    "moved.mp4": b"<!DOCTYPE html><html>please sign in</html>",
    "one.png": picture("PNG"),
    "one.jpg": picture("JPEG"),
    "one.gif": picture("GIF"),
    "one.tif": picture("TIFF"),
    "frames.npy": b"\x93NUMPY" + bytes(80),
    "report.pdf": b"%PDF-1.7\n",
    "sound.mp3": b"ID3\x03" + bytes(2000),
    "zeros.avi": bytes(5000),
    "empty.mp4": b"",
    "random.avi": np.random.default_rng(0).bytes(5000),
    "head.mkv": b"\x1a\x45\xdf\xa3" + bytes(500),
    "head.mp4": b"\0\0\0\x18ftypisom" + bytes(500),
    "photo.heic": b"\0\0\0\x18ftypheic" + bytes(500),
    "utf16.txt": "a letter\n".encode("utf-16") * 40,
    "screen.xb": b"XBIN\x1a" + bytes(900),
}


@pytest.mark.parametrize("name", [*OTHERS, "a.zip", "a.tgz", "a.tar"])
def test_what_is_no_video_is_refused_in_one_line_that_says_what_it_is(tmp_path, name):
    archives(tmp_path)
    write_video(tmp_path / "clip.avi")
    if name in OTHERS:
        (tmp_path / name).write_bytes(OTHERS[name])
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "cannot be read as a video" in str(caught.value)
    assert "\n" not in str(caught.value)


NAMES = [
    "a:b.mkv", "clip%03d.mkv", "100%.mkv", "-x.mkv", "a b'c\".mkv", "file:x.mkv", "l\n.mkv", "\u9762.mkv",
    os.fsdecode(b"\xb8\xb4.mkv"), "concat:a|b.mkv",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_any_name_may_be_a_video_s(tmp_path, monkeypatch, name):
    frames = write_video(tmp_path / "clip.mkv")
    (tmp_path / "clip.mkv").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for path in (name, tmp_path / name):
        assert len(read(path).frames) == len(frames)


def test_a_pipe_or_a_device_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.avi")
    for path in (tmp_path / "pipe.avi", Path("/dev/zero")):
        with pytest.raises(UserError, match="is no regular file"):
            read(path)


def test_a_tiny_or_torn_video_is_told(tmp_path):
    with av.open(str(tmp_path / "tiny.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.width, stream.height, stream.pix_fmt = 8, 8, "bgr0"
        for frame in pictures(3, 8, 8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="frames of 8x8 pixels; allowed: 16 to 16384"):
        read(tmp_path / "tiny.mkv")


def folder_of(path: Path, numbers, pattern="img{}.png") -> Path:
    path.mkdir()
    for number, frame in zip(numbers, pictures(len(numbers)), strict=True):
        Image.fromarray(frame).save(path / pattern.format(number))
    return path


def told(capsys, folder: Path, **options) -> str:
    log.set_up()
    capsys.readouterr()
    read(folder, **options)
    return capsys.readouterr().err


def test_frames_missing_between_others_are_told(tmp_path, capsys):
    assert told(capsys, folder_of(tmp_path / "whole", range(7, 20))) == ""
    assert told(capsys, folder_of(tmp_path / "fifth", range(10, 60, 5))) == ""
    gap = folder_of(tmp_path / "gap", [1, 2, 3, 6, 7, 8, 10, 11])
    assert "frames 4-5, 9 are missing between 1 and 11" in told(capsys, gap)
    assert "frames 6-9 are missing between 0 and 16" in told(
        capsys, folder_of(tmp_path / "even", [0, 2, 4, 5, 10, 12, 14, 16])
    )


@pytest.mark.parametrize("numbers", [[*range(1, 9), 2024], [3, *range(900, 910)]])
def test_a_stray_number_is_no_frame_of_the_clip(tmp_path, capsys, numbers):
    folder = folder_of(tmp_path / "clip", numbers)
    with pytest.raises(UserError, match=r"no frame between \d+ and \d+, which is most of the clip"):
        read(folder)
    span = {"onset": sorted(numbers)[1], "offset": sorted(numbers)[-2]}
    assert "are missing" not in told(capsys, folder, **span)


def test_a_picture_that_is_called_otherwise_is_left_out_and_told(tmp_path, capsys):
    folder = folder_of(tmp_path / "clip", range(1, 9))
    Image.new("RGB", (500, 300)).save(folder / "screenshot_12.png")
    assert "pictures not read: 1 not called as the frames are (screenshot_12.png)" in told(capsys, folder)
    assert read(folder).frame_numbers.tolist() == list(range(1, 9))
