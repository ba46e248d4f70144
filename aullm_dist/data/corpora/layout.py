"""Finds folders of a release without regard to case."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path

from aullm_dist.data.sheets import SHEET_SUFFIXES
from aullm_dist.errors import UserError
from aullm_dist.files import user_path

__all__ = ["FolderTree", "find_frames_root", "require_folder", "search_folders"]

# How far below the root the folder of subjects and the workbook may lie.
_DEPTH = 3


def require_folder(root: str | Path, title: str) -> Path:
    """Return `root` as an absolute path.

    Raises:
        UserError: It is no folder, or cannot be listed.
    """
    path = user_path(root).absolute()
    if not path.is_dir():
        found = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{path}: {found}; allowed: the folder of the {title} release")
    try:
        next(path.iterdir(), None)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return path


def search_folders(root: Path, frame_folders: Sequence[str]) -> list[Path]:
    """Folders in which the workbook may lie: `root` and its sub-folders, else those above a `root` of frames."""
    folders = [root, *_sub_folders(root)]
    if root.name.casefold() not in _folded(frame_folders) or any(map(_has_sheet, folders)):
        return folders
    return [folder for folder in (root.parent, root.parent.parent) if _has_sheet(folder)] or [root.parent]


def _has_sheet(folder: Path) -> bool:
    return any(path.suffix.lower() in SHEET_SUFFIXES for path in folder.iterdir())


def find_frames_root(
    root: Path,
    frame_folders: Sequence[str],
    first_folders: Collection[str],
    title: str,
    *,
    notes_to: Callable[[str, str], None],
) -> Path:
    """Find the folder that holds the clips' folders, at or below `root`.

    A folder counts if it has one of `first_folders`, the outermost folders of the sheet's clips, or else by its name.
    Of several, the earliest of `frame_folders` wins, then the one nearest to `root`; the others are noted.

    Raises:
        UserError: There is none.
    """
    order = {name: rank for rank, name in enumerate(_folded(frame_folders))}
    wanted = set(_folded(first_folders))
    with_clips: list[Path] = []
    by_name: list[Path] = []
    level = [root]
    for _ in range(_DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            children = _sub_folders(folder)
            if any(child.name.casefold() in wanted for child in children):
                with_clips.append(folder)
            else:
                below += children
                if folder.name.casefold() in order:
                    by_name.append(folder)
        level = below
    candidates = with_clips or by_name
    if not candidates:
        expected = ", ".join(frame_folders)
        raise UserError(
            f"{root}: no frames of {title} found; expected: a folder named {expected}, or the clips' folders "
            f"({', '.join(sorted(first_folders)[:2])}, ...)"
        )
    # min() keeps the first of equals, and the search went level by level.
    chosen = min(candidates, key=lambda folder: order.get(folder.name.casefold(), len(order)))
    for folder in candidates:
        # Next to a folder of a known name, others are parts of other trees, such as MMEW's macro-expressions.
        if folder != chosen and (folder.name.casefold() in order or chosen.name.casefold() not in order):
            notes_to(str(folder), f"not used: the frames are read from {chosen}; give this folder as --root to use it")
    return chosen


class FolderTree:
    """The folders below one folder, looked up without regard to case; each folder is listed once."""

    def __init__(self, root: Path):
        self.root = root
        self._listed: dict[Path, dict[str, Path]] = {}

    def find(self, relative: str) -> Path | None:
        """Return the folder at `a/b/c` below the root, or None; of two that differ in case, the one written so."""
        folder = self.root
        for part in relative.split("/"):
            children = self._children(folder)
            found = children.get(part) or children.get(part.casefold())
            if found is None:
                return None
            folder = found
        return folder

    def like(self, template: str) -> Iterator[Path]:
        """Yield the folders that lie where `template` puts clips; a part without a field must be called so."""
        level = [self.root]
        for part in template.split("/"):
            below = [child for folder in level for child in dict.fromkeys(self._children(folder).values())]
            level = [child for child in below if "{" in part or child.name.casefold() == part.casefold()]
        yield from level

    def _children(self, folder: Path) -> dict[str, Path]:
        if folder not in self._listed:
            children = _sub_folders(folder)
            # Folded names first, so that an exact name is never hidden by the folded one of another folder.
            folded = {child.name.casefold(): child for child in reversed(children)}
            self._listed[folder] = {**folded, **{child.name: child for child in children}}
        return self._listed[folder]


def _sub_folders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from error


def _folded(names: Iterable[str]) -> list[str]:
    return [name.casefold() for name in names]
