"""Publishes a folder atomically: writes it under a hidden name, forces it to disk, then renames it into place.

A reader sees a checkpoint folder either complete or not at all. The names that a killed process can leave behind all
begin with a dot: `.step-00000120.tmp-PID` (a folder being written or being deleted) and `.step-00000120.old-PID` (a
complete folder that was moved aside to be replaced; it still counts while its successor is not in place).
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aullm_dist import files
from aullm_dist.files import force_to_disk

STEP_PATTERN = re.compile(r"step-(\d{8,})")
PARKED_PATTERN = re.compile(r"\.step-(\d{8,})\.old-\d+")
TEMPORARY_PATTERN = re.compile(r"\.step-\d{8,}\.tmp-\d+")


def step_folder_name(step: int) -> str:
    """Return the folder name of a step, zero-padded so that names sort as the steps do."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """Return the step that a visible or parked checkpoint folder's name tells, None for any other name."""
    match = STEP_PATTERN.fullmatch(name) or PARKED_PATTERN.fullmatch(name)
    return int(match.group(1)) if match else None


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and force it to disk before returning."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Give a fresh hidden folder next to `target`, and rename it to `target` when the block ends without an exception.

    A folder that is already at `target` is replaced. Two renames cannot be one, so in between the old folder waits
    under its parked name, where `retention` finds it if the process dies at that moment. After an exception nothing new
    is left behind.

    Yields:
        The hidden folder to write into. The block has to force its files to disk; the folders are done here.

    Raises:
        OSError: If the parent cannot be written.
    """
    parked = target.parent / f".{target.name}.old-{os.getpid()}"

    def replace(staging: Path, target: Path) -> None:
        if target.exists():
            os.rename(target, parked)
        try:
            os.rename(staging, target)
        except OSError:
            if parked.exists():
                os.rename(parked, target)
            raise

    with files.staged_folder(target, replace) as staging:
        yield staging
    if parked.exists():
        remove_folder(parked)


def remove_folder(folder: Path) -> None:
    """Delete a checkpoint folder so that no moment shows half of it: it is hidden by a rename first."""
    step = step_of(folder.name)
    assert step is not None, folder
    doomed = folder.parent / f".{step_folder_name(step)}.tmp-{os.getpid()}"
    shutil.rmtree(doomed, ignore_errors=True)  # containers reuse process ids, so a leftover may bear the same name
    os.rename(folder, doomed)
    force_to_disk(folder.parent)
    shutil.rmtree(doomed)
