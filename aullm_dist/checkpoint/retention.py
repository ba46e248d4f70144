"""Lists checkpoint folders, finds the one to resume from, and removes those that may go."""

import os
import shutil
from collections.abc import Iterable
from logging import Logger
from pathlib import Path

from aullm_dist.checkpoint.atomic import (
    PARKED_PATTERN,
    STEP_PATTERN,
    TEMPORARY_PATTERN,
    remove_folder,
    step_folder_name,
)
from aullm_dist.checkpoint.manifest import MANIFEST_NAME, VerifyMode, verify_checkpoint
from aullm_dist.errors import UserError
from aullm_dist.files import force_to_disk
from aullm_dist.log import get_logger
from aullm_dist.runs.paths import CHECKPOINTS


def list_checkpoints(root: Path | str) -> list[Path]:
    """Return the checkpoint folders below `root`, oldest step first, valid or not.

    A folder that was moved aside for its replacement counts if the process died before the replacement was in place.
    """
    root = Path(root)
    if not root.is_dir():
        return []
    folders = [path for path in root.iterdir() if path.is_dir()]
    found: dict[int, Path] = {}
    for pattern in (PARKED_PATTERN, STEP_PATTERN):
        found |= {int(match[1]): path for path in folders if (match := pattern.fullmatch(path.name))}
    return [found[step] for step in sorted(found)]


def find_newest_valid(root: Path | str, log: Logger | None = None, mode: VerifyMode = "hash") -> Path | None:
    """Return the newest checkpoint below `root` that is intact, or None; nothing on disk is changed.

    Each newer one that is passed over is logged as a warning with what is wrong with it. Call it on one process and
    broadcast the answer: two processes may see a shared disk differently.
    """
    log = log or get_logger(__name__)
    for folder in reversed(list_checkpoints(root)):
        problems = verify_checkpoint(folder, mode)
        if not problems:
            return folder
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        log.warning("checkpoint %s is not usable: %s%s; trying the next older one", folder, problems[0], more)
    return None


def find_checkpoint(path: Path, log: Logger | None = None) -> Path:
    """Return the checkpoint that is meant by `path`: itself, or the newest valid one of a fold or of its checkpoints.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST_NAME).is_file():
        return path
    folder = find_newest_valid(path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path, log)
    if folder is None:
        raise UserError(f"{path}: holds no valid checkpoint; give a checkpoint or a fold, such as runs/first/fold-00")
    return folder


def clean_leftovers(root: Path) -> None:
    """Remove what killed processes left below `root`; a complete folder that they had moved aside is put back."""
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        if TEMPORARY_PATTERN.fullmatch(path.name):
            shutil.rmtree(path)
        elif parked := PARKED_PATTERN.fullmatch(path.name):
            home = root / step_folder_name(int(parked[1]))
            if home.exists():
                remove_folder(path)
            else:
                os.rename(path, home)
                force_to_disk(root)


def rotate(root: Path | str, keep: int, *, protect: Iterable[Path | str] = (), mode: VerifyMode = "hash") -> list[Path]:
    """Delete the oldest checkpoints until `keep` are left, but never the last valid one.

    A folder that cannot be deleted is a warning: it costs disk, not the run.

    Args:
        root: The folder that holds the checkpoints.
        keep: Number of newest checkpoints to keep, at least 1.
        protect: Folders that stay whatever their age (the best one, say); they do not count.
        mode: How the kept ones are verified. If none of them is valid, the newest valid older one stays too.

    Returns:
        The folders that were deleted, oldest first.

    Raises:
        UserError: If `keep` is below 1.
    """
    if keep < 1:
        raise UserError(f"number of checkpoints to keep is {keep}; allowed is 1 or more")
    protected = {Path(path).resolve() for path in protect}
    folders = [path for path in list_checkpoints(root) if path.resolve() not in protected]
    older, kept = folders[:-keep], folders[-keep:]
    if older and all(verify_checkpoint(path, mode) for path in reversed(kept)):
        last_valid = next((path for path in reversed(older) if not verify_checkpoint(path, mode)), None)
        older = [path for path in older if path != last_valid]
    deleted = []
    for path in older:
        try:
            remove_folder(path)
        except OSError as error:
            get_logger(__name__).warning("checkpoint %s could not be deleted: %s", path, error.strerror)
        else:
            deleted.append(path)
    return deleted
