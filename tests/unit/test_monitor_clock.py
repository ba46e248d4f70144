"""Where the time of a step goes, read without waiting for the device."""

import math

import pytest
import torch
from torch import nn

from aullm_dist.monitoring import clock as monitor_clock
from aullm_dist.monitoring.clock import StepClock


class Ticks:
    """A clock that tests turn by hand."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(monitor_clock.time, "perf_counter", lambda: self.now)

    def pass_(self, seconds):
        self.now += seconds


def one_step(clock, ticks, step, micro_batches=1):
    clock.begin(step)
    for micro in range(micro_batches):
        clock.mark(None)
        for part, seconds in (("data", 0.010), ("forward", 0.020)):
            ticks.pass_(seconds)
            clock.mark(part)
        ticks.pass_(0.040)
        clock.backward_ended()
        ticks.pass_(0.005 if micro == micro_batches - 1 else 0.0)
        clock.mark("optimizer")
    clock.end()


def test_parts_of_a_step_add_up(monkeypatch):
    ticks = Ticks(monkeypatch)
    clock = StepClock(torch.device("cpu"))
    one_step(clock, ticks, 0)
    ticks.pass_(100.0)  # an evaluation is nobody's part
    one_step(clock, ticks, 1)
    assert clock.read() == pytest.approx(
        {"data": 10, "forward": 20, "backward": 40, "optimizer": 5, "total": 75}, abs=1e-6
    )
    assert clock.read() == {}
    one_step(clock, ticks, 2, micro_batches=3)
    assert clock.read()["total"] == pytest.approx(3 * 70 + 5)


def test_an_engine_that_steps_inside_of_backward_tells_when(monkeypatch):
    ticks = Ticks(monkeypatch)
    clock = StepClock(torch.device("cpu"))
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    unwatch = clock.watch(optimizer)

    def step():
        clock.begin(0)
        clock.mark(None)
        ticks.pass_(0.030)
        optimizer.step()
        ticks.pass_(0.007)
        optimizer.step()  # one of several pieces
        clock.backward_ended()
        clock.mark("optimizer")
        clock.end()
        return clock.read()

    assert step() == pytest.approx({"data": 0, "forward": 0, "backward": 30, "optimizer": 7, "total": 37})
    unwatch()
    assert step()["backward"] == pytest.approx(37)


class Event:
    """Stands for a CUDA event whose moment the device reaches when the test says so."""

    reached = 0.0
    made = 0

    def __init__(self, **_):
        Event.made += 1

    def query(self):
        return Event.reached >= self.at

    def elapsed_time(self, other):
        assert self.query(), "a moment was read before the device had reached it"
        assert other.query(), "a moment was read before the device had reached it"
        return 1e3 * (other.at - self.at)

    def synchronize(self):
        raise AssertionError("the host waited for the device")


def test_on_a_gpu_moments_are_read_late_and_never_waited_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    ticks = Ticks(monkeypatch)
    clock = StepClock(torch.device("cuda"))
    monkeypatch.setattr(Event, "record", lambda event: setattr(event, "at", ticks.now), raising=False)
    for step in range(3):
        one_step(clock, ticks, step)
    assert clock.read() == {}, "the device is far behind"
    Event.reached = 0.150  # two steps of 75 ms
    assert clock.read()["total"] == pytest.approx(75)
    made = Event.made
    Event.reached = math.inf
    clock.read()
    one_step(clock, ticks, 3)
    assert Event.made == made, "events are used again"
    for step in range(4, 300):
        Event.reached = 0.0
        one_step(clock, ticks, step)
    assert len(clock._open) <= monitor_clock._MOST_OPEN


def test_waits_for_others_are_seen_in_sampled_steps_alone(monkeypatch):
    ticks = Ticks(monkeypatch)

    class Work:
        """What a collective gives back; its wait takes 6 ms."""

        def wait(self):
            ticks.pass_(0.006)
            return True

    monkeypatch.setattr(torch.distributed, "Work", Work)
    weight = nn.Parameter(torch.ones(1))
    clock = StepClock(torch.device("cpu"), [weight], sample_every=2)
    found = []
    for step in range(4):
        clock.begin(step)
        clock.mark(None)
        assert Work().wait()
        (2 * weight).sum().backward()
        ticks.pass_(0.009)  # what DDP still sends when the last gradient is there
        clock.backward_ended()
        clock.mark("optimizer")
        ticks.pass_(0.5)
        clock.end()
        found.append(clock.read().get("communication_wait"))
    assert found == [None, pytest.approx(15), None, pytest.approx(15)]
    assert Work.wait.__qualname__.endswith("Work.wait"), "nothing stays behind in torch"
    assert not weight._post_accumulate_grad_hooks


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose streams are waited for by hand: its clock, the computing stream and another one."""
    ticks = Ticks(monkeypatch)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "reached", math.inf)
    monkeypatch.setattr(Event, "record", lambda event: setattr(event, "at", ticks.now), raising=False)

    class Stream:
        def wait_event(self, _):
            ticks.pass_(0.004)

        def wait_stream(self, _):
            self.wait_event(None)

        def synchronize(self):
            ticks.pass_(0.002)

    computing, other = Stream(), Stream()
    current = [computing]
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    return ticks, computing, other, current


def sampled_wait(ticks, wait):
    """Return the milliseconds of `communication_wait` of a step in which `wait` is called."""
    clock = StepClock(torch.device("cuda"), sample_every=1)
    clock.begin(0)
    clock.mark(None)
    ticks.pass_(0.1)
    wait()
    clock.mark("forward")
    clock.end()
    return clock.read()["communication_wait"]


def test_on_a_gpu_waits_of_the_computing_stream_for_others_count(gpu):
    """As ZeRO-3 waits: `current_stream().wait_stream(allgather_stream)`, and `synchronize` of its reducing stream."""
    ticks, computing, other, current = gpu
    before = dict(vars(torch.cuda.Stream))
    assert sampled_wait(ticks, lambda: computing.wait_stream(other)) == pytest.approx(4), "counted once"
    assert sampled_wait(ticks, lambda: computing.wait_event(None)) == pytest.approx(4)
    assert sampled_wait(ticks, lambda: other.synchronize()) == pytest.approx(2)
    assert dict(vars(torch.cuda.Stream)) == before, "nothing stays behind in torch"


def test_waits_that_hold_up_no_computing_do_not_count(gpu):
    ticks, computing, other, current = gpu
    assert sampled_wait(ticks, lambda: other.wait_stream(computing)) == 0

    def on_the_other_stream():
        current[0] = other
        other.wait_stream(computing)
        current[0] = computing

    assert sampled_wait(ticks, on_the_other_stream) == 0


def test_the_methods_that_are_watched_are_those_of_torch():
    """Renamed, they would read 0 without a word; `__eq__` is what tells the computing stream."""
    for name in ("wait_stream", "wait_event", "synchronize", "__eq__"):
        assert name in vars(torch.cuda.Stream), name
