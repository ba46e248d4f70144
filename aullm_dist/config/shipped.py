"""Finds the shipped run files and DeepSpeed configurations."""

from pathlib import Path

from aullm_dist.errors import UserError
from aullm_dist.files import user_path

_PACKAGE = Path(__file__).resolve().parents[1]
PACKAGED_CONFIGS = _PACKAGE / "configs"
CHECKOUT_CONFIGS = _PACKAGE.parent / "configs"


def configs_folder() -> Path:
    """Return the folder of shipped configurations: inside the installed package, or next to it in a checkout."""
    return PACKAGED_CONFIGS if PACKAGED_CONFIGS.is_dir() else CHECKOUT_CONFIGS


def shipped_names(group: str = "") -> list[str]:
    """Return the names of the shipped run files, or of those in a folder of them (`ablation`)."""
    root = configs_folder() / "experiments"
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in (root / group).rglob("*.yaml"))


def find_config(name: str) -> Path:
    """Return the path of a run file given as a path, or as the name of a shipped one (`demo`, `ablation/ccr`).

    Raises:
        UserError: neither the path nor a shipped run file of that name exists.
    """
    path = user_path(name)
    if path.is_file():
        return path
    shipped = configs_folder() / "experiments" / f"{name.removesuffix('.yaml')}.yaml"
    if shipped.is_file():
        return shipped
    raise UserError(f"{name}: no such run file; give the path of a YAML file or one of: {', '.join(shipped_names())}")
