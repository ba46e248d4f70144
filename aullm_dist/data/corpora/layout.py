"""Folders and frame files of a release: found without regard to case, numbered by the last digits of a name."""

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from aullm_dist.errors import UserError

__all__ = ["ClipFolders", "find_frames_root", "list_frames", "require_folder", "search_folders"]

# How far below the root the folder of subjects and the workbook may lie.
_DEPTH = 2
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
_DIGITS = re.compile(r"[0-9]+")


def require_folder(root: str | Path, title: str) -> Path:
    """Return `root` as an absolute path.

    Raises:
        UserError: It is no folder, or cannot be listed.
    """
    path = Path(root).expanduser().absolute()
    if not path.is_dir():
        found = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{path}: {found}; allowed: the folder of the {title} release")
    try:
        next(path.iterdir(), None)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return path


def search_folders(root: Path, frame_folders: Sequence[str]) -> list[Path]:
    """Folders in which the workbook may lie: `root` and its sub-folders, else the folder above a `root` of frames."""
    folders = [root, *_sub_folders(root)]
    if root.name.casefold() in _folded(frame_folders) and not any(
        next(folder.glob("*.xls*"), None) for folder in folders
    ):
        return [root.parent]
    return folders


def find_frames_root(
    root: Path,
    frame_folders: Sequence[str],
    subjects: Collection[str],
    title: str,
    *,
    notes_to: Callable[[str, str], None],
) -> Path:
    """Find the folder that holds the subjects' folders, at or below `root`.

    A folder counts if it has a folder of one of `subjects`, or else by its name. Of several, the earliest of
    `frame_folders` wins, then the one nearest to `root`; the others are noted.

    Raises:
        UserError: There is none.
    """
    order = {name: rank for rank, name in enumerate(_folded(frame_folders))}
    wanted = _folded(subjects)
    with_subjects: list[Path] = []
    by_name: list[Path] = []
    level = [root]
    for _ in range(_DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            children = _sub_folders(folder)
            if any(child.name.casefold() in wanted for child in children):
                with_subjects.append(folder)
            else:
                below += children
                if folder.name.casefold() in order:
                    by_name.append(folder)
        level = below
    candidates = with_subjects or by_name
    if not candidates:
        expected = ", ".join(frame_folders)
        raise UserError(
            f"{root}: no frames of {title} found; expected: a folder named {expected}, or the subjects' folders "
            f"({', '.join(sorted(subjects)[:2])}, ...)"
        )
    # min() keeps the first of equals, and the search went level by level.
    chosen = min(candidates, key=lambda folder: order.get(folder.name.casefold(), len(order)))
    for folder in candidates:
        if folder != chosen:
            notes_to(str(folder), f"not used: the frames are read from {chosen}; give this folder as --root to use it")
    return chosen


class ClipFolders:
    """The `<subject>/<clip>` folders below one folder, looked up without regard to case."""

    def __init__(self, frames_root: Path):
        self._folders: dict[tuple[str, str], Path] = {}
        for subject in _sub_folders(frames_root):
            for clip in _sub_folders(subject):
                self._folders[subject.name.casefold(), clip.name.casefold()] = clip

    def get(self, subject: str, clip: str) -> Path | None:
        """Return the folder of a clip, or None."""
        return self._folders.get((subject.casefold(), clip.casefold()))

    def without(self, names: Iterable[str]) -> list[str]:
        """Return the `subject/clip` names of the folders that are not among `names`."""
        known = {name.casefold() for name in names}
        left = (f"{folder.parent.name}/{folder.name}" for folder in self._folders.values())
        return [name for name in left if name.casefold() not in known]


def list_frames(folder: Path) -> dict[int, Path]:
    """Map frame numbers to files, ascending.

    The number is the last run of digits in the file's stem, as an integer: paddings differ inside one corpus.

    Raises:
        UserError: Two files have the same number.
    """
    frames: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        digits = _DIGITS.findall(path.stem)
        if not digits or path.suffix.lower() not in _SUFFIXES or path.name.startswith("."):
            continue
        number = int(digits[-1])
        if number in frames:
            raise UserError(
                f"{folder}: {frames[number].name} and {path.name} are both frame {number}; allowed: one file each"
            )
        frames[number] = path
    return dict(sorted(frames.items()))


def _sub_folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def _folded(names: Iterable[str]) -> list[str]:
    return [name.casefold() for name in names]
