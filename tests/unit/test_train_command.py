"""`aullm-dist train`: what it starts, in how many processes, and what `--dry-run` says without writing anything."""

import sys

import pytest

from aullm_dist.cli import main
from aullm_dist.commands import launch


class Replaced(Exception):
    """In place of the process that would have taken over."""


@pytest.fixture
def started(monkeypatch):
    """Return what was started: the command of a single process, or the launcher's parsed arguments."""
    import accelerate.commands.launch as launcher

    seen = []

    def execve(path, command, environment):
        seen.append((command, environment))
        raise Replaced

    monkeypatch.setattr(launch.os, "execve", execve)
    monkeypatch.setattr(launcher, "launch_command", seen.append)
    return seen


def test_one_process_takes_our_place(started):
    with pytest.raises(Replaced):
        main(["train", "casme2_loso", "--resume", "auto", "model.llm=x", "--offline"])
    ((command, environment),) = started
    assert command[:2] == [sys.executable, str(launch.TRAIN)]
    assert command[2:] == ["--config", "casme2_loso", "--resume", "auto", "--offline", "model.llm=x"]
    assert (environment["ACCELERATE_MIXED_PRECISION"], environment["ACCELERATE_DYNAMO_BACKEND"]) == ("no", "NO")


def test_without_a_run_file_it_is_the_demo(started):
    with pytest.raises(Replaced):
        main(["train", "--replace", "training.epochs=1"])
    assert started[0][0][2:] == ["--replace", "training.epochs=1"]


def test_several_processes_go_through_the_launcher(started):
    assert main(["train", "casme2_loso", "--processes", "4", "training.epochs=2"]) == 0
    (arguments,) = started
    assert (arguments.num_processes, arguments.multi_gpu, arguments.quiet) == (4, True, True)
    assert arguments.training_script == str(launch.TRAIN)
    assert arguments.training_script_args == ["--config", "casme2_loso", "training.epochs=2"]


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [(0, [], 1), (8, [], 1), (8, ["training.micro_batch=2"], 8), (6, ["training.micro_batch=4"], 4),
     (0, ["training.processes=2", "training.micro_batch=4"], 2), (8, ["training.folds_at_once=8"], 8),
     (8, ["training.folds_at_once=auto"], 8)],
)  # fmt: skip
def test_the_processes_are_as_many_as_divide_the_batch(monkeypatch, started, gpus, settings, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    try:
        main(["train", "demo", *settings])
    except Replaced:
        assert expected == 1
    else:
        assert started[0].num_processes == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--processes", "3"],
            "training.global_batch is 16; allowed: a multiple of micro_batch x processes = 16 x 3 = 48",
        ),
        (["--processes", "0"], "allowed: 1 or more"),
        (
            ["--processes", "2", "training.processes=4", "training.micro_batch=4"],
            "--processes 2, but training.processes is 4",
        ),
        (["training.epoch=3"], "training.epoch"),
        (["no_such_file"], "no_such_file"),
        (["--dry-run", "data.train=[nowhere]"], "nowhere: no prepared dataset"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(started, capsys, arguments, message):
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert started == []


def test_a_dry_run_says_everything_and_writes_nothing(started, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "training.epochs=3", "training.output=runs/my run"]) == 0
    said = capsys.readouterr().out
    assert "epochs: 3" in said
    assert "a synthetic corpus would be drawn, casme2, 20 subjects with 12 clips each" in said
    assert "accelerate launch --quiet" in said
    assert "'training.output=runs/my run'" in said
    assert (list(tmp_path.iterdir()), started) == ([], [])


def test_a_dry_run_counts_clips_and_folds(tiny_dataset, capsys):
    assert main(["train", "--dry-run", f"data.train=[{tiny_dataset}]", "data.fold=null", "data.folds=3"]) == 0
    said = capsys.readouterr().out
    assert "3 fold(s), grouped; AUs" in said
    assert said.count(" to train on, ") == 3
    assert main(["train", "--dry-run", f"data.train=[{tiny_dataset}]", "data.fold=99"]) == 2
