"""The benchmark of engines: its settings are the trainer's, and a failed run says why in one line."""

import sys

import pytest
from benchmark_scripts import benchmark

from aullm_dist.config import find_config, load, load_strategy

LAUNCHER = """torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
=====
aullm_dist/train.py FAILED
Failures:
[1]:
  exitcode  : -15 (pid: 2)
  traceback : Signal 15 (SIGTERM) received by PID 2
Root Cause (first observed failure):
[0]:
  exitcode  : {code} (pid: 1)
  error_file: <N/A>
  traceback : {said}
=====
"""


@pytest.fixture(scope="module")
def engines():
    with benchmark("engines") as module:
        yield module


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_every_row_is_a_run_that_the_trainer_accepts(engines, tmp_path, monkeypatch, processes):
    monkeypatch.setattr(sys, "argv", ["engines.py", "--quick", "--processes", str(processes)])
    monkeypatch.setattr(engines.torch.cuda, "device_count", lambda: 0)
    bench = engines.set_up(tmp_path, engines.parse_arguments())
    for engine in engines.ENGINES:
        for precision in engines.PRECISIONS:
            settings = engines.overrides(bench, engine, "llama", precision, tmp_path / "run")
            training = load(find_config("demo"), settings).training
            strategy = load_strategy(training.strategy)
            assert (strategy.stage or 0) == (int(engine[-1]) if engine != "ddp" else 0)
            assert training.global_batch == training.micro_batch * processes * engines.MICRO_BATCHES_PER_STEP


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        (
            "ValueError: earlier\ntrain.py: error: what; allowed: that\n" + LAUNCHER.format(code=2, said="see"),
            "train.py: error: what; allowed: that",
        ),
        (
            "INFO step\n[rank1]: Traceback (most recent call last):\n[rank1]: torch.OutOfMemoryError: 1 GiB\n"
            + LAUNCHER.format(code=1, said="see"),
            "[rank1]: torch.OutOfMemoryError: 1 GiB",
        ),
        (
            LAUNCHER.format(code=-11, said="Signal 11 (SIGSEGV) received by PID 1"),
            "Signal 11 (SIGSEGV) received by PID 1",
        ),
        (LAUNCHER.format(code=2, said="see"), "exitcode  : 2 (pid: 1)"),
        ("", "nothing on stderr"),
    ],
)
def test_a_failed_run_says_why_in_one_line(engines, errors, expected):
    assert engines.reason(errors, 1) == f"exit code 1: {expected}"


def test_a_failed_row_stays_in_the_table(engines):
    common = {"engine": "ddp", "architecture": "llama", "precision": "fp32", "wall_seconds": 1.0}
    good = common | {"loss": 0.25, "host_peak_mib": 800.4, "seconds_per_step": 0.0123}
    lines = engines.table([good, common | {"error": "a | b"}]).splitlines()
    assert lines[2] == "| llama | fp32 | ddp | 0.25000 | 800 | 12 |"
    assert lines[3] == "| llama | fp32 | ddp | failed: a / b |  |  |"
    assert lines[0].count("|") == lines[3].count("|")
    assert "GPU" in engines.table([good | {"gpu_peak_mib": 3.25}])
