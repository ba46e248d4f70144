"""Finds again what a run has recorded by its path: runs are moved, and read from other working folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aullm_dist.errors import UserError
from aullm_dist.files import user_path
from aullm_dist.llm.identity import BaseIdentity


def find_recorded(recorded: str, output: str, near: Path) -> Path | None:
    """Return where a folder is that a run has recorded, None where it is not found.

    What is found is not known to be the same: whoever asks compares its fingerprint.

    Args:
        recorded: the path; older runs have recorded it as it was given, relative to the folder they were started in.
        output: the recorded `training.output`; what lay below it has moved with the run.
        near: a file or folder of the run as it lies now, such as a checkpoint.
    """
    path, above = user_path(recorded), list(near.absolute().parents)
    if path.is_absolute():
        candidates = [path]
    else:
        # A run is started in a folder above its own: that of the project.
        candidates = [*(folder / path for folder in above), path.absolute()]
    candidates += [place for here in (near.absolute(), *above) for place in moved(path, Path(output), here)]
    return next((candidate for candidate in candidates if candidate.is_dir()), None)


def moved(path: Path, output: Path, run: Path) -> list[Path]:
    """Return where a path would be now that was recorded next to or below a run folder which has moved.

    Args:
        path: as it was recorded.
        output: the run folder as it was recorded.
        run: the run folder as it lies now.
    """
    places = []
    while True:
        if path.is_relative_to(output):
            places.append(run / path.relative_to(output))
        # What bears the same name in both places has moved with what holds it, as a run with its baselines does.
        if not output.name or output.name != run.name:
            return places
        output, run = output.parent, run.parent


def find_base(base: BaseIdentity, config: Mapping[str, Any], near: Path) -> str:
    """Return the folder or the Hugging Face name of the LLM that a run was trained on.

    Args:
        base: as the checkpoint has it.
        config: the run's configuration, as its checkpoint records it.
        near: see `find_recorded`; the message names it.

    Raises:
        UserError: it was a folder, and is not there any more.
    """
    was_folder = base.revision is None and base.files
    if not was_folder:
        return base.name
    found = find_recorded(base.name, str(config.get("training", {}).get("output", "")), near)
    if found is None:
        where = base.name if Path(base.name).is_absolute() else f"{base.name}, below the folder the run was started in"
        raise UserError(
            f"{near}: its LLM was at {where}, and is not there; say where it is: --llm DIR (predict, merge), "
            "--set model.llm=DIR (report)"
        )
    return str(found)
