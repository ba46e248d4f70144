"""Turns a corpus release into a prepared Hugging Face dataset: checked, in several processes, resumable.

All work happens in `OUT.partial/`; the finished dataset is renamed to OUT in one step, so OUT is either absent or
complete. After an interruption the finished shards in `OUT.partial/` are used again. Bad input under "stop" removes
`OUT.partial/`.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import get_args

from aullm_dist import __version__
from aullm_dist.data.corpora import CorpusIndex, Note, get_corpus, read_corpus
from aullm_dist.data.corpora.explain import as_json, explain
from aullm_dist.data.crops import Crop, get_crop
from aullm_dist.data.manifest import check_dataset, write_dataset_manifest
from aullm_dist.data.preparation.matching import plan_clips
from aullm_dist.data.preparation.shards import BadClips, ShardTask, run_shard, shard_key, shard_paths
from aullm_dist.data.records import REPORT_NAME, SPEC_FILE, read_report
from aullm_dist.data.tables import open_part, write_arrow, write_parquet
from aullm_dist.errors import UserError, file_errors
from aullm_dist.files import is_new_or_empty, user_path
from aullm_dist.log import get_logger

__all__ = ["prepare"]


FORMATS = ("arrow", "parquet")
_MAX_SIZE = 2048
# Small enough that an interruption costs seconds and the progress moves, large enough that files stay few.
_CLIPS_PER_SHARD = 8
# Starting a worker costs about as much as decoding this many frames.
_FRAMES_PER_WORKER = 2000
_LISTED = 3

logger = get_logger(__name__)

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """How a corpus is prepared."""

    size: int = 64
    """Height and width of the frames, in pixels."""
    crop: str = "none"
    """What part of the frames is kept, as `crops.get_crop` reads it."""
    bad_clips: BadClips = "stop"
    """What to do about unusable rows, missing folders and missing or unreadable frames: "stop"; "repair" keeps a clip
    with the frames that exist (at least 2) and skips the rest; "skip" leaves out every clip with a defect."""
    num_workers: int | None = None
    """Processes; None for as many as the CPUs and the work allow, 1 for this one alone."""
    fmt: str = "arrow"
    """`arrow`, files that are mapped into memory, or `parquet`, files that can also be streamed."""
    errata: str | Path | None = None
    """Frozen corrections to use in place of the published row numbers; see `corpora.errata`."""


def prepare(
    corpus: str,
    root: str | Path,
    out: str | Path,
    options: PrepareOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Write the dataset of a corpus to `out` (see `shards.SCHEMA`) with a `report.json` in it.

    Args:
        corpus: Name in `corpora.CORPORA`.
        root: Folder of the release.
        out: Folder to be made. A finished preparation of the same input with the same arguments is left as it is.
        options: How; None takes the defaults.
        progress: Called with (clips done, clips in all).

    Returns:
        The report. Its key `already_prepared` tells whether `out` was there before.

    Raises:
        UserError: Bad arguments, bad input under "stop", or `out` is taken.
    """
    # Whatever has no better line: the release is on a disk that may refuse anything at any time.
    with file_errors(str(root)):
        return _prepare(corpus, root, out, options or PrepareOptions(), progress)


def _prepare(
    corpus: str, root: str | Path, out: str | Path, options: PrepareOptions, progress: Progress | None
) -> dict[str, object]:
    size, crop, bad_clips, fmt = options.size, options.crop, options.bad_clips, options.fmt
    _check_arguments(corpus, size, bad_clips, options.num_workers, fmt)
    fitted = get_crop(crop)
    out = _outside(root, user_path(out).absolute())
    previous = _previous_report(out)
    index = read_corpus(corpus, root, bad_rows="stop" if bad_clips == "stop" else "skip", errata=options.errata)
    plans, notes = plan_clips(index, bad_clips)
    groups = [plans[start : start + _CLIPS_PER_SHARD] for start in range(0, len(plans), _CLIPS_PER_SHARD)]
    keys = [shard_key(group, size=size, crop_fingerprint=fitted.fingerprint, bad_clips=bad_clips) for group in groups]
    notes = [*index.notes, *notes, *_unused_rows(crop, fitted, index)]
    told = [str(note) for note in notes] + ([fmt] if fmt != "arrow" else [])
    fingerprint = hashlib.sha256(json.dumps([corpus, keys, told]).encode()).hexdigest()
    if previous is not None:
        if previous.get("fingerprint") == fingerprint:
            check_dataset(out)
            open_part(out)
            return {**previous, "already_prepared": True}
        raise UserError(
            f"{out}: holds a dataset prepared from other input or with other options; remove it or choose another"
        )
    if not plans:
        raise _nothing_left(index, notes)

    work = out.with_name(out.name + ".partial")
    shards = _make_work_folder(work)
    tasks = [
        ShardTask(shards, key, tuple(group), size, crop, fitted.fingerprint, bad_clips)
        for key, group in zip(keys, groups, strict=True)
    ]
    with file_errors(str(work), writing=True), _work_or_nothing(work):
        _run_tasks(tasks, options.num_workers, progress or (lambda done, total: None))
        summaries = [json.loads(shard_paths(shards, key)[1].read_text()) for key in keys]
        report = _report(index, root, size, (fitted.identity, crop), bad_clips, notes, summaries, fingerprint)
    with file_errors(str(work), writing=True):
        _publish([shard_paths(shards, key)[0] for key in keys], report, work, out, fmt)
    return {**report, "already_prepared": False}


def _unused_rows(crop: str, fitted: Crop, index: CorpusIndex) -> list[Note]:
    """Tell of rows in a table of boxes that name no clip: a row of `*` may have stood in for a mistyped one."""
    unused = fitted.unused({record.sample_id for record in index.records})
    if not unused:
        return []
    more = ", ..." if len(unused) > _LISTED else ""
    text = f"{len(unused)} rows name no clip of this corpus: {', '.join(unused[:_LISTED])}{more}"
    return [Note("noted", f"--crop {crop}", text)]


@contextmanager
def _work_or_nothing(work: Path) -> Iterator[None]:
    """Remove the work folder after a mistake in the input; what a dead worker or an interruption left is kept."""
    try:
        yield
    except UserError:
        shutil.rmtree(work)
        raise
    except BrokenProcessPool as error:
        raise UserError(
            f"{work}: a worker process was ended, by the system for lack of memory, or by someone; finished work is "
            "kept: try --workers 1"
        ) from error


def _outside(root: str | Path, out: Path) -> Path:
    if not out.as_posix().isascii():
        try:
            str(out).encode()
        except UnicodeEncodeError as error:
            raise UserError(f"--out {out}: the name is no UTF-8; choose another") from error
    # Not `Path.resolve`, which takes a link to itself for a fault of the program.
    if Path(os.path.realpath(out)).is_relative_to(os.path.realpath(user_path(root))):
        raise UserError(
            f"--out {out}: lies inside --root {root}; give a folder outside the release, which is only read"
        )
    return out


def _check_arguments(corpus: str, size: int, bad_clips: str, num_workers: int | None, fmt: str) -> None:
    get_corpus(corpus)
    if not 8 <= size <= _MAX_SIZE:
        raise UserError(f"--size {size}: allowed: 8 to {_MAX_SIZE} pixels")
    if bad_clips not in get_args(BadClips):
        raise UserError(f"--bad-clips {bad_clips}: allowed: {', '.join(get_args(BadClips))}")
    if fmt not in FORMATS:
        raise UserError(f"--format {fmt}: allowed: {', '.join(FORMATS)}")
    if num_workers is not None and num_workers < 1:
        raise UserError(f"--workers {num_workers}: allowed: 1 or more")


def _previous_report(out: Path) -> dict[str, object] | None:
    """Return the report of a finished preparation at `out`, None where `out` is free.

    Raises:
        UserError: Something else is there.
    """
    if is_new_or_empty(out):
        return None
    if out.is_dir() and (report := read_report(out, "remove the folder, or choose another")) is not None:
        return report
    raise UserError(f"{out}: exists and is no prepared dataset; allowed: a new or empty folder")


def _make_work_folder(work: Path) -> Path:
    """Make or reuse the work folder and return the folder of its shards."""
    try:
        # It is removed in the end, so it must not hold anything of the user's.
        if work.exists() and {path.name for path in work.iterdir()} - {"shards", "dataset"}:
            raise UserError(f"{work}: holds files that are not of an interrupted preparation; choose another --out")
        (work / "shards").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{work}: cannot be made ({error.strerror}); allowed: a folder you may write to") from error
    return work / "shards"


def _run_tasks(tasks: Sequence[ShardTask], num_workers: int | None, progress: Progress) -> None:
    """Make the shards that are not finished yet; the first error cancels the rest."""
    total = sum(len(task.clips) for task in tasks)
    waiting = [task for task in tasks if not shard_paths(task.folder, task.key)[1].exists()]
    done = total - sum(len(task.clips) for task in waiting)
    if done:
        logger.info("resumed: %d of %d clips were decoded before", done, total)
    progress(done, total)
    num_workers = _count_workers(waiting, num_workers)
    if num_workers == 1:
        for task in waiting:
            done += run_shard(task)
            progress(done, total)
        return
    # Spawned, not forked: the caller may have threads (torch, pyarrow) that do not survive a fork.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        try:
            with _main_hidden():
                futures = [pool.submit(run_shard, task) for task in waiting]
            for future in as_completed(futures):
                done += future.result()
                progress(done, total)
        finally:
            # After an error or Ctrl-C what has not started is dropped, or leaving the pool would wait for all of it.
            pool.shutdown(cancel_futures=True)


@contextmanager
def _main_hidden() -> Iterator[None]:
    """Start workers that do not import the main script, which they do not need.

    A script that calls `prepare` without `if __name__ == "__main__"` would run in each of them, and start workers
    again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _count_workers(tasks: Sequence[ShardTask], num_workers: int | None) -> int:
    if num_workers is None:
        num_frames = sum(len(clip.names) for task in tasks for clip in task.clips)
        num_workers = min(len(os.sched_getaffinity(0)), 1 + num_frames // _FRAMES_PER_WORKER)
    return max(1, min(num_workers, len(tasks)))


def _report(
    index: CorpusIndex,
    root: str | Path,
    size: int,
    crop: tuple[str, str],
    bad_clips: str,
    notes: Sequence[Note],
    summaries: Sequence[dict],
    fingerprint: str,
) -> dict[str, object]:
    clips = [clip for summary in summaries for clip in summary["clips"]]
    notes = [*notes, *(Note(*note) for summary in summaries for note in summary["notes"])]
    if not clips:
        raise _nothing_left(index, notes)
    spec = get_corpus(index.corpus)
    aus = Counter(au for clip in clips for au in clip["aus"])

    def told(kind: str) -> list[dict[str, str]]:
        return [{"where": note.where, "what": note.text} for note in notes if note.kind == kind]

    return {
        "corpus": index.corpus,
        "title": spec.title,
        "root": str(user_path(root).absolute()),
        # The corpus may be elsewhere, or gone, when somebody asks.
        "synthetic": (user_path(root) / SPEC_FILE).is_file(),
        "frames_root": str(index.frames_root),
        "workbook": {"file": str(index.table.file), "sheet": index.table.sheet, "sha256": index.table.sha256()},
        "size": size,
        "crop": crop[0],
        "crop_argument": crop[1].partition(":")[2] or None,
        "bad_clips": bad_clips,
        "fps": spec.fps,
        "num_clips": len(clips),
        "num_frames": sum(clip["num_frames"] for clip in clips),
        "aus": {str(au): aus[au] for au in sorted(aus)},
        "subjects": dict(sorted(Counter(clip["subject"] for clip in clips).items())),
        "emotions": dict(sorted(Counter(clip["emotion"] for clip in clips).items())),
        "published": {
            "num_clips": spec.published_clips,
            "aus": {str(au): count for au, count in spec.published_aus.items()},
        },
        "differences": as_json(explain(spec, index, (clip["sample_id"] for clip in clips), notes)),
        "repairs": told("repaired"),
        "skips": told("skipped"),
        "unmatched_errata": told("unmatched"),
        "notes": told("noted"),
        "versions": {
            "aullm_dist": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("datasets", "pyarrow", "pillow", "opencv-python-headless", "openpyxl")},
        },
        "fingerprint": fingerprint,
    }


def _nothing_left(index: CorpusIndex, notes: Sequence[Note]) -> UserError:
    reasons = [str(note) for note in notes if note.kind == "skipped"]
    why = f"the first of {len(reasons)} skipped: {reasons[0]}" if reasons else "the sheet has no rows"
    return UserError(
        f"{index.table.file}: no usable clip ({why}); allowed: a sheet with clips found in {index.frames_root}"
    )


def _publish(shards: Sequence[Path], report: dict[str, object], work: Path, out: Path, fmt: str) -> None:
    """Join the shards into one dataset next to them and rename it to `out`."""
    final = work / "dataset"
    shutil.rmtree(final, ignore_errors=True)
    if fmt == "parquet":
        write_parquet(shards, final)
    else:
        write_arrow(shards, final, str(report["fingerprint"]))
    (final / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
    write_dataset_manifest(final)
    try:
        os.rename(final, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be put in place ({error.strerror}); the finished dataset is {final}") from error
    shutil.rmtree(work)
