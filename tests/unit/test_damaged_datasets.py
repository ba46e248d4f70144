"""Prepared datasets whose JSON files are damaged: every command that reads one names the file in one line."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from training_runs import overrides, train_here

from aullm_dist import cli
from aullm_dist.config import load
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.inputs import InputClips
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.errors import UserError
from aullm_dist.planning.prompts import plan_prompt

RECORDS = ("report.json", "dataset_info.json", "state.json", "MANIFEST.json")
CONTENTS = {"empty": "", "object": "{}", "list": "[]", "null": "null", "number": "7", "deep": "[" * 100_000}


def write(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def folder_of_that_name(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    **{name: write(content) for name, content in CONTENTS.items()},
    **{work.__name__: work for work in (half, link_to_nothing, folder_of_that_name, pipe)},
}


def command(*argv: object) -> None:
    """Run a command line; of its refusal, told in one line, make an exception again."""
    code = cli.main([*map(str, argv)])
    if code == 2:
        raise UserError("exit code 2")


READERS: dict[str, tuple[Callable[[Path, Path], object], tuple[str, ...]]] = {
    # train and report open datasets as ClipStore does, predict as InputClips does.
    "train, report": (lambda data, _: ClipStore([data], 64).fingerprint, RECORDS),
    "predict": (lambda data, _: InputClips([str(data)], size=64, trained=["none"]), RECORDS),
    "folds": (lambda data, _: command("folds", "grouped", data, "--folds", 2), ("dataset_info.json", "state.json")),
    "plan": (lambda data, _: plan_prompt(load(None, [f"data.train=[{data}]"]), 9, 9), ("report.json",)),
    "verify": (lambda data, _: command("dataset", "verify", data), RECORDS),
    "prepare": (
        lambda data, corpus: prepare("casme2", corpus, data, PrepareOptions(size=64, num_workers=1)),
        RECORDS,
    ),
}


@pytest.fixture
def data(tiny_dataset, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_dataset, tmp_path / "data"))


@pytest.mark.parametrize("is_of_earlier_version", [False, True], ids=["", "without-manifest"])
@pytest.mark.parametrize("reader", READERS)
def test_each_record_that_is_damaged_is_named_by_each_reader(reader, is_of_earlier_version, data, tiny_dataset, capsys):
    read, records = READERS[reader]
    if is_of_earlier_version:
        (data / "MANIFEST.json").unlink()
    present = [data / name for name in records if (data / name).exists()]
    if is_of_earlier_version and reader == "verify":
        present = []  # there is nothing to compare with
    read(data, tiny_dataset.parent / "corpus")
    for path in present:
        whole = path.read_bytes()
        for kind, damage in DAMAGE.items():
            damage(path)
            capsys.readouterr()
            try:
                read(data, tiny_dataset.parent / "corpus")
                told = ""
            except UserError as error:
                told = str(error)  # noqa: PT017 - each of many damages is refused
            said = capsys.readouterr()
            told += said.err + (said.out if reader == "verify" else "")
            assert told.count(str(path)) == 1, f"{path.name}, {kind}: {told!r}"
            path.rmdir() if path.is_dir() else path.unlink()
            path.write_bytes(whole)


@pytest.mark.parametrize("name", RECORDS)
def test_a_run_is_not_begun_on_a_damaged_dataset(name, data, tmp_path, capsys):
    (data / name).write_text("{}")
    assert train_here(*overrides(data, "none", tmp_path / "run")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert str(data / name) in line
    assert not (tmp_path / "run").exists()
