"""Stores the clips that the page sends in a temporary folder, and reads their frames for the sliders."""

import secrets
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from io import BufferedIOBase
from pathlib import Path

from PIL import Image

from aullm_dist.app.refusals import Refused, collect_warnings
from aullm_dist.data.decoding.pictures import read_picture
from aullm_dist.data.decoding.videos import read_video
from aullm_dist.data.listing import FRAME_SUFFIXES, list_folder
from aullm_dist.errors import UserError
from aullm_dist.log import get_logger

__all__ = ["MOST_FRAMES", "Upload", "Uploads"]

logger = get_logger(__name__)

MOST_FRAMES = 3000
"""Frames of one clip: a micro-expression takes half a second, which is 100 frames of the fastest corpus camera."""
_KEPT = 4
"""Clips that are kept; a new one takes the place of the oldest."""
_LONGEST_NAME = 200
"""Bytes of a file's name; file systems take 255."""
_SIDE = 400
"""Pixels of the longer side of a frame on the page."""
_CHUNK = 1 << 20


@dataclass(slots=True)
class Upload:
    """A clip of the page: its files, and after `read` its frames."""

    folder: Path
    """Holds `files` as they came, and `frames` for the page."""
    name: str
    """As the user knows it: the name of the video, or of the folder of frames."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Bytes of each file."""
    numbers: list[int] = field(default_factory=list)
    """Frame numbers, as `aullm-dist predict` counts them; empty before `read`."""

    @property
    def path(self) -> Path:
        """Return the video file, or the folder of frames."""
        files = self.folder / "files"
        if len(self.sizes) == 1:
            (only,) = self.sizes
            if not only.lower().endswith(FRAME_SUFFIXES):
                return files / only
        return files

    def frame(self, number: int) -> Path:
        """Return the picture of a frame for the page, a JPEG file."""
        return self.folder / "frames" / f"{number}.jpg"

    def in_words(self, error: UserError | str) -> str:
        """Return a message about this clip with the names that the user knows."""
        files = self.folder / "files"
        return str(error).replace(f"{files}/", "").replace(str(files), self.name)

    def read(self) -> list[str]:
        """Read every frame, keep a small gray picture of each, and return warnings about the clip.

        Raises:
            UserError: it is no video and no frames, it is damaged, or it has too many frames.
        """
        if not self.sizes:
            raise UserError(f"{self.name}: no files; drop a video, or the frames of one clip")
        (self.folder / "frames").mkdir(exist_ok=True)
        numbers: list[int] = []
        with collect_warnings() as warnings:
            for number, image in self._frames():
                if len(numbers) == MOST_FRAMES:
                    raise UserError(f"{self.name}: more than {MOST_FRAMES} frames; allowed: the movement alone")
                image.thumbnail((_SIDE, _SIDE))
                image.save(self.frame(number), quality=85)
                numbers.append(number)
        if len(numbers) < 2:
            raise UserError(f"{self.name}: {len(numbers)} frame; allowed: 2 or more, such as a video or several frames")
        self.numbers = numbers
        return [self.in_words(line) for line in warnings]

    def _frames(self) -> Iterator[tuple[int, Image.Image]]:
        path = self.path
        if not path.is_dir():
            for number, _, image in read_video(path):
                yield number, image.convert("L")
            return
        listed = list_folder(path)
        if not listed.frames:
            others = listed.instead() or f"{len(self.sizes)} files of other types"
            raise UserError(
                f"{self.name}: no frames in it; allowed: one video, or numbered {', '.join(FRAME_SUFFIXES)} files of "
                f"one clip; given: {others}"
            )
        if left := listed.left_out():
            logger.warning("%s: %s", path, left)
        for number, file in listed.frames.items():
            yield number, read_picture(file).gray((_SIDE, _SIDE))


class Uploads:
    """The clips of one server, in a folder of its own.

    Args:
        folder: empty, of this server alone.
        max_bytes: of all files of one clip.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self.max_bytes = folder, max_bytes
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.Lock()

    def add(self, name: str) -> str:
        """Make room for a clip and return its identifier.

        Raises:
            Refused: the name is none.
        """
        checked = _file_name(name)
        key = secrets.token_hex(8)
        folder = self._folder / key
        (folder / "files").mkdir(parents=True)
        with self._lock:
            self._uploads[key] = Upload(folder, checked)
            dropped = [self._uploads.pop(old) for old in list(self._uploads)[:-_KEPT]]
        for upload in dropped:
            shutil.rmtree(upload.folder, ignore_errors=True)
        return key

    def get(self, key: str) -> Upload:
        """Return a clip.

        Raises:
            Refused: there is none, or none any more.
        """
        with self._lock:
            if key in self._uploads:
                return self._uploads[key]
        raise Refused("this clip is no longer here; drop it again", HTTPStatus.NOT_FOUND)

    def keys(self) -> frozenset[str]:
        """Return the identifiers of the clips that are here."""
        with self._lock:
            return frozenset(self._uploads)

    def check_size(self, length: int) -> None:
        """Refuse a body, of a file or of all files of a clip, above the limit.

        Raises:
            Refused: it is longer.
        """
        if length > self.max_bytes:
            raise Refused(
                f"{length / 2**20:.1f} MB; allowed: {self.max_bytes / 2**20:g} MB in all, which --max-mb changes",
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            )

    def store(self, key: str, name: str, body: BufferedIOBase, length: int) -> None:
        """Write one file of a clip.

        Args:
            key: of the clip.
            name: of the file.
            body: its content.
            length: its bytes.

        Raises:
            Refused: the name is none or was given before, the clip becomes too large, or the content ends early.
        """
        upload, name = self.get(key), _file_name(name)
        with self._lock:
            if upload.numbers:
                raise Refused("this clip was read already; drop the other files as another", HTTPStatus.CONFLICT)
            if name in upload.sizes:
                raise Refused(f"two files are called {name}; drop the frames of one clip", HTTPStatus.CONFLICT)
            self.check_size(sum(upload.sizes.values()) + length)
            upload.sizes[name] = length
        left = length
        with open(upload.folder / "files" / name, "xb") as file:
            while left:
                chunk = body.read(min(left, _CHUNK))
                if not chunk:
                    raise Refused(f"{name}: the upload ended {left} bytes early; drop it again", HTTPStatus.BAD_REQUEST)
                file.write(chunk)
                left -= len(chunk)


def _file_name(name: str) -> str:
    """Return a name that stays inside of its folder on every file system."""
    size = len(name.encode("utf-8", "surrogatepass"))
    if not name.strip(" .") or set(name) & set("/\\\0") or not name.isprintable() or size > _LONGEST_NAME:
        shown = name.encode("ascii", "backslashreplace").decode()[:40]
        raise Refused(
            f"file name {shown!r}; allowed: printable names of up to {_LONGEST_NAME} bytes without / and \\",
            HTTPStatus.BAD_REQUEST,
        )
    return name
