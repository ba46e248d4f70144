"""Who has the last word when a launcher has started several processes."""

import os
import signal
import time

import pytest

from aullm_dist.commands import train as train_cli
from aullm_dist.errors import UserError
from aullm_dist.runtime import exits as endings

MISTAKE = "model.llm: no such folder"


@pytest.fixture
def process(monkeypatch):
    """Return a function that makes this process one of two that fail, signalled before it or not."""

    def fail(rank, signalled):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setattr(endings.time, "sleep", lambda _seconds: None)

        def load(*_arguments):
            if signalled is not None:
                os.kill(os.getpid(), signalled)
                deadline = time.monotonic() + 10
                while heard[0].received is None and time.monotonic() < deadline:
                    os.sched_yield()
            raise UserError(MISTAKE)

        heard = []
        original = train_cli.StopSignals
        monkeypatch.setattr(train_cli, "StopSignals", lambda: heard.append(original()) or heard[0])
        monkeypatch.setattr(train_cli, "load", load)
        return train_cli.main([])

    return fail


@pytest.mark.parametrize(
    ("rank", "signalled", "spoken"),
    [
        (0, None, f"train.py: error: {MISTAKE}\n"),
        (1, None, f"train.py: error: process 1: {MISTAKE}\n"),
        (0, signal.SIGTERM, f"train.py: error: {MISTAKE}\n"),
        (1, signal.SIGTERM, ""),
        (1, signal.SIGUSR1, f"train.py: error: process 1: {MISTAKE}\n"),
    ],
)
def test_a_process_that_the_launcher_has_ended_leaves_the_last_word_to_the_first(
    process, capsys, rank, signalled, spoken
):
    """It may be told to end while it still imports, and come to the mistake that the first has reported afterwards."""
    assert process(rank, signalled) == 2
    errors = [line for line in capsys.readouterr().err.splitlines(keepends=True) if "error:" in line]
    assert "".join(errors) == spoken


def test_the_launcher_is_left_our_line_for_its_own_last_words(tmp_path, monkeypatch, capsys):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    endings.report(UserError(MISTAKE), "train.py")
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert failure.message == f"train.py: error: {MISTAKE}"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "gone" / "error.json"))
    endings.report(UserError(MISTAKE), "train.py")
    assert capsys.readouterr().err == f"train.py: error: {MISTAKE}\n" * 2


@pytest.fixture
def report_from(tmp_path, monkeypatch):
    """Return a function that reports from one of two processes that torchrun has started."""

    def report(rank, text):
        folder = tmp_path / str(rank)
        folder.mkdir()
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / "error.json"))
        monkeypatch.setattr(endings.time, "sleep", lambda _seconds: None)
        endings.report(UserError(text), "train.py")

    return report


@pytest.mark.parametrize(
    ("order", "spoken"),
    [((0, 1), f"train.py: error: {MISTAKE}\n"), ((1, 0), f"train.py: error: process 1: {MISTAKE}\n")],
)
def test_what_every_process_finds_is_said_once_whoever_comes_first(report_from, capsys, order, spoken):
    """On a busy machine the main process may come to it long after the others have stopped waiting."""
    for rank in order:
        report_from(rank, MISTAKE)
    assert capsys.readouterr().err == spoken


def test_what_one_process_alone_finds_is_said_beside_what_another_found(report_from, capsys):
    report_from(1, "its own")
    report_from(0, MISTAKE)
    assert capsys.readouterr().err == f"train.py: error: process 1: its own\ntrain.py: error: {MISTAKE}\n"
