"""Writes clips to Arrow shards: a worker's unit of work in `prepare`, kept across interruptions.

A shard's file name carries the hash of everything that its content depends on (clips, files with size and time,
picture size, crop), so a finished shard found on disk is either exactly the one wanted or ignored.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pyarrow as pa

from aullm_dist.data.crops import Crop, NoRegion, get_crop
from aullm_dist.data.frames import load_clip
from aullm_dist.errors import UserError

__all__ = ["MIN_FRAMES", "SCHEMA", "BadClips", "ClipPlan", "ShardTask", "run_shard", "shard_key", "shard_paths"]

BadClips = Literal["stop", "repair", "skip"]

# Movement needs two frames.
MIN_FRAMES = 2

# Raise when what a shard holds changes, so that shards and datasets of older versions are not taken for new ones.
FORMAT = 1

SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("corpus", pa.string()),
        ("subject", pa.string()),
        ("onset", pa.int32()),
        ("apex", pa.int32()),
        ("offset", pa.int32()),
        ("fps", pa.float32()),
        ("aus", pa.list_(pa.int32())),
        ("emotion", pa.string()),
        ("num_frames", pa.int32()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("frame_numbers", pa.list_(pa.int32())),
        ("frames", pa.binary()),
    ]
)
"""Columns of a prepared dataset; `frames` holds raw uint8 gray, `num_frames * height * width` bytes in C order."""


@dataclass(frozen=True, slots=True)
class ClipPlan:
    """A clip to be decoded: its label columns and its frame files, ascending."""

    labels: dict[str, object]
    numbers: tuple[int, ...]
    folder: Path
    names: tuple[str, ...]
    """Of the frame files in `folder`; text, as a corpus has hundreds of thousands."""

    @property
    def files(self) -> list[Path]:
        """The frame files, ascending."""
        return [self.folder / name for name in self.names]

    @property
    def sample_id(self) -> str:
        return str(self.labels["sample_id"])


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What a worker needs to make one shard in `folder`."""

    folder: Path
    key: str
    clips: tuple[ClipPlan, ...]
    size: int
    crop: str
    crop_fingerprint: str
    """Of the crop when the preparation began."""
    bad_clips: BadClips


def shard_key(clips: Sequence[ClipPlan], *, size: int, crop_fingerprint: str, bad_clips: BadClips) -> str:
    """Return the hash of all that a shard's content depends on; files count by name, size and time of change."""
    digest = hashlib.sha256(json.dumps([FORMAT, size, crop_fingerprint, bad_clips]).encode())
    for clip in clips:
        stats = [(file.name, *_status(file)) for file in clip.files]
        digest.update(json.dumps([clip.labels, clip.numbers, stats]).encode())
    return digest.hexdigest()[:20]


def _status(file: Path) -> tuple[int, int]:
    """Return size and time of change; of what cannot be looked at, such as a broken link, whoever reads it tells."""
    try:
        status = file.stat()
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def shard_paths(folder: Path, key: str) -> tuple[Path, Path]:
    """Return the Arrow file and the summary of a shard; the shard is finished once the summary exists."""
    return folder / f"{key}.arrow", folder / f"{key}.json"


def run_shard(task: ShardTask) -> int:
    """Decode the clips of a task and write its shard; returns the number of clips that were worked on.

    Raises:
        UserError: A frame cannot be read, or a crop finds nothing, and bad clips stop the preparation.
    """
    arrow_path, summary_path = shard_paths(task.folder, task.key)
    rows: list[dict[str, object]] = []
    notes: list[tuple[str, str, str]] = []
    for clip in task.clips:
        row, kind, text = _decode(clip, task)
        if row:
            rows.append(row)
        if text:
            notes.append((kind, clip.sample_id, text))
    # The process id keeps two preparations of one folder from writing into one file.
    partial = arrow_path.with_suffix(f".{os.getpid()}.tmp")
    with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for row in rows:
            writer.write_batch(pa.RecordBatch.from_pylist([row], schema=SCHEMA))
    os.replace(partial, arrow_path)
    counted = [{key: row[key] for key in ("sample_id", "subject", "aus", "emotion", "num_frames")} for row in rows]
    partial.write_text(json.dumps({"clips": counted, "notes": notes}))
    os.replace(partial, summary_path)
    return len(task.clips)


@lru_cache(maxsize=1)
def _crop(text: str, fingerprint: str) -> Crop:
    """Return the crop, made once in a worker: a detector may take long to load."""
    crop = get_crop(text)
    if crop.fingerprint != fingerprint:
        raise UserError(f"--crop {text}: changed during the preparation; start it again")
    return crop


def _decode(clip: ClipPlan, task: ShardTask) -> tuple[dict[str, object] | None, str, str]:
    """Return the row of a clip or None, and what was done about unreadable frames (kind and text, or empty)."""
    try:
        stack, failures = load_clip(
            clip.files, size=task.size, crop=_crop(task.crop, task.crop_fingerprint), clip=clip.sample_id
        )
    except NoRegion as error:
        if task.bad_clips == "stop":
            raise UserError(
                f"{clip.sample_id}: {error}; choose another --crop, or use --bad-clips repair|skip"
            ) from error
        return None, "skipped", str(error)
    kind, text = "", ""
    if failures:
        more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        text = failures[0][1] + more
        if task.bad_clips == "stop":
            raise UserError(f"{clip.sample_id}: {text}; replace the file, or use --bad-clips repair|skip")
        if task.bad_clips == "skip" or len(stack) < MIN_FRAMES:
            return None, "skipped", text
        kind = "repaired"
        text = f"{text}: kept with the {len(stack)} readable frames of {len(clip.names)}"
    failed = {position for position, _ in failures}
    numbers = [number for position, number in enumerate(clip.numbers) if position not in failed]
    row = {
        **clip.labels,
        "num_frames": len(stack),
        "height": task.size,
        "width": task.size,
        "frame_numbers": numbers,
        "frames": stack.tobytes(),
    }
    return row, kind, text
