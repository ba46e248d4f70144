"""What launchers leave in the environment: one line for what cannot be, and nothing of it left for the libraries."""

import itertools
import logging
import time

import pytest

from aullm_dist import log
from aullm_dist.errors import UserError
from aullm_dist.runtime import waiting
from aullm_dist.runtime.launch import VARIABLES, check_launch, others_of

TWO = {
    "WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}  # fmt: skip
NO_NUMBERS = ("", " ", "two", "-1", "1.0", "0x2", "1" * 20, "1" * 5000, "²")
NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


def refusal(environment):
    with pytest.raises(UserError) as caught:
        check_launch(dict(environment))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_what_launchers_say_is_taken():
    assert check_launch({}) == 1
    assert check_launch({"RANK": "0", "LOCAL_RANK": "0"}) == 1
    assert check_launch({"WORLD_SIZE": "1"}) == 1
    assert check_launch(dict(TWO)) == 2
    # Some launchers say nothing of the machine.
    assert check_launch({name: TWO[name] for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}) == 2


@pytest.mark.parametrize(("name", "value"), list(itertools.product(NUMBERS, NO_NUMBERS)))
def test_a_variable_that_is_no_number_is_named(name, value):
    assert f"{name} is " in refusal({**TWO, name: value})


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"RANK": "2"}, "RANK is '2'; allowed: 0 to 1"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK is '2'"),
        ({"LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE is '3'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
        ({"RANK": None}, "RANK is not set"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": None}, "RANK is '1'; allowed where WORLD_SIZE is not set: 0"),
    ],
)
def test_a_variable_that_contradicts_another_is_named_with_what_to_unset(changes, part):
    message = refusal({name: value for name, value in {**TWO, **changes}.items() if value is not None})
    assert part in message
    assert "unset " in message


@pytest.mark.parametrize("name", ["PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["4", "x"])
def test_a_process_of_mpi_is_told_how_to_start_the_run(name, value):
    message = refusal({name: value, "PMI_RANK": "0"})
    assert f"{name} is '{value}'" in message
    assert "torchrun" in message
    assert "unset" in message
    assert "PMI_RANK" in message


def test_the_libraries_see_nothing_of_mpi_where_it_is_of_no_matter():
    alone = {"PMI_SIZE": "1", "PMI_RANK": "0", "OMPI_COMM_WORLD_SIZE": "", "MPI_LOCALRANKID": "3"}
    assert check_launch(alone) == 1
    assert alone == {}
    started = {**TWO, "PMI_SIZE": "64", "OMPI_COMM_WORLD_RANK": "9"}
    assert check_launch(started) == 2
    assert started == TWO


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *itertools.product(("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "FORK_LAUNCHED"), ("", "x", "3")),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
        ("ACCELERATE_FP8_BACKEND", "TE"),
    ],
)
def test_a_variable_of_accelerate_that_it_cannot_read_is_named(name, value):
    assert f"unset {name}" in refusal({name: value})
    assert check_launch({"ACCELERATE_USE_CPU": "true", "ACCELERATE_DEBUG_MODE": "0"}) == 1


@pytest.mark.parametrize("value", NO_NUMBERS)
def test_a_message_gets_out_before_the_variables_are_checked(monkeypatch, value):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, value)
    assert log.is_main_process()
    assert log.launcher_number("LOCAL_RANK") == 0
    monkeypatch.setenv("RANK", "1")
    assert log.is_main_process(), "a rank without a world is left over"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not log.is_main_process()


def test_a_process_that_waits_says_for_whom_and_where(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "PATIENCE_SECONDS", 0.05)
    with caplog.at_level(logging.WARNING, "aullm_dist"), waiting.announced(lambda: others_of(TWO)):
        deadline = time.monotonic() + 10
        while not caplog.records and time.monotonic() < deadline:
            time.sleep(0.01)
    (record,) = caplog.records
    said = record.getMessage()
    for part in ("process 1 of 2", "node1:29500", "the other process", f"unset {' '.join(VARIABLES[:2])}"):
        assert part in said
    assert waiting.PATIENCE_SECONDS < 20


def test_a_short_wait_and_a_process_that_is_not_to_speak_say_nothing(monkeypatch, caplog):
    with waiting.announced(lambda: "short"):
        pass
    monkeypatch.setattr(waiting, "PATIENCE_SECONDS", 0.01)
    with waiting.announced(lambda: "silent", speaks=False):
        time.sleep(0.1)
    assert not caplog.records
