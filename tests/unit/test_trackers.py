"""Trackers of Accelerate beside TensorBoard: the same scalars and pictures, and never a reason for a run to end."""

import json

import numpy as np
import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from file_tracker import FileTracker

from aullm_dist.config import Config, from_dict
from aullm_dist.config.training_settings import TRACKERS
from aullm_dist.errors import UserError
from aullm_dist.monitoring.trackers import check_trackers, open_trackers, tracker_class
from aullm_dist.monitoring.writer import Monitor
from aullm_dist.report.training_curves import read_scalars

PICTURE = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


def write(folder, *names, active=True):
    """Write two steps and a picture as a fold does, and return the lines of the first tracker."""
    trackers = open_trackers(names, folder / "run", "fold-00", {"training.seed": 3})
    monitor = Monitor(folder / "events", active, None, trackers)
    assert monitor.works
    for step in (1, 2):
        monitor.groups({"Loss": {"loss": 0.5 / step, "asl": None}, "lr": {"lora": 1e-3}}, step)
    monitor.picture("confusion/per_au", PICTURE, 2)
    monitor.close()
    (path,) = (folder / "run").glob("*.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()


def test_a_tracker_gets_what_tensorboard_gets(tmp_path):
    lines = write(tmp_path, "tensorboard", "file_tracker:FileTracker")
    assert [line["what"] for line in lines] == ["start", "settings", "log", "log", "finish"]
    assert lines[1]["values"] == {"training.seed": 3}
    events = read_scalars(tmp_path / "events")
    logged = [line for line in lines if line["what"] == "log"]
    assert {tag.lower() for line in logged for tag in line["values"]} == {tag.lower() for tag in events}
    for line in logged:
        assert line["values"]["Loss/loss"] == 0.5 / line["step"]
    assert np.array_equal(np.load(tmp_path / "run" / "pictures" / "confusion-per_au-2.npy"), PICTURE)


def test_a_tracker_works_without_tensorboard(tmp_path):
    assert len(write(tmp_path, "file_tracker:FileTracker", active=False)) == 5
    assert not (tmp_path / "events").exists()


def test_a_tracker_that_fails_is_given_up_with_one_warning(tmp_path, caplog):
    lines = write(tmp_path, "file_tracker:LostTracker")
    assert [line["what"] for line in lines] == ["start", "settings", "log"]
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "Tracker file_tracker:LostTracker: " in warnings[0]
    assert "the server is gone; the run continues without it" in warnings[0]
    assert read_scalars(tmp_path / "events")["loss/loss"][0].tolist() == [1, 2]


def test_a_fault_of_ours_is_not_swallowed(tmp_path):
    (tracker,) = open_trackers(["file_tracker:FileTracker"], tmp_path / "run", "fold-00", {})
    tracker._tracker.log = lambda values, step: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        tracker.scalars({"a": 1.0}, 1)


def test_pictures_go_as_each_tracker_takes_them(tmp_path, caplog):
    caplog.set_level("INFO", "aullm_dist")
    (bare,) = open_trackers(["file_tracker:BareTracker"], tmp_path / "run", "fold-00", {})
    bare.picture("a", PICTURE, 1)
    bare.picture("b", PICTURE, 2)
    assert [r.getMessage() for r in caplog.records] == [
        "Tracker file_tracker:BareTracker takes no pictures; TensorBoard has them"
    ]
    figures = {}
    bare._tracker.log_figure = lambda figure, name: figures.setdefault(name, figure)
    bare.picture("evidence/onset", np.zeros((200, 300, 3), np.uint8), 7)
    (name,) = figures
    assert name == "evidence/onset/step-00000007.png"
    assert figures[name].get_size_inches().tolist() == [3.0, 2.0]


def test_the_names_are_accelerates():
    assert set(TRACKERS) == set(LOGGER_TYPE_TO_CLASS)
    assert tracker_class("file_tracker:FileTracker") is FileTracker
    check_trackers(["tensorboard", "file_tracker:FileTracker"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clearml", "clearml is not installed; install it, or leave it out"),
        ("no_such_module:Tracker", "cannot be imported"),
        ("file_tracker:Nothing", "cannot be imported"),
        ("json:JSONDecoder", "is no accelerate.tracking.GeneralTracker"),
    ],
)
def test_what_cannot_be_used_is_refused_before_anything_is_loaded(name, message):
    with pytest.raises(UserError, match=message):
        check_trackers([name])


@pytest.mark.parametrize(
    ("names", "message"), [(["wandbb"], "monitor.trackers has 'wandbb'; allowed: aim, "), (["a:B", "a:B"], "once")]
)
def test_names_are_checked_with_the_run_file(names, message):
    with pytest.raises(UserError, match=message):
        from_dict({"monitor": {"trackers": names}}, "sample")
    assert Config().monitor.trackers == ()
    assert Config().monitor.watched
