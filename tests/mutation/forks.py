"""Runs something in a fork within limits: CPU time, sleep and memory."""

import contextlib
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

_ASLEEP_SECONDS = 120.0
_MEMORY_BYTES = 16 << 30


def run_in_fork(body: Callable[[], int], log: Path, cpu_seconds: int) -> tuple[str, float]:
    """Return its exit code, or `out of time`, `asleep`, `signal N`; and the CPU seconds that it took.

    Args:
        body: returns the exit code.
        log: what it writes.
        cpu_seconds: after them it is killed, as it is when it takes none for two minutes.
    """
    begun = _children()
    pid = os.fork()
    if pid == 0:
        _become(body, log, cpu_seconds)
    used, since, pause = -1.0, time.monotonic(), 0.005
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        now = _cpu_of(pid)
        if now > used + 0.05:
            used, since = now, time.monotonic()
        if time.monotonic() - since > _ASLEEP_SECONDS:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return "asleep", _children() - begun
        time.sleep(pause)
        pause = min(0.1, 1.2 * pause)
    with contextlib.suppress(ProcessLookupError):  # what a test has left running
        os.killpg(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(status)
    ended = "out of time" if code == -signal.SIGXCPU else f"signal {-code}" if code < 0 else str(code)
    return ended, _children() - begun


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _cpu_of(pid: int) -> float:
    """Return the seconds of a process and of those of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return sum(int(field) for field in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def _become(body: Callable[[], int], log: Path, cpu_seconds: int) -> None:
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for number in (1, 2):
        os.dup2(file, number)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 5))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    code = 70
    try:
        code = body()
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(Exception):
            stream.flush()  # type: ignore[union-attr]
    os._exit(code)
