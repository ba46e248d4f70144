"""Event files that cannot fail a run, troubles in words, one line of progress."""

import io
import logging
import math
import shutil
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from aullm_dist.config import load
from aullm_dist.monitoring import console as monitor_console
from aullm_dist.monitoring import events as monitor_events
from aullm_dist.monitoring.clock import StepClock
from aullm_dist.monitoring.console import Console, duration
from aullm_dist.monitoring.events import EventFile
from aullm_dist.monitoring.health import Health
from aullm_dist.monitoring.overview import flat_settings
from aullm_dist.monitoring.writer import LAYOUT, Monitor
from aullm_dist.training.guard import GradientGuard
from aullm_dist.training.progress import LoopMonitor


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("aullm_dist"), "propagate", True)
    caplog.set_level(logging.INFO, logger="aullm_dist")
    return lambda: [record.getMessage() for record in caplog.records]


def read(folder):
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    return events


# Event files


def test_what_is_written_is_read_back(tmp_path):
    monitor = Monitor(tmp_path, active=True, purge_step=None)
    monitor.groups({"loss": {"loss": 0.5, "asl": None}, "lr": {"lora": 1e-3}}, 7)
    monitor.curve("pr/AU4", np.array([1, 0, 1]), np.array([0.9, 0.1, 0.4]), 7)
    monitor.picture("picture", np.zeros((4, 5, 3), np.uint8), 7)
    monitor.layout()
    assert monitor.close()
    events = read(tmp_path)
    assert events.Tags()["scalars"] == ["loss/loss", "lr/lora"]
    (event,) = events.Scalars("loss/loss")
    assert (event.step, event.value) == (7, 0.5)
    assert {"pr/AU4", "custom_scalars__config__"} <= set(events.Tags()["tensors"])
    assert (events.Images("picture")[0].height, events.Images("picture")[0].width) == (4, 5)


def test_a_resumed_run_takes_back_what_it_writes_anew(tmp_path):
    for purge, steps in ((None, (1, 2, 3)), (2, (2, 3, 4))):
        monitor = Monitor(tmp_path, active=True, purge_step=purge)
        for step in steps:
            monitor.scalars("loss", {"loss": step + (0.5 if purge else 0.0)}, step)
        monitor.close()
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("loss/loss")] == [(1, 1), (2, 2.5), (3, 3.5), (4, 4.5)]


def test_who_is_not_active_writes_nothing(tmp_path):
    monitor = Monitor(tmp_path / "events", active=False, purge_step=None)
    monitor.scalars("loss", {"loss": 1.0}, 1)
    assert not monitor.works
    assert not monitor.close()
    assert not (tmp_path / "events").exists()


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert condition()


@pytest.mark.parametrize("trouble", ["full", "removed", "in the way"])
def test_a_disk_that_fails_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, said, trouble):
    monkeypatch.setattr(monitor_events, "_FLUSH_SECONDS", 0.01)
    folder = tmp_path / "events"
    if trouble == "in the way":
        folder.write_text("a file")
    if trouble == "full":

        def on_a_full_disk(path, mode):
            path.touch()  # or a thread that waits for its first event finds the name gone before the disk full
            return io.FileIO("/dev/full", "w")  # Linux's device that is always full

        monkeypatch.setattr(monitor_events, "open", on_a_full_disk, raising=False)
    file = EventFile(folder)
    if trouble == "removed":
        wait_for(lambda: file.path.exists())
        shutil.rmtree(folder)
    file.scalars({"loss/loss": 1.0}, 1)
    wait_for(lambda: file._problem is not None)
    for step in range(2, 400):
        file.scalars({"loss/loss": 1.0}, step)
    assert not file.works
    assert not file.close()
    later = EventFile(tmp_path / "another fold")
    later.failed("the same trouble")
    assert not later.works
    (message,) = said()
    assert "the run continues without event files" in message
    assert {"full": "No space left", "removed": "was removed", "in the way": "File exists"}[trouble] in message


def test_a_disk_that_hangs_does_not_hold_the_run_up(tmp_path, monkeypatch, said):
    monkeypatch.setattr(monitor_events, "_CLOSE_SECONDS", 0.05)
    recovers = threading.Event()
    monkeypatch.setattr(EventFile, "_look", lambda self: recovers.wait(60))
    file = EventFile(tmp_path)
    wait_for(lambda: file.path.exists())
    for step in range(2 * monitor_events._WAITING):
        file.scalars({"loss/loss": 1.0}, step)
    assert not file.close()
    assert file._thread.is_alive(), "it still hangs"
    recovers.set()
    assert len(said()) == 1


# Troubles


@pytest.fixture
def health():
    return Health(2, ("structure", "appearance", "neutral"), active=True)


def test_aus_that_the_fold_cannot_teach_are_named(health, said):
    health.labels((1, 4, 12), np.array([[0, 1, 1], [0, 0, 1]]))
    assert len(said()) == 2
    assert "no positive among the 2 training clips for AU1:" in said()[0]
    assert "no negative among the 2 training clips for AU12:" in said()[1]
    assert all("data.aus" in line for line in said())


def test_an_intervention_that_never_comes_is_said_once(health, said):
    for step in range(1, 30):
        health.losses({"loss": 1.0, "structure": 0.0, "appearance": 1e-9}, 16, step)
    assert len(said()) == 2
    assert "neutral has not come up in 208 clips" in said()[0]
    assert "counterfactual.neutral_probability" in said()[0]
    assert "the term structure was 0 in all of 208 clips" in said()[1]


def test_a_loss_that_diverges_or_is_none_is_said_once(health, said):
    for step in range(20):
        health.losses({"loss": 1.0 / (step + 1)}, 1, step)
    assert said() == []
    for step in range(20, 40):
        health.losses({"loss": 5.0}, 1, step)
    (message,) = said()
    assert "it diverges" in message
    assert "training.lr_new" in message
    for step in range(3):
        health.losses({"loss": math.nan}, 1, 40 + step)
    assert "the loss is nan at step 40" in said()[1]
    assert len(said()) == 2


def test_a_loop_that_waits_for_its_data_is_told_what_to_do(health, said):
    slow, quick = {"data": 40.0, "total": 100.0}, {"data": 2.0, "total": 100.0}
    for parts in (slow, slow, quick, slow, slow, {}):
        health.times(parts, workers=2)
    assert said() == []
    for _ in range(5):
        health.times(slow, workers=2)
    (message,) = said()
    assert "40% of a step waits for clips" in message
    assert "data.workers (now 2" in message


def test_parts_without_a_gradient_are_named_once(health, said):
    health.parts(["graph"])
    health.parts(["graph", "projector"])
    assert ["graph" in said()[0], "projector" in said()[1], len(said())] == [True, True, 2]
    assert health.said == 2


class Parts(nn.Module):
    """A model of three parts, of which the graph is left out of the loss."""

    def __init__(self):
        super().__init__()
        self.visual, self.graph, self.reasoner = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x):
        return self.reasoner(self.visual(x)) + 0.0 * self.graph(x)


def test_a_part_that_no_gradient_reaches_is_found_in_the_optimizer(said, tmp_path):
    model = Parts()
    config = load(None, ["training.global_batch=2", "training.micro_batch=2"])
    guard = GradientGuard(torch.optim.AdamW(model.parameters(), fused=True), 3, fold=0)
    guard.optimizer.param_groups[0]["name"] = "new"
    step = SimpleNamespace(guard=guard, clock=StepClock(torch.device("cpu")))
    built = SimpleNamespace(model=model, relations=None)
    monitor = Monitor(tmp_path, active=True, purge_step=None)
    with LoopMonitor(
        Accelerator(cpu=True), config, built, step, monitor, name="Fold 0", fold=0, span=(0, 2)
    ) as watch:  # fmt: skip
        watch.look_at_parts()
        assert said() == [], "nothing was trained yet"
        model(torch.ones(1, 2)).sum().backward()
        guard.step(torch.tensor(1.0), 0)
        watch.losses.add({"loss": torch.tensor([3.0, 2.0])})
        watch.rate.add(2, 64)
        watch.logged(1, 0.5)
        watch.look_at_parts()
        watch.look_at_parts()
    (message,) = said()
    assert "no gradient has reached the graph" in message
    assert "loss 1.5 -> 1.5" in watch.summary(1)
    assert "1 thing to look at" in watch.summary(1)
    monitor.close()
    assert read(tmp_path).Scalars("Loss/loss")[0].value == 1.5
    assert "mfu" not in " ".join(read(tmp_path).Tags()["scalars"])


def test_other_processes_keep_silent(said):
    health = Health(0, (), active=False)
    health.labels((1,), np.array([[0]]))
    assert said() == []


# Console


def test_plain_lines_where_nobody_watches(said, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(monitor_console.time, "monotonic", lambda: now[0])
    with Console("Fold 3 (4 of 26)", 10, 110, active=True) as console:
        for done in range(11, 111):
            now[0] += 1.0
            console.facts(0.5, 41.25, 2.125)
            console.step(done)
    assert "\r" not in capsys.readouterr().err, "no live line where stderr is no terminal"
    assert len(said()) == 8
    assert said()[0] == "Fold 3 (4 of 26): 10% 11/110 steps, loss 0.5, 41.2 clips/s, 2.1 GiB, 1 min 39 s left"
    assert said()[-1] == "Fold 3 (4 of 26): 100% 110/110 steps, loss 0.5, 41.2 clips/s, 2.1 GiB"


def test_a_terminal_gets_one_live_line(said, monkeypatch, capsys):
    monkeypatch.setattr(monitor_console.sys.stderr, "isatty", lambda: True, raising=False)
    with Console("Fold 0", 0, 2, active=True) as console:
        console.facts(0.5, None, 2.0)
        console.step(1)
        console.step(2)
    shown = capsys.readouterr().err
    assert "Fold 0: 100%" in shown
    assert "loss 0.5, 2 GiB" in shown
    assert shown.count("\n") == 1
    assert said() == []


def test_only_the_main_process_speaks(said, capsys):
    with Console("Fold 0", 0, 1, active=False) as console:
        console.step(1)
    assert said() == []
    assert capsys.readouterr().err == ""


def test_durations():
    assert [duration(s) for s in (0.4, 59.4, 185, 7800)] == ["0 s", "59 s", "3 min 5 s", "2 h 10 min"]


# The rest


def test_hyperparameters_are_numbers_and_words():
    settings = flat_settings(
        load(None, ["data.train=[a,b]", "training.output=somewhere", "counterfactual.enabled=true"])
    )
    assert settings["data.train"] == "a, b"
    assert settings["model.lora_rank"] == 16
    assert settings["counterfactual.enabled"] is True
    assert "training.output" not in settings
    assert all(isinstance(value, str | int | float | bool) for value in settings.values())


def test_the_first_screen_asks_for_scalars_that_exist():
    tags = [tag for charts in LAYOUT.values() for group in charts.values() for tag in group]
    assert len(tags) == len(set(tags))
    assert all(tag.count("/") == 1 for tag in tags)
