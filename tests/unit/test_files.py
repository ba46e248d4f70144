"""Files that are damaged, missing, in the way or not to be read: one line that names them, and nothing lost."""

import errno
import json
import os
from pathlib import Path

import pytest

from aullm_dist import cli
from aullm_dist.errors import UserError, system_error
from aullm_dist.files import read_json, read_text, write_bytes

DAMAGED = {
    "empty": b"",
    "blank": b" \n",
    "half": b'{"a": 1, "b',
    "other": b"[]",
    "nothing": b"null",
    "binary": b"\xff\xfe{}",
    "lacking": b"{}",
    "deep": b"[" * 100_000,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_json_is_one_line_that_names_the_file(tmp_path, kind):
    path = tmp_path / "record.json"
    path.write_bytes(DAMAGED[kind])
    with pytest.raises(UserError) as caught:
        read_json(path, "train again", keys=("a",))
    message = str(caught.value)
    assert message.startswith(f"{path}")
    assert message.endswith("; train again")
    assert "\n" not in message


def test_whole_json_is_read(tmp_path):
    (tmp_path / "record.json").write_text('{"a": 1}')
    assert read_json(tmp_path / "record.json", keys=("a",)) == {"a": 1}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ELOOP])
def test_what_the_system_refuses_is_named(tmp_path, monkeypatch, code):
    def refuse(self, *_args, **_kwargs):
        raise OSError(code, os.strerror(code), str(self))

    (tmp_path / "x").touch()
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=os.strerror(code)):
        read_text(tmp_path / "x")


def test_a_folder_or_a_broken_link_in_the_place_of_a_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for name in ("folder", "link", "loop", "pipe"):
        with pytest.raises(UserError, match=f"{name}: cannot be read"):
            read_json(tmp_path / name)


def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    path.write_text("old")

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space") as caught:
        write_bytes(path, b"new")
    assert str(system_error(caught.value)).startswith(f"{path}: No space left on device")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/data/x"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"),
        OSError("a library's own words"),
        MemoryError("Unable to allocate 80. GiB"),
    ],
)
def test_no_command_shows_a_traceback_for_what_the_system_refuses(monkeypatch, capsys, error):
    def refuse(_argv):
        raise error

    monkeypatch.setattr(cli, "_run", refuse)
    assert cli.main(["evaluate", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aullm-dist: error: ")


def test_a_name_that_is_no_utf8_is_refused_at_once(capsys, tmp_path):
    name = os.fsdecode(b"run\xff")
    for argv in (["evaluate", name], ["config", f"training.output={name}"]):
        assert cli.main(argv) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "is not UTF-8" in line


def test_home_is_expanded_behind_an_option(tiny_dataset, capsys, tmp_path, monkeypatch):
    """A shell leaves `--out=~/plan.json` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["folds", "loso", str(tiny_dataset), "--out=~/plan.json"]) == 0
    assert json.loads((tmp_path / "plan.json").read_text())["protocol"] == "loso"
    assert not (tmp_path / "~").exists()
    assert cli.main(["evaluate", "~/nothing"]) == 2
    assert str(tmp_path / "nothing") in capsys.readouterr().err
