"""Small training runs for the tests: the real command line on a tiny corpus and a tiny backbone."""

import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from nursery import Nursery, Task
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "aullm_dist" / "train.py"
LIMIT = 1200.0
"""Seconds after which a run of a few steps is taken to hang."""
_nurseries: list[Nursery] = []


def overrides(dataset: Path, llm: Path | str, output: Path, **changes: object) -> list[str]:
    """Return `section.key=value` settings of a run of a few steps; `changes` are given as section__key=value."""
    settings = {
        "data.train": json.dumps([str(dataset)]),
        "data.protocol": "grouped",
        "data.folds": 3,
        "data.fold": 0,
        "data.inner_fraction": 0.3,
        "data.workers": 0,
        "data.size": _side_of(dataset),
        "model.llm": llm,
        "model.lora_rank": 4,
        "model.graph_width": 16,
        "model.graph_heads": 2,
        "training.output": output,
        "training.epochs": 2,
        "training.global_batch": 4,
        "training.micro_batch": 4,
        "training.cpu_threads": 1,
        # Planning takes seconds, and these backbones are of almost no size.
        "training.check_memory": False,
        "training.evaluate_every_epochs": 1,
        "training.baseline": False,
        # Off by default, but most of what can go wrong goes wrong with it.
        "counterfactual.enabled": True,
        "monitor.log_every_steps": 1,
        # Pictures take a second each time; tests of them ask for some.
        "monitor.clips": 0,
        "monitor.projector_clips": 0,
    }
    settings |= {name.replace("__", ".", 1): value for name, value in changes.items()}
    return [f"{name}={_as_yaml(value)}" for name, value in settings.items()]


def train_here(*arguments: str) -> int:
    """Run the main job in this process and return its exit code."""
    from accelerate.state import AcceleratorState, GradientState

    from aullm_dist.commands.train import main

    # Accelerate keeps one state per process; each run here is a start of its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    variables = dict(os.environ)
    try:
        return main(list(arguments))
    finally:
        # A run tells its own processes which device and modes it has; those of the next test may have others.
        os.environ.clear()
        os.environ.update(variables)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def environment_of_another_device(**variables: str) -> dict[str, str]:
    """Return the environment of a process that finds its own device, whatever ran in this process before."""
    return {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | variables


def launch(
    *arguments: str,
    processes: int = 1,
    launcher: tuple[str, ...] = (),
    script: Path = TRAIN,
    environment: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Start the main job, or a script around it, as a user would: through `accelerate launch`."""
    several = [f"--main_process_port={free_port()}"] if processes > 1 else []
    if processes > 1 and "--use_deepspeed" not in launcher:
        several.append("--multi_gpu")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", f"--num_processes={processes}"]
    command += [*several, "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", *launcher]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return subprocess.run(
        [*command, str(script), *arguments], capture_output=True, text=True, timeout=LIMIT, env=variables, check=False
    )


def fork(
    *arguments: str,
    processes: int = 1,
    program: Path | str = TRAIN,
    environment: dict[str, str] | None = None,
    limit: float = LIMIT,
) -> subprocess.CompletedProcess[str]:
    """Run the main job, or another program, in forked processes with the variables that `launch` gives them.

    This takes a tenth of the time of `launch`. On a machine with GPUs it is `launch`, because a GPU cannot be used in
    forked processes.

    Args:
        arguments: of the program.
        processes: their number.
        program: a script, or the name of a module.
        environment: more variables.
        limit: seconds after which the processes are killed.
    """
    is_module = isinstance(program, str)
    if shutil.which("nvidia-smi"):
        launcher = ("--module",) if is_module else ()
        return launch(*arguments, processes=processes, launcher=launcher, script=Path(program), environment=environment)
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    variables |= {"ACCELERATE_DYNAMO_BACKEND": "NO", **(environment or {})}
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    group |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    ranks = [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    tasks = [
        Task(str(program), arguments, variables | (rank if processes > 1 else {}), is_module=is_module)
        for rank in ranks
    ]
    with tempfile.TemporaryDirectory() as attempt:
        for rank, task in enumerate(tasks if processes > 1 else []):
            folder = Path(attempt, str(rank))
            folder.mkdir()
            task.environment["TORCHELASTIC_ERROR_FILE"] = str(folder / "error.json")
        ended = nursery().run(tasks, limit=limit)
    # As torchrun says it when it ends.
    ends = [f"exitcode: {code} (pid of rank {rank})\n" for rank, code in enumerate(ended.codes) if any(ended.codes)]
    errors = "".join([nursery().greeting, *ended.errors, *(ends if processes > 1 else [])])
    return subprocess.CompletedProcess(arguments, ended.returncode, "".join(ended.outputs), errors)


def nursery() -> Nursery:
    """Return this test process's nursery, which begins with the first call and ends with the tests."""
    if not _nurseries or _nurseries[-1].closed:
        _nurseries.append(Nursery())
        atexit.register(_nurseries[-1].close)
    return _nurseries[-1]


def partition_everything(folder: Path, ahead: int = 20_000) -> Path:
    """Write a strategy of the user's own: zero3.json, but no parameter stays whole for being small or soon needed.

    Up to `ahead` values are gathered ahead of their use, a few layers of a tiny LLM; 0 gathers nothing ahead.
    """
    content = json.loads((ROOT / "configs" / "deepspeed" / "zero3.json").read_text())
    content["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": ahead,
        "stage3_prefetch_bucket_size": ahead // 2,
    }
    path = folder / "zero3_all.json"
    path.write_text(json.dumps(content))
    return path


def free_port() -> int:
    """Return a loopback port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Trained:
    """A finished run of `launch`."""

    folder: Path
    settings: list[str]
    stderr: str

    @property
    def curve(self) -> tuple[list[float], list[float]]:
        """Loss and gradient norm, step by step."""
        return scalars(self.folder, "loss/loss"), scalars(self.folder, "train/grad_norm")


def interrupted(run: Path, copy: Path) -> Path:
    """Copy a finished run as if it had been killed after its last checkpoint but one, and return the copy."""
    shutil.copytree(run, copy)
    shutil.rmtree(newest_checkpoint(copy))
    shutil.rmtree(copy / "fold-00" / "predictions")
    return copy


def newest_checkpoint(run: Path, fold: int = 0) -> Path:
    """Return the last checkpoint of a fold."""
    return sorted((run / f"fold-{fold:02d}" / "checkpoints").glob("step-*"))[-1]


def checkpoint_tensors(folder: Path) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint, with its file's name before its own."""
    return {f"{path.name}:{name}": t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def logits(run: Path, fold: int = 0) -> dict[str, list[float]]:
    """Return the final logits of a fold by sample id, inner clips included."""
    path = sorted((run / f"fold-{fold:02d}" / "predictions").glob("epoch-*.jsonl"))[-1]
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return {row["sample_id"]: row["logits"] for row in rows}


def scalars(run: Path, tag: str, fold: int = 0) -> list[float]:
    """Return the values of a TensorBoard scalar, step by step; losses are called `loss/...`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / f"fold-{fold:02d}"))
    events.Reload()
    return [event.value for event in events.Scalars(re.sub("^loss/", "Loss/", tag))]


def _side_of(dataset: Path) -> int:
    """Return the side of a prepared dataset's clips in pixels, or the default where a damaged dataset does not say."""
    try:
        return json.loads((dataset / "report.json").read_text())["size"]
    except (OSError, ValueError, LookupError, TypeError):
        return 64


def _as_yaml(value: object) -> object:
    return {True: "true", False: "false", None: "null"}.get(value, value) if isinstance(value, bool | None) else value
