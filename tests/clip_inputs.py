"""Generated inputs of a prediction, damaged in many ways, and what may be read of them.

Every frame has the gray level of its number, so a frame that was drawn from damaged bytes, put into another's place or
left out shows in what was read.
"""

import io
import logging
import os
import random
import re
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from aullm_dist.data.clips import Clip
from aullm_dist.data.crops import get_crop
from aullm_dist.data.reading import read_clip
from aullm_dist.errors import UserError

_STEP, _DARKEST = 14, 30
SIZE = 16


def level(number: int) -> int:
    """Return the mean gray level of frame `number`, from 0."""
    return _DARKEST + _STEP * (number % 14)


def frame(number: int, width: int = 96, height: int = 64) -> np.ndarray:
    rng = np.random.default_rng(number)
    noise = rng.normal(0, 3, (height, width, 1)) + 12 * np.sin(np.arange(width) / 9)[None, :, None]
    return (level(number) + noise - noise.mean() + np.zeros((1, 1, 3))).clip(0, 255).astype(np.uint8)


class Input:
    """One input in a folder of its own.

    Attributes:
        path: What a user would give.
        whole: Whether nothing about it is strange, so that it has to be read without a word.
        tolerance: How far levels of its frames may be off, for lossy formats.
        what: For reports.
    """

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.whole, self.tolerance, self.what = True, 1.5, ""
        self.first, self.count = 0, rng.randint(4, 12)
        self.path = folder / "clip"
        if rng.random() < 0.5:
            self._pictures()
        else:
            self._video()

    def _pictures(self) -> None:
        rng = self.rng
        self.path.mkdir()
        kind = rng.choice(["jpg", "png", "bmp", "jpeg", "JPG"])
        options = {"quality": rng.choice([80, 95]), "optimize": rng.random() < 0.3} if kind.lower()[0] == "j" else {}
        padding, prefix = rng.choice(["", "05"]), rng.choice(["img", "reg_", "", "S01-"])
        for number in range(self.count):
            name = f"{prefix}{number:{padding}}.{kind}"
            Image.fromarray(frame(number)).save(self.path / name, **options)
        self.what = f"folder of {kind}"
        self._change(FOLDER_CHANGES)

    def _video(self) -> None:
        rng = self.rng
        codec, pixels, ending = rng.choice(VIDEOS)
        self.path = self.folder / f"clip.{ending}"
        self.tolerance = 1.5 if codec == "ffv1" else 6.0
        self.what = f"{codec} in {ending}"
        uneven = ending in ("mkv", "mp4") and rng.random() < 0.2
        times = np.cumsum([0, *(rng.choice([20, 80]) if uneven else 40 for _ in range(self.count - 1))])
        write_video(self.path, range(self.count), times, codec, pixels)
        if uneven and len(set(np.diff(times))) > 1:
            self.whole, self.what = False, f"uneven {self.what}"
        self._change(VIDEO_CHANGES)

    def _change(self, changes: list[Callable[["Input"], None]]) -> None:
        if self.rng.random() < 0.8:
            change = self.rng.choice(changes)
            self.whole = False
            change(self)
            self.what += f", {change.__name__.removeprefix('_')}"

    def some_file(self) -> Path:
        return self.rng.choice(sorted(path for path in self.path.iterdir() if path.is_file()))


def write_video(path: Path, numbers, times, codec: str, pixels: str, streams: int = 1) -> None:
    """Write frames at `times` in milliseconds."""
    base = Fraction(1, 25) if len(set(np.diff(times))) <= 1 else Fraction(1, 1000)
    with av.open(str(path), "w") as container:
        outputs = [container.add_stream(codec, rate=25) for _ in range(streams)]
        for stream in outputs:
            stream.width, stream.height, stream.pix_fmt = 96, 64, pixels
            stream.time_base = stream.codec_context.time_base = base
            stream.codec_context.bit_rate = 4_000_000
        for number, time in zip(numbers, times, strict=True):
            for stream in outputs:
                picture = av.VideoFrame.from_ndarray(frame(number), format="rgb24")
                picture.pts, picture.time_base = round(Fraction(int(time), 1000) / base), base
                container.mux(stream.encode(picture))
        for stream in outputs:
            container.mux(stream.encode(None))


VIDEOS = [
    ("ffv1", "bgr0", "mkv"), ("ffv1", "bgr0", "avi"), ("mjpeg", "yuvj420p", "avi"), ("mpeg4", "yuv420p", "mp4"),
    ("libx264", "yuv420p", "mp4"), ("mpeg4", "yuv420p", "mov"), ("libvpx", "yuv420p", "webm"),
]  # fmt: skip


def _file_removed(case: Input) -> None:
    """Remove a frame; without its first or last a clip is another one, which nobody can see."""
    files = sorted(case.path.iterdir(), key=lambda path: int(re.findall("[0-9]+", path.stem)[-1]))
    gone = case.rng.choice(files)
    gone.unlink()
    case.first += gone == files[0]
    case.count -= gone == files[-1]


def _zeroed(case: Input) -> None:
    """BMP files have no checksum: black pixels cannot be told from lost ones, as docs/corpora.md says."""
    if case.some_file().suffix == ".bmp":
        case.whole = True
        return
    _zero(case.some_file(), case.rng)


def _video_zeroed(case: Input) -> None:
    _zero(case.path, case.rng)


def _zero(file: Path, rng: random.Random) -> None:
    content = bytearray(file.read_bytes())
    size = min(rng.choice([64, 512, 4096]), len(content) // 2)
    start = rng.randrange(len(content) - size)
    content[start : start + size] = bytes(size)
    file.write_bytes(bytes(content))


def _cut_short(case: Input) -> None:
    file = case.path if case.path.is_file() else case.some_file()
    file.write_bytes(file.read_bytes()[: case.rng.randrange(file.stat().st_size)])


def _emptied(case: Input) -> None:
    (case.path if case.path.is_file() else case.some_file()).write_bytes(b"")


def _broken_link(case: Input) -> None:
    file = case.some_file()
    file.unlink()
    file.symlink_to("/nonexistent/content")


def _pipe(case: Input) -> None:
    file = case.path if case.path.is_file() else case.some_file()
    file.unlink()
    os.mkfifo(file)


def _folder_instead(case: Input) -> None:
    file = case.some_file()
    file.unlink()
    file.mkdir()


def _stray(case: Input) -> None:
    name = case.rng.choice(["screenshot 2024.png", "thumb.jpg", "copy of img3.jpg", "img3 (1).jpg", "x.tif", "a.gif"])
    Image.new("RGB", (96, 64), (250, 250, 250)).save(case.path / name)


def _far_number(case: Input) -> None:
    file = case.some_file()
    digits = "".join(c if c.isdigit() else "" for c in file.stem.replace("S01", ""))
    far = case.rng.choice(["2024", "99999999", "99999999999999999999"])
    name = file.stem[: len(file.stem) - len(digits)] + far + file.suffix
    Image.new("RGB", (96, 64), (250, 250, 250)).save(case.path / name)


def _other_size(case: Input) -> None:
    Image.new("RGB", (64, 64), (99, 99, 99)).save(case.some_file())


def _transparent(case: Input) -> None:
    file = case.some_file()
    Image.new("RGBA", (96, 64), (99, 99, 99, 100)).save(file, "PNG")


def _deep(case: Input) -> None:
    Image.fromarray(np.full((64, 96), 40_000, np.uint16)).save(case.some_file(), "PNG")


def _other_format(case: Input) -> None:
    file = case.some_file()
    Image.new("RGB", (96, 64), (99, 99, 99)).save(file, case.rng.choice(["GIF", "TIFF", "WEBP", "PPM"]))


def _deeper(case: Input) -> None:
    inner = case.path / "color"
    inner.mkdir()
    for path in list(case.path.iterdir()):
        if path != inner:
            path.rename(inner / path.name)


def _same_number(case: Input) -> None:
    file = case.some_file()
    shutil.copy(file, file.with_name(f"{file.stem[:-1]}0{file.stem[-1]}{file.suffix}"))


def _bytes_in_name(case: Input) -> None:
    target = Path(os.fsdecode(os.fsencode(case.path.parent) + b"/\xb8\xb4" + os.fsencode(case.path.suffix)))
    case.path.rename(target)
    case.path, case.whole = target, True


def _strange_name(case: Input) -> None:
    name = case.rng.choice(["a:b", "c%03d", "d e", "-f", "g'h\"", "i\nj", "k|l", "\u9762", "#m", "$n"])
    target = case.path.with_name(name + case.path.suffix)
    case.path.rename(target)
    case.path, case.whole = target, True


def _other_ending(case: Input) -> None:
    target = case.path.with_suffix(case.rng.choice([".txt", ".mp4", ".avi", ".jpg", ".png", ".m3u8", ""]))
    if target != case.path:
        case.path.rename(target)
    case.path, case.whole = target, True


def _two_streams(case: Input) -> None:
    write_video(case.path, range(case.count), 40 * np.arange(case.count), "mpeg4" if case.path.suffix in (
        ".mp4", ".mov") else "libvpx" if case.path.suffix == ".webm" else "ffv1",
        "bgr0" if case.path.suffix in (".mkv", ".avi") else "yuv420p", streams=2)  # fmt: skip


def _no_video(case: Input) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (96, 64)).save(picture, case.rng.choice(["PNG", "JPEG", "GIF", "BMP", "TIFF"]))
    contents = [b"some text\n" * 99, b"#EXTM3U\nclip.ts\n", b"PK\x03\x04" + bytes(99), picture.getvalue(), bytes(999)]
    case.path.write_bytes(case.rng.choice([*contents, case.rng.randbytes(3000)]))
    if case.rng.random() < 0.5:
        target = case.path.with_suffix(case.rng.choice([".txt", ".nfo", ".ans", ".bin", ".m3u8", ".sdp"]))
        case.path.rename(target)
        case.path = target


def _trailing_bytes(case: Input) -> None:
    file = case.path if case.path.is_file() else case.some_file()
    with open(file, "ab") as opened:
        opened.write(case.rng.randbytes(case.rng.randint(1, 999)))


FOLDER_CHANGES = [
    _file_removed, _zeroed, _cut_short, _emptied, _broken_link, _pipe, _folder_instead, _stray, _far_number,
    _other_size, _transparent, _deep, _other_format, _deeper, _same_number, _bytes_in_name, _strange_name,
    _trailing_bytes,
]  # fmt: skip
VIDEO_CHANGES = [
    _video_zeroed, _cut_short, _emptied, _pipe, _bytes_in_name, _strange_name, _other_ending, _two_streams, _no_video,
    _trailing_bytes,
]  # fmt: skip


class _Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _difference(clip: Clip, case: Input) -> str:
    """Say in what a clip differs from the whole one, empty where it does not."""
    levels = clip.frames.reshape(len(clip.frames), -1).mean(axis=1)
    wrong = [int(n) for n, mean in zip(clip.frame_numbers, levels, strict=True)
             if n >= case.count or abs(mean - level(int(n))) > case.tolerance]  # fmt: skip
    if wrong:
        return f"frames {wrong} show something else"
    missing = sorted(set(range(case.first, case.count)) - set(clip.frame_numbers.tolist()))
    return f"frames {missing} are missing" if missing else ""


def judge(seed: int, folder: Path) -> str:
    """Make an input and read it; return what is wrong with how it went, empty where nothing is.

    Raises:
        Exception: Whatever is raised that is no line for the user.
    """
    case = Input(folder, random.Random(seed))
    heard, logger = _Heard(), logging.getLogger("aullm_dist")
    level_before = logger.level
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    try:
        clip = read_clip(case.path, size=SIZE, crop=get_crop("none"))
    except UserError as error:
        text = str(error)
        if "\n" in text or str(case.path).replace("\n", "\\n").split("/")[-1] not in text:
            return f"{case.what}: a refusal that is no line, or names nothing: {text!r}"
        return f"{case.what}: refused, and nothing is wrong with it: {text}" if case.whole else ""
    finally:
        logger.removeHandler(heard)
        logger.setLevel(level_before)
    difference = _difference(clip, case)
    if difference and not heard.lines:
        return f"{case.what}: {difference}, without a word"
    if "something else" in difference:
        return f"{case.what}: {difference}, though told {heard.lines}"
    if case.whole and heard.lines and "uneven" not in case.what:
        return f"{case.what}: nothing is wrong with it, and it said {heard.lines}"
    return ""
