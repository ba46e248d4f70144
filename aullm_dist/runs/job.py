"""Stores what a run leaves for whoever starts it again: the PREEMPTED marker and the record of its job; without torch.

Both lie in the run folder, or in the fold's own where a job trains one fold of it, so that the tasks of an array do not
meet. The marker names the attempt of the job that wrote it: an old one is never taken for a new one.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aullm_dist.config import Config
from aullm_dist.errors import UserError
from aullm_dist.files import read_json, write_text
from aullm_dist.log import get_logger
from aullm_dist.runs.paths import RunPaths
from aullm_dist.runtime.slurm import Job

logger = get_logger(__name__)

MARKER = "PREEMPTED"
RECORD = "job.json"


def job_folder(config: Config) -> Path:
    """Return where marker and record lie: the run folder, or that of the one fold that is trained."""
    run = RunPaths(Path(config.training.output))
    return run.root if config.data.fold is None else run.fold(config.data.fold).folder


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What is known of a job over all its lives.

    Attributes:
        job_id: see `slurm.Job`; None outside of SLURM.
        restart_count: of the life that wrote this.
        step_completed: whether that life has completed an optimizer step.
        failures: how often the job went round again after a failure.
    """

    job_id: str | None
    restart_count: int
    step_completed: bool
    failures: int


def begin_job(folder: Path, job: Job | None) -> JobRecord:
    """Clear the marker and write the record of an attempt that begins."""
    (folder / MARKER).unlink(missing_ok=True)
    before = read_record(folder)
    job_id, restarts = (job.job_id, job.restart_count) if job else (None, 0)
    failures = before.failures if before is not None and before.job_id == job_id else 0
    record = JobRecord(job_id, restarts, False, failures)
    write_record(folder, record)
    return record


def write_record(folder: Path, record: JobRecord) -> None:
    """Replace the record of a folder."""
    write_text(folder / RECORD, json.dumps(asdict(record)) + "\n")


def read_record(folder: Path) -> JobRecord | None:
    """Return the record of a folder, None where there is none that can be read."""
    content = _read(folder / RECORD)
    return JobRecord(**content) if content is not None and content.keys() == set(JobRecord.__slots__) else None


def write_marker(folder: Path, job: Job | None, **more: Any) -> None:
    """Say that this life of the job ended because it was asked to, with everything saved."""
    content = {"job_id": job.job_id if job else None, "restart_count": job.restart_count if job else 0, **more}
    write_text(folder / MARKER, json.dumps(content) + "\n")


def is_preempted(folder: Path, job: Job) -> bool:
    """Whether the marker of a folder was written by this very life of the job."""
    content = _read(folder / MARKER)
    return content is not None and (content.get("job_id"), content.get("restart_count")) == (
        job.job_id,
        job.restart_count,
    )


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        return read_json(path)
    except UserError as error:
        logger.warning("%s; it counts as not there", error)
        return None
