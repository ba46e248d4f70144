"""Reads the JSON files of a prepared dataset: our `report.json`, `dataset_info.json` and `state.json` of `datasets`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aullm_dist.errors import UserError, file_errors
from aullm_dist.files import is_taken, read_json

__all__ = ["INFO_NAME", "REPORT_NAME", "SPEC_FILE", "check_arrow_records", "is_synthetic", "read_report"]

REPORT_NAME, INFO_NAME = "report.json", "dataset_info.json"
SPEC_FILE = "SYNTHETIC.json"
"""File in a corpus's root that says the corpus is synthetic and how it was made; loaders need not know it."""
_STATE_NAME = "state.json"
_COPY_AGAIN = "copy the dataset again, or remove it and prepare the corpus again"


def read_report(folder: Path, remedy: str = _COPY_AGAIN) -> dict[str, Any] | None:
    """Return what a preparation reported; None where there is no report, as for datasets of other makers.

    Args:
        folder: of the dataset.
        remedy: what to do where the report cannot be used.

    Raises:
        UserError: it is damaged.
    """
    path = folder / REPORT_NAME
    with file_errors(str(path)):
        if not is_taken(path):
            return None
    report = read_json(path, remedy, keys=("corpus",))
    if not isinstance(report["corpus"], str) or not isinstance(report.get("root", ""), str):
        raise UserError(f"{path}: is no report of a preparation; {remedy}")
    return report


def is_synthetic(report: Mapping[str, Any]) -> bool:
    """Whether the faces of a dataset are known to be drawn, by its report.

    Older reports do not say; their corpus does, where it still is.
    """
    if "synthetic" in report:
        return report["synthetic"] is True
    return "root" in report and (Path(report["root"]) / SPEC_FILE).is_file()


def check_arrow_records(folder: Path) -> None:
    """Refuse a dataset whose records `datasets` would stumble over; it names no file when it does.

    Raises:
        UserError: one of them is missing or damaged.
    """
    info, state = folder / INFO_NAME, folder / _STATE_NAME
    features = read_json(info, _COPY_AGAIN, keys=("features",))["features"]
    files = read_json(state, _COPY_AGAIN, keys=("_data_files", "_fingerprint"))["_data_files"]
    if not isinstance(features, dict):
        raise UserError(f"{info}: key features is {features!r:.80}; {_COPY_AGAIN}")
    if not isinstance(files, list) or not files:
        raise UserError(f"{state}: key _data_files is {files!r:.80}; {_COPY_AGAIN}")
