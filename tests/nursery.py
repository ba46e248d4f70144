"""A process that has imported everything a run needs, and forks the processes of a run instead of starting them.

Starting a process of a run costs about 10 s of CPU time, nearly all of it for imports; a fork costs a few milliseconds.
What a launcher adds is tested with real ones (`training_runs.launch`).

The nursery computes nothing itself: a process that has used the threads of a library cannot be forked. It is not for
machines with GPUs, whose driver does not survive a fork either.
"""

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

READ_AT_IMPORT = (
    "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "PYTHONPATH", "TRITON_INTERPRET",
)  # fmt: skip
"""Variables that libraries read while they are imported: a forked process cannot have others than the nursery."""
_VARIABLES = {"DS_ACCELERATOR": "cpu", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""Of the nursery alone: DeepSpeed need not look for a GPU, and the allocator of pyarrow begins no thread."""
_PATIENCE_SECONDS = 30.0
"""Between SIGTERM and SIGKILL, as torchrun has it."""
_LIBRARIES = (
    "torch", "bitsandbytes", "datasets", "deepspeed", "matplotlib.backends.backend_agg", "peft.tuners.lora.bnb",
    "torch.utils.tensorboard", "transformers.integrations.bitsandbytes", "transformers.models.llama.modeling_llama",
)  # fmt: skip
_ROOT = Path(__file__).resolve().parents[1]
_PR_SET_PDEATHSIG = 1  # from linux/prctl.h


@dataclass(frozen=True)
class Task:
    """One process of a run."""

    program: str
    """A script's path, or a module's name."""
    arguments: Sequence[str]
    environment: Mapping[str, str]
    """All variables, as of a process that is started."""
    is_module: bool = False


@dataclass(frozen=True)
class Ended:
    """How the processes of a run ended: exit codes, or negative numbers of signals."""

    codes: list[int]
    outputs: list[str]
    errors: list[str]
    returncode: int
    """Of the process that failed first, 0 if none failed."""


class Nursery:
    """The test's end of a nursery; `close` ends it."""

    def __init__(self) -> None:
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # A session of its own: Ctrl-C reaches the tests alone, and they close what they opened.
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**self.environment, **_VARIABLES}, start_new_session=True,
        )  # fmt: skip
        self.greeting: str = self._answer()["greeting"]
        """What the libraries print while they are imported."""

    def run(self, tasks: Sequence[Task], *, limit: float, together: bool = True) -> Ended:
        """Fork processes, and return when all of them have ended.

        Args:
            tasks: one for each process.
            limit: seconds after which they are killed.
            together: whether the first that fails ends the others, as under a launcher.

        Raises:
            subprocess.TimeoutExpired: they were killed.
        """
        for task in tasks:
            other = [n for n in READ_AT_IMPORT if task.environment.get(n) != self.environment.get(n)]
            assert not other, f"a forked process cannot have another {other[0]}; start one with a launcher"
        with tempfile.TemporaryDirectory(prefix="nursery-") as folder:
            request = {
                "tasks": [asdict(task) for task in tasks], "folder": folder, "limit": limit, "together": together,
                "directory": os.getcwd(),
            }  # fmt: skip
            try:
                self._server.stdin.write(json.dumps(request) + "\n")
                self._server.stdin.flush()
                answer = self._answer()
            except BaseException:
                self.close()  # the next answer would be the one that nobody waited for
                raise
            outputs, errors = (
                [(Path(folder) / f"{rank}.{kind}").read_text(errors="replace") for rank in range(len(tasks))]
                for kind in ("out", "err")
            )
        if answer["timed_out"]:
            sys.stderr.write("".join([*outputs, *errors]))  # pytest shows it with the failure
            raise subprocess.TimeoutExpired([task.program for task in tasks], limit, "".join(outputs), "".join(errors))
        return Ended(answer["codes"], outputs, errors, answer["first"])

    def _answer(self) -> dict:
        line = self._server.stdout.readline()
        assert line, f"the nursery ended with {self._server.wait()}"
        return json.loads(line)

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._server.stdin.closed

    def close(self) -> None:
        """End it, and what it has forked."""
        with contextlib.suppress(BrokenPipeError):
            self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def import_everything() -> None:
    """Import what runs and commands import: our modules, but for those that are started, and what they import late."""
    from aullm_dist.quiet import hide_missing_cpu_kernel

    hide_missing_cpu_kernel()
    package = _ROOT / "aullm_dist"
    files = [path for path in sorted(package.rglob("*.py")) if path not in (package / "cli.py", package / "train.py")]
    ours = [".".join(path.relative_to(_ROOT).with_suffix("").parts).removesuffix(".__init__") for path in files]
    for name in (*_LIBRARIES, *ours):
        importlib.import_module(name)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryFile() as greeting:
        own = os.dup(2)
        for number in (1, 2):
            os.dup2(greeting.fileno(), number)
        try:
            import_everything()
        finally:
            for file, number in ((sys.stdout, 1), (sys.stderr, 2)):
                file.flush()
                os.dup2(own, number)
        greeting.seek(0)
        said = greeting.read().decode(errors="replace")
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"an import has started {len(threads) - 1} threads; a fork would lose them"
    # A collection in a fork would look at all of these objects, and copy their memory.
    gc.freeze()
    atexit.register(gc.unfreeze)
    answers.write(json.dumps({"greeting": said}) + "\n")
    answers.flush()
    while line := sys.stdin.readline():
        answer = _run(json.loads(line), answers)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _run(request: dict, answers: object) -> dict:
    """Fork the processes of a run and wait for them; only the parent returns."""
    running: dict[int, int] = {}
    # Here, as a process that the first failure ends at once has not come to open its own.
    for rank in range(len(request["tasks"])):
        for kind in ("out", "err"):
            Path(request["folder"], f"{rank}.{kind}").touch()
    for rank, task in enumerate(request["tasks"]):
        pid = os.fork()
        if pid == 0:
            answers.close()
            _become(task, rank, request)
        running[pid] = rank
    codes, first, timed_out = [0] * len(running), 0, False
    deadline = time.monotonic() + request["limit"]
    kill_at = float("inf")
    hangup = select.poll()
    hangup.register(0, 0)
    while running:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            code = codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
            if code and not first:
                first = code
                if request["together"]:
                    kill_at = time.monotonic() + _PATIENCE_SECONDS
                    _signal(running, signal.SIGTERM)
        timed_out |= bool(running) and time.monotonic() > deadline
        if timed_out or time.monotonic() > kill_at or hangup.poll(0):
            _signal(running, signal.SIGKILL)
        time.sleep(0.01)
    return {"codes": codes, "first": first, "timed_out": timed_out}


def _signal(pids: Mapping[int, int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def _become(task: dict, rank: int, request: dict) -> None:
    """Be a process that was started with a program: how it ends, too, is left to the program and to Python."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    folder = request["folder"]
    for number, (path, flags) in enumerate(
        ((os.devnull, os.O_RDONLY), (f"{folder}/{rank}.out", os.O_WRONLY), (f"{folder}/{rank}.err", os.O_WRONLY))
    ):
        file = os.open(path, flags | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(task["environment"])
    sys.argv = [task["program"], *task["arguments"]]
    if task["is_module"]:
        sys.path[0] = request["directory"]
        runpy.run_module(task["program"], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(task["program"]).parent)
        runpy.run_path(task["program"], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    _serve()
