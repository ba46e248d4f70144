"""Loads prepared clips as arrays: views of fixed samples, temporal sampling and augmentation."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aullm_dist.data.crops import recorded_crop
from aullm_dist.data.manifest import check_dataset
from aullm_dist.data.protocols import SampleInfo
from aullm_dist.data.records import read_report
from aullm_dist.data.tables import ClipTable, open_part, parquet_files
from aullm_dist.errors import UserError

_BLOCKS = 16
"""Blocks along each side of a frame, in which changes are looked for (`most_changed`)."""


@dataclass(frozen=True, slots=True)
class Clip:
    """One decoded clip: gray frames `[T, H, W]` uint8 and their file frame numbers `[T]`."""

    sample_id: str
    frames: np.ndarray
    frame_numbers: np.ndarray
    apex: int | None = None
    """Number of the annotated apex frame, where there is an annotation."""
    times: np.ndarray | None = None
    """Time of each frame in milliseconds `[T]`, where the frames are not evenly spaced as their numbers are."""


class ClipStore:
    """All prepared clips of a run, addressed by sample id.

    Args:
        folders: folders written by `aullm-dist prepare`.
        size: image side in pixels that the run expects.
        crops: identities of the crops that the run expects; none given takes whatever the folders were cut with.

    Attributes:
        samples: what is known of each clip, in the order of the folders.
        corpora: names of the corpora in each folder.
        crops: identities of the crops that the folders were prepared with, sorted, each once.

    Raises:
        UserError: a folder is missing, is no prepared dataset, is damaged, has another image size or crop, or repeats a
            sample id.
    """

    def __init__(self, folders: Sequence[str | Path], size: int, crops: Sequence[str] = ()) -> None:
        self._folders = tuple(map(Path, folders))
        for folder in self._folders:
            check_dataset(folder)
        parts = [open_part(folder) for folder in self._folders]
        for folder, part in zip(self._folders, parts, strict=True):
            if (part[0]["height"], part[0]["width"]) != (size, size):
                raise UserError(
                    f"{folder}: clips are {part[0]['width']}x{part[0]['height']} pixels, data.size is {size}; "
                    f"set data.size or prepare again with --size {size}"
                )
        self.crops = tuple(sorted({_crop_of(folder, crops) for folder in self._folders}))
        infos = [_samples_of(part) for part in parts]
        self.corpora: tuple[frozenset[str], ...] = tuple(frozenset(info.corpus for info in part) for part in infos)
        self._table = ClipTable(parts)
        self._folder_of = [folder for folder, part in zip(self._folders, infos, strict=True) for _ in part]
        self.samples = _joined(infos, folders)
        self._rows = {sample.sample_id: row for row, sample in enumerate(self.samples)}

    @property
    def fingerprint(self) -> str:
        """SHA-256 over ids and labels of all clips and over what each preparation says of its input and options."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(f"{sample.sample_id} {sorted(sample.aus)}\n".encode())
        for folder in self._folders:
            report = read_report(folder)
            if report is not None:
                digest.update(str(report.get("fingerprint")).encode())
        return digest.hexdigest()

    def parquet_of(self, sample_ids: Sequence[str]) -> list[Path]:
        """Return the Parquet files of the folders that hold `sample_ids`.

        Raises:
            UserError: one of the folders was not prepared as Parquet.
        """
        folders = dict.fromkeys(self._folder_of[self._rows[name]] for name in sample_ids)
        for folder in folders:
            if not parquet_files(folder):
                raise UserError(f"{folder}: data.streaming needs Parquet; prepare the corpus with --format parquet")
        return [file for folder in folders for file in parquet_files(folder)]

    def view(self, sample_ids: Sequence[str]) -> "ClipView":
        """Return the part of the store that holds `sample_ids`, in that order."""
        return ClipView(self._table.select([self._rows[i] for i in sample_ids]), [self._info(i) for i in sample_ids])

    def _info(self, sample_id: str) -> SampleInfo:
        return self.samples[self._rows[sample_id]]


def _crop_of(folder: Path, allowed: Sequence[str]) -> str:
    crop = recorded_crop(read_report(folder))
    if allowed and crop not in allowed:
        wanted = " or ".join(allowed)
        raise UserError(
            f"{folder}: was prepared with crop {crop}, but {wanted} is wanted, by data.crops or by what the model was "
            f"trained on; prepare again with --crop {wanted}"
        )
    return crop


def _samples_of(part: Any) -> tuple[SampleInfo, ...]:
    return tuple(
        SampleInfo(sample_id=row["sample_id"], subject=row["subject"], corpus=row["corpus"], aus=tuple(row["aus"]))
        for row in part.info()
    )


def _joined(infos: Sequence[tuple[SampleInfo, ...]], folders: Sequence[str | Path]) -> tuple[SampleInfo, ...]:
    samples = tuple(sample for part in infos for sample in part)
    if len({sample.sample_id for sample in samples}) != len(samples):
        raise UserError(f"{folders[-1]}: a sample id occurs twice over the given datasets; name each dataset once")
    return samples


def read_samples(folders: Sequence[str | Path]) -> tuple[SampleInfo, ...]:
    """Return what is known of each clip of prepared datasets, of whatever image size, without decoding any.

    Raises:
        UserError: a folder is missing, is no prepared dataset, or a sample id occurs twice.
    """
    return _joined([_samples_of(open_part(Path(folder))) for folder in folders], folders)


def clip_of_row(row: Mapping[str, Any]) -> Clip:
    """Decode one row of a prepared dataset.

    Raises:
        UserError: the row contradicts itself.
    """
    shape = (row["num_frames"], row["height"], row["width"])
    held = (len(row["frames"]), len(row["frame_numbers"]))
    if held != (int(np.prod(shape)), shape[0]):
        raise UserError(
            f"{row['sample_id']}: holds {held[0]} bytes and {held[1]} frame numbers for frames {list(shape)}; the "
            "dataset is damaged: prepare the corpus again"
        )
    frames = np.frombuffer(row["frames"], dtype=np.uint8).reshape(shape)
    return Clip(row["sample_id"], frames, np.asarray(row["frame_numbers"], dtype=np.int64), row.get("apex"))


class ClipView:
    """A fixed set of clips with their labels; nothing outside the set can be reached through it."""

    def __init__(self, table: ClipTable, samples: Sequence[SampleInfo]) -> None:
        self._table = table
        self.samples = tuple(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def clip(self, index: int) -> Clip:
        """Decode clip `index` of this view."""
        return clip_of_row(self._table[index])

    def labels(self, aus: Sequence[int]) -> np.ndarray:
        """Return `[N, A]` float32, 1 where the AU is active."""
        return np.array([[float(au in sample.aus) for au in aus] for sample in self.samples], dtype=np.float32)


def sample_frames(clip: Clip, num_frames: int, cut: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """Sample `num_frames` frames uniformly in time over onset..offset.

    Times are those of the frames, where a video has uneven ones, or else file frame numbers, so dropped frames leave no
    jump. A clip with fewer frames than asked is interpolated
    linearly in time; otherwise the nearest stored frame is taken.

    Args:
        clip: the decoded clip.
        num_frames: T.
        cut: shares of the duration left out at the start and at the end.

    Returns:
        `[T, H, W]` float32 in 0..1.
    """
    numbers = clip.frame_numbers if clip.times is None else clip.times
    first, last = float(numbers[0]), float(numbers[-1])
    duration = last - first
    times = np.linspace(first + cut[0] * duration, last - cut[1] * duration, num_frames)
    right = np.clip(np.searchsorted(numbers, times), 1, max(len(numbers) - 1, 1)) if len(numbers) > 1 else None
    if right is None:
        return np.repeat(clip.frames, num_frames, axis=0).astype(np.float32) / 255.0
    left = right - 1
    weight = (times - numbers[left]) / (numbers[right] - numbers[left])
    if len(numbers) >= num_frames:
        weight = np.round(weight)
    weight = weight.astype(np.float32)[:, None, None]
    frames = clip.frames[left] * (1.0 - weight) + clip.frames[right] * weight
    return (frames / np.float32(255.0)).astype(np.float32)


def most_changed(clip: Clip) -> int:
    """Return the index of the frame in which the clip's main change from its onset frame is largest (ours).

    The change is averaged over blocks of pixels, without what brightens or darkens the whole frame, and its first
    principal component is followed over time: noise would choose the frame otherwise. It is a frame worth looking at
    and no estimate of the apex.
    """
    side = clip.frames.shape[1] // _BLOCKS
    kept = clip.frames[:, : side * _BLOCKS, : side * _BLOCKS].astype(np.float64)
    blocks = kept.reshape(len(kept), _BLOCKS, side, _BLOCKS, side).mean(axis=(2, 4))
    change = blocks - blocks[0]
    change -= change.mean(axis=(1, 2), keepdims=True)
    course = np.linalg.svd(change.reshape(len(kept), -1), full_matrices=False)[0][:, 0]
    return int(np.abs(course).argmax())


def apex_index(clip: Clip) -> tuple[int, bool]:
    """Return the index of the annotated apex frame and true, or that of the largest change and false.

    The second is for clips whose annotation is missing or names a frame that is not stored (`most_changed`).
    """
    found: list[int] = [] if clip.apex is None else np.flatnonzero(clip.frame_numbers == clip.apex).tolist()
    return (found[0], True) if len(found) else (most_changed(clip), False)


def augment(clip: np.ndarray, rng: np.random.Generator, max_shift: int = 3) -> np.ndarray:
    """Move the whole clip by up to `max_shift` pixels and scale its brightness, the same for all frames `[T, H, W]`."""
    rows, columns = rng.integers(-max_shift, max_shift + 1, size=2)
    padded = np.pad(clip, [(0, 0), (max_shift, max_shift), (max_shift, max_shift)], mode="edge")
    height, width = clip.shape[1:]
    top, left = max_shift + rows, max_shift + columns
    moved = padded[:, top : top + height, left : left + width]
    return np.clip(moved * np.float32(rng.uniform(0.9, 1.1)), 0.0, 1.0).astype(np.float32)
