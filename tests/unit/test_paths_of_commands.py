"""Commands without arguments, with `--help`, and with something else in the place of each path that they take."""

import argparse
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from release_samples import write_run

from aullm_dist import cli

COMMANDS: dict[str, list[str]] = {
    "prepare": ["casme2", "--root", "{root}", "--out", "{out}"],
    "quantize": ["{base}", "--out", "{out}"],
    "predict": ["{release}", "{clip}"],
    "doctor": ["--quick", "--folder", "{folder}"],
    "merge": ["{release}", "--out", "{out}"],
}
"""A command line of each command, in which the paths below are good or missing."""
OPTIONS: dict[str, tuple[str, ...]] = {
    "prepare": ("--root", "--out", "--errata", "--freeze-errata", "--crop"),
    "quantize": ("base", "--out"),
    "predict": ("release", "inputs", "--out", "--figure", "--llm", "--crop"),
    "doctor": ("--folder",),
    "merge": ("checkpoint", "--out", "--llm", "--probe", "--scores"),
}
PLACES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: None,
    "file": lambda path: path.write_bytes(b"\xfftext"),
    "folder": lambda path: (path.mkdir(), (path / "x").write_text("x")),
    "pipe": os.mkfifo,
    "link": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "below-a-file": lambda path: path.parent.write_text("a file"),
}
WRITTEN = ("--out", "--figure", "--freeze-errata", "--folder")


@pytest.fixture(scope="module")
def good(tiny_dataset, tiny_llm, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("good")
    (folder / "clip").mkdir()
    for number in range(3):
        Image.new("L", (64, 64), 40 * number).save(folder / "clip" / f"img{number}.png")
    return {
        "root": tiny_dataset.parent / "corpus",
        "base": tiny_llm,
        "release": write_run(folder / "run", tiny_dataset, tiny_llm),
        "clip": folder / "clip",
        "folder": folder,
    }


def told(capsys, argv: list[str]) -> tuple[int, str]:
    """Run a command line and return its exit code and what it says; argparse leaves in its own way."""
    capsys.readouterr()
    try:
        code = cli.main(argv)
    except SystemExit as left:
        code = int(left.code or 0)
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    if code == 2:
        (_,) = [line for line in said.err.splitlines() if "error:" in line]
    return code, said.err + said.out


def with_place(command: str, option: str, text: str, good: dict[str, Path], out: Path) -> list[str]:
    """Return the command line of a command with `text` for one of its paths."""
    argv = [part.format(**good, out=out) for part in COMMANDS[command]]
    if option == "--crop":
        text = f"boxes:{text}"
    positional = {"base": 0, "release": 0, "checkpoint": 0, "inputs": 1}
    if option in positional:
        argv[positional[option]] = text
    elif option in argv:
        argv[argv.index(option) + 1] = text
    else:
        argv += [option, text]
    return [command, *argv]


def takers(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if action.type is Path or action.dest in ("inputs", "crop"):
            yield action.option_strings[0] if action.option_strings else action.dest


@pytest.mark.parametrize("command", OPTIONS)
def test_every_path_of_a_command_is_tried_below(command):
    (commands,) = [action for action in cli.build_parser()._actions if isinstance(action.choices, dict)]
    assert set(takers(commands.choices[command])) == set(OPTIONS[command])


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_and_no_arguments(command, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert told(capsys, [command, "--help"])[0] == 0
    if command not in ("doctor", "config", "train"):  # these need none
        assert told(capsys, [command])[0] == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "option"), [(name, path) for name in OPTIONS for path in OPTIONS[name]])
def test_something_else_in_the_place_of_a_path(command, option, good, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kind, make in PLACES.items():
        if option in WRITTEN and kind == "missing":
            continue  # as it should be
        if command == "doctor" and kind == "folder":
            continue
        path = tmp_path / kind / "place"
        if kind == "below-a-file":
            path = tmp_path / "plain" / "place"
        else:
            path.parent.mkdir()
        make(path)
        code, said = told(capsys, with_place(command, option, str(path), good, tmp_path / f"out-{kind}"))
        if command == "doctor":
            assert code in (1, 2)
            assert str(path) in said
        elif code == 0:
            assert option == "--freeze-errata", said
        else:
            assert code == 2
            assert str(path) in said, f"{kind}: {said}"
    assert told(capsys, with_place(command, option, "", good, tmp_path / "out-empty"))[0] == 2
