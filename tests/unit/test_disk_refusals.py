# ruff: noqa: PT017 - which failures are refused is what is counted here.
"""Whatever the system refuses to read or write of a user's files ends in one line, never in a traceback or unnoticed.

Each test makes a call once, counting the file operations under the user's folders, and then again for each of them,
which fails.
"""

import builtins
import errno
import io
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from corpus_fixtures import casme2_row, make_casme2
from PIL import Image

from aullm_dist.data.clips import ClipStore
from aullm_dist.data.corpora import read_corpus
from aullm_dist.data.corpora.errata import read_frozen
from aullm_dist.data.crops import get_crop
from aullm_dist.data.inputs import InputClips
from aullm_dist.data.manifest import verify_dataset
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.data.reading import read_clip
from aullm_dist.errors import UserError

REFUSALS = [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENOSPC]
OPERATIONS = [(builtins, "open"), (io, "open"), (os, "open"), (os, "listdir"), (os, "scandir"), (os, "stat")]


class Disk:
    """Counts operations on paths below a folder, and lets one of them fail."""

    def __init__(self, below: Path) -> None:
        self.below = str(below)
        self.calls: list[str] = []
        self.fails_at, self.error = -1, 0

    def wrapped(self, operation: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.below):
                self.calls.append(f"{name} {path}")
                if len(self.calls) - 1 == self.fails_at:
                    raise OSError(self.error, os.strerror(self.error), os.fspath(path))
            return operation(path, *args, **kwargs)

        return call


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch, below: Path, fails_at: int = -1, error: int = 0) -> Iterator[Disk]:
    disk = Disk(below)
    disk.fails_at, disk.error = fails_at, error
    with monkeypatch.context() as patch:
        for module, name in OPERATIONS:
            patch.setattr(module, name, disk.wrapped(getattr(module, name), name))
        yield disk


def sweep(monkeypatch, below: Path, work: Callable[[], Any], same: Callable[[Any, Any], bool]) -> int:
    """Let each file operation of `work` fail once; return how many failures it refused."""
    with watched(monkeypatch, below) as disk:
        wanted = work()
    assert disk.calls
    refused = 0
    for number in range(len(disk.calls)):
        with watched(monkeypatch, below, number, REFUSALS[number % len(REFUSALS)]) as again:
            try:
                found = work()
            except UserError as error:
                assert str(below) in str(error), (again.calls[-1], str(error))
                assert "\n" not in str(error)
                refused += 1
                continue
            # Nobody needed to know, or the reading went on by another way: the result must be what it was.
            assert same(found, wanted), again.calls[number]
    assert refused > 0
    return refused


@pytest.fixture
def release(tmp_path) -> Path:
    rows = [casme2_row(1, "EP01", 9, 10, 11, "4+R12"), casme2_row(2, "EP02", 3, 4, 5, "1")]
    return make_casme2(tmp_path / "release", rows)


def contents(folder: Path) -> list[dict[str, Any]]:
    return datasets.load_from_disk(str(folder)).to_list()


def test_a_preparation_tells_of_every_file_that_it_cannot_read(release, tmp_path, monkeypatch):
    (tmp_path / "release" / "boxes.csv").write_text("clip,left,top,right,bottom\n*,1,1,30,20\n")
    out = tmp_path / "out"

    def work() -> list[dict[str, Any]]:
        shutil.rmtree(out, ignore_errors=True)
        crop = f"boxes:{release / 'boxes.csv'}"
        prepare("casme2", release, out, PrepareOptions(size=8, num_workers=1, crop=crop))
        return contents(out)

    assert sweep(monkeypatch, release, work, lambda found, wanted: found == wanted) > 20


def test_a_preparation_tells_of_every_file_that_it_cannot_write(release, tmp_path, monkeypatch):
    target = tmp_path / "target"
    target.mkdir()
    names = count()

    def work() -> Path:
        out = target / str(next(names))
        prepare("casme2", release, out, PrepareOptions(size=8, num_workers=1))
        return out

    sweep(monkeypatch, target, work, lambda found, wanted: contents(found) == contents(wanted))


def test_the_index_of_a_corpus_alone(release, monkeypatch):
    # A folder that leads to itself is none; a clip without a folder is a defect, which the preparation tells.
    def same(found, wanted) -> bool:
        pairs = zip(found, wanted, strict=True)
        return all(a == b or a == replace(b, folder=None) for a, b in pairs)

    sweep(monkeypatch, release, lambda: read_corpus("casme2", release).records, same)


def test_frozen_corrections(release, tmp_path, monkeypatch):
    (tmp_path / "errata.json").write_text('{"corpus": "casme2", "corrections": []}')
    sweep(monkeypatch, tmp_path, lambda: read_frozen(tmp_path / "errata.json", "casme2"), lambda a, b: a == b)


def same_clip(found, wanted) -> bool:
    return np.array_equal(found.frames, wanted.frames) and np.array_equal(found.frame_numbers, wanted.frame_numbers)


def test_a_folder_of_frames(tmp_path, monkeypatch):
    for number in range(4):
        Image.new("L", (30, 20), 40 * number).save(tmp_path / f"img{number}.png")
    sweep(monkeypatch, tmp_path, lambda: read_clip(tmp_path, size=8, crop=get_crop("none")), same_clip)


def test_a_video(tmp_path, monkeypatch):
    import cv2

    writer = cv2.VideoWriter(str(tmp_path / "clip.avi"), cv2.VideoWriter.fourcc(*"FFV1"), 30, (32, 32))
    for number in range(4):
        writer.write(np.full((32, 32, 3), 40 * number, np.uint8))
    writer.release()
    sweep(monkeypatch, tmp_path, lambda: read_clip(tmp_path / "clip.avi", size=8, crop=get_crop("none")), same_clip)


def test_inputs_and_datasets(release, tmp_path, monkeypatch):
    place = tmp_path / "place"
    place.mkdir()
    prepare("casme2", release, place / "dataset", PrepareOptions(size=8, num_workers=1))
    (place / "clip").mkdir()
    for number in range(3):
        Image.new("L", (30, 20), 40 * number).save(place / "clip" / f"img{number}.png")

    def work() -> list[str]:
        assert verify_dataset(place / "dataset") is not None
        clips = InputClips([str(place / "dataset"), str(place / "clip")], size=8, trained=["none"])
        clips.read([2])
        assert len(ClipStore([place / "dataset"], 8).samples) == 2
        return [sample.sample_id for sample in clips.samples]

    sweep(monkeypatch, place, work, lambda a, b: a == b)
