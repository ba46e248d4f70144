"""Agreement of the processes: seldom, at the same micro-batch, and never waited for where it was asked."""

import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from aullm_dist.config import load
from aullm_dist.runs import lifecycle as life_module
from aullm_dist.runs.job import JobRecord, is_preempted, read_record
from aullm_dist.runs.lifecycle import Life
from aullm_dist.runtime import preemption
from aullm_dist.runtime.preemption import EXCHANGE_SECONDS, Agreement, Preempted
from aullm_dist.runtime.signals import StopSignals, interrupted_later
from aullm_dist.runtime.slurm import Job


class Group:
    """Stands for a group of two processes; the other one may have been signalled."""

    def __init__(self, seconds):
        self.now, self.seconds, self.other = 100.0, seconds, 0.0
        self.sent: list[float] = []
        self.waited: list[float] = []

    def all_reduce(self, values, op, async_op):
        assert async_op
        self.sent.append(self.now)
        values.numpy()[0] = max(values.numpy()[0], self.other)
        return SimpleNamespace(wait=lambda: self.waited.append(self.now))


@pytest.fixture
def group(monkeypatch):
    """Return a function that makes an agreement whose micro-batches take some seconds each."""

    def make(seconds):
        group = Group(seconds)
        monkeypatch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: group.now))
        monkeypatch.setattr(preemption.dist, "all_reduce", group.all_reduce)
        accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
        return group, Agreement(accelerator, StopSignals())

    return make


def ticks(group, agreement, count):
    for _ in range(count):
        group.now += group.seconds
        agreement.tick()


@pytest.mark.parametrize("seconds", [0.01, 0.3, 20.0])
def test_flags_are_exchanged_seldom_and_read_later(group, seconds):
    group, agreement = group(seconds)
    ticks(group, agreement, 1000)
    # At every other micro-batch where one takes longer than the pause: one sends and the next reads.
    pause = max(EXCHANGE_SECONDS, 2 * seconds)
    assert len(group.sent) <= 1000 * seconds / pause + 3
    assert all(waited > sent for sent, waited in zip(group.sent, group.waited, strict=False))
    assert agreement.seconds_per_tick == pytest.approx(seconds, rel=0.2)


@pytest.mark.parametrize("seconds", [0.01, 0.3, 20.0])
def test_a_signal_of_any_process_stops_soon(group, seconds):
    group, agreement = group(seconds)
    ticks(group, agreement, 500)
    asked, group.other = group.now, 1.0
    with pytest.raises(Preempted):
        ticks(group, agreement, 10_000)
    assert group.now - asked <= EXCHANGE_SECONDS + 1.0 + 3 * seconds


def test_an_exchange_reads_no_value_of_the_device(group):
    group, agreement = group(10.0)
    ticks(group, agreement, 4)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        ticks(group, agreement, 4)
    names = {event.name for event in trace.events()}
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}


def test_alone_there_is_nobody_to_ask(monkeypatch):
    monkeypatch.setattr(preemption.dist, "all_reduce", None)
    signals = StopSignals()
    agreement = Agreement(SimpleNamespace(num_processes=1, device=torch.device("cpu")), signals)
    agreement.tick()
    signals.received = "SIGUSR1"
    with pytest.raises(Preempted):
        agreement.tick()


def test_signals_are_noted_and_then_left_alone():
    before = signal.getsignal(signal.SIGUSR1)
    signals = StopSignals()
    signals.install()
    try:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        deadline = time.monotonic() + 5
        while signals.received is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert signals.received == "SIGUSR1"
        assert not math.isnan(signals.received_at)
    finally:
        signals.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_an_interrupt_waits_for_the_end_of_a_region():
    reached = []

    def interrupted():
        with interrupted_later():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            reached.append("end")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert reached == ["end"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.fixture
def life(tmp_path, monkeypatch):
    """Return a function that makes the life of a job with a grace period."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")

    def make(grace_seconds):
        config = load(None, [f"training.output={tmp_path}", f"training.grace_seconds={grace_seconds}"])
        accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"), is_main_process=True)
        return Life(accelerator, config, StopSignals())

    return make


def test_a_save_that_does_not_fit_is_said_at_the_first_one(life, monkeypatch):
    said = {"warning": [], "info": []}
    for level, messages in said.items():
        monkeypatch.setattr(life_module.logger, level, lambda text, *values, to=messages: to.append(text % values))
    short = life(1.5)
    assert short.rehearses
    for _ in range(2):
        with short.saves():
            pass
    assert not short.rehearses
    (warning,) = said["warning"]
    assert "training.grace_seconds is 1.5; ask SLURM for more" in warning
    with life(300).saves():
        pass
    (line,) = said["info"]
    assert "about 2 s of the 300 s of training.grace_seconds" in line


def test_the_first_step_of_a_life_is_put_on_record(life, tmp_path):
    begun = life(300)
    begun.begins()
    assert read_record(tmp_path) == JobRecord("7", 0, False, 0)
    begun.completed_step()
    assert read_record(tmp_path) == JobRecord("7", 0, True, 0)


def test_leaving_while_loading_is_a_pre_emption(life, tmp_path):
    loading = life(300)
    loading.signals.leave_loading()
    assert is_preempted(tmp_path, Job("7", 0))
    assert not is_preempted(tmp_path, Job("7", 1))
