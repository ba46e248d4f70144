"""From a corpus release to a prepared Hugging Face dataset, checked, in several processes, resumable.

All work happens in `OUT.partial/`; the finished dataset is renamed to OUT in one step, so OUT is either absent or
complete. After an interruption the finished shards in `OUT.partial/` are used again. Bad input under "stop" removes
`OUT.partial/`.
"""

import hashlib
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

from aullm_dist import __version__
from aullm_dist.data.corpora import CorpusIndex, Note, get_corpus, read_corpus
from aullm_dist.data.corpora.explain import as_json, explain
from aullm_dist.data.crops import get_crop
from aullm_dist.data.matching import plan_clips
from aullm_dist.data.shards import BadClips, ShardTask, run_shard, shard_key, shard_paths
from aullm_dist.data.tables import write_arrow, write_parquet
from aullm_dist.errors import UserError
from aullm_dist.log import get_logger

__all__ = ["REPORT_NAME", "prepare"]

REPORT_NAME = "report.json"

FORMATS = ("arrow", "parquet")
_MAX_SIZE = 2048
# Small enough that an interruption costs seconds and the progress moves, large enough that files stay few.
_CLIPS_PER_SHARD = 8
# Starting a worker costs about as much as decoding this many frames.
_FRAMES_PER_WORKER = 2000

logger = get_logger(__name__)

Progress = Callable[[int, int], None]


def prepare(
    corpus: str,
    root: str | Path,
    out: str | Path,
    *,
    size: int = 64,
    crop: str = "none",
    bad_clips: BadClips = "stop",
    num_workers: int | None = None,
    fmt: str = "arrow",
    errata: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Write the dataset of a corpus to `out` (see `shards.SCHEMA`) with a `report.json` in it.

    Args:
        corpus: Name in `corpora.CORPORA`.
        root: Folder of the release.
        out: Folder to be made. A finished preparation of the same input with the same arguments is left as it is.
        size: Height and width of the frames, in pixels.
        crop: What part of the frames is kept, as `crops.get_crop` reads it.
        bad_clips: What to do about unusable rows, missing folders and missing or unreadable frames: "stop"; "repair"
            keeps a clip with the frames that exist (at least 2) and skips the rest; "skip" leaves out every clip with
            a defect.
        num_workers: Processes; None for as many as the CPUs and the work allow, 1 for none beside this one.
        fmt: "arrow", files that are mapped into memory, or "parquet", files that can also be streamed.
        errata: Frozen corrections to use in place of the published row numbers; see `corpora.errata`.
        progress: Called with (clips done, clips in all).

    Returns:
        The report. Its key `already_prepared` tells whether `out` was there before.

    Raises:
        UserError: Bad arguments, bad input under "stop", or `out` is taken.
    """
    _check_arguments(corpus, size, bad_clips, num_workers, fmt)
    fitted = get_crop(crop)
    out = _outside(root, Path(out).expanduser().absolute())
    previous = _previous_report(out)
    index = read_corpus(corpus, root, bad_rows="stop" if bad_clips == "stop" else "skip", errata=errata)
    plans, notes = plan_clips(index, bad_clips)
    groups = [plans[start : start + _CLIPS_PER_SHARD] for start in range(0, len(plans), _CLIPS_PER_SHARD)]
    keys = [shard_key(group, size=size, crop_fingerprint=fitted.fingerprint, bad_clips=bad_clips) for group in groups]
    notes = [*index.notes, *notes]
    told = [str(note) for note in notes] + ([fmt] if fmt != "arrow" else [])
    fingerprint = hashlib.sha256(json.dumps([corpus, keys, told]).encode()).hexdigest()
    if previous is not None:
        if previous.get("fingerprint") == fingerprint:
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
    with _work_or_nothing(work):
        _run_tasks(tasks, num_workers, progress or (lambda done, total: None))
        summaries = [json.loads(shard_paths(shards, key)[1].read_text()) for key in keys]
        report = _report(index, root, size, (fitted.identity, crop), bad_clips, notes, summaries, fingerprint)
    _publish([shard_paths(shards, key)[0] for key in keys], report, work, out, fmt)
    return {**report, "already_prepared": False}


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
            f"{work}: a worker process died, often for lack of memory; finished work is kept: try --workers 1"
        ) from error


def _outside(root: str | Path, out: Path) -> Path:
    if out.resolve().is_relative_to(Path(root).expanduser().resolve()):
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
    if not out.exists():
        return None
    if out.is_dir():
        if not any(out.iterdir()):
            return None
        try:
            return json.loads((out / REPORT_NAME).read_text())
        except (OSError, ValueError):
            pass
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
            for future in as_completed([pool.submit(run_shard, task) for task in waiting]):
                done += future.result()
                progress(done, total)
        finally:
            # After an error or Ctrl-C what has not started is dropped, or leaving the pool would wait for all of it.
            pool.shutdown(cancel_futures=True)


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
        "root": str(Path(root).expanduser().absolute()),
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
    """Join the shards into one dataset beside them and rename it to `out`."""
    final = work / "dataset"
    shutil.rmtree(final, ignore_errors=True)
    if fmt == "parquet":
        write_parquet(shards, final)
    else:
        write_arrow(shards, final, str(report["fingerprint"]))
    (final / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n")
    try:
        os.rename(final, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be put in place ({error.strerror}); the finished dataset is {final}") from error
    shutil.rmtree(work)
