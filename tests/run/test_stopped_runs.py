"""A run that is asked to stop: wherever it is, it saves, leaves with 0 and a marker, and goes on as if nothing was."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from training_runs import (
    TRAIN,
    checkpoint_tensors,
    free_port,
    logits,
    newest_checkpoint,
    overrides,
    partition_everything,
    train_here,
)  # fmt: skip

from aullm_dist.checkpoint import store as checkpoint
from aullm_dist.checkpoint.manifest import verify_checkpoint
from aullm_dist.training import fold, heldout, run, step

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def whole(small_dataset, tiny_llm, tmp_path_factory):
    """A run that nobody stops: six steps of two micro-batches, evaluations at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    settings = overrides(
        small_dataset, tiny_llm, folder, training__micro_batch=2, training__max_steps=6, training__epochs=9,
        training__keep_checkpoints=9, data__workers=1,
    )  # fmt: skip
    assert train_here(*settings) == 0
    return folder, settings


def ask(monkeypatch, module, name, call, number=signal.SIGUSR1):
    """Signal this process while it is in the `call`-th call of a function."""
    original, calls = getattr(module, name), []

    def asked(*args, **kwargs):
        calls.append(name)
        if len(calls) == call:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, asked)


# Where a run is signalled, and the step that its newest checkpoint then has.
MOMENTS = {
    "load": (run, "build_model", 1, None),
    "accumulation": (step.TrainStep, "forward", 9, 4),
    "evaluation": (heldout, "evaluation_batches", 1, 3),
    "last evaluation": (heldout, "evaluation_batches", 3, 6),
    "save": (checkpoint, "write_manifest", 1, 3),
    "resume": (fold, "find_newest_valid", 1, None),
}


@pytest.mark.parametrize(
    ("moment", "number"), [*((moment, signal.SIGUSR1) for moment in MOMENTS), ("save", signal.SIGTERM)]
)
def test_stops_anywhere_and_goes_on_bit_identically(whole, tmp_path, monkeypatch, moment, number):
    reference, settings = whole
    stopped = tmp_path / "run"
    arguments = [*settings, f"training.output={stopped}", "--resume", "auto"]
    module, name, call, saved = MOMENTS[moment]
    with monkeypatch.context() as patch:
        ask(patch, module, name, call, number)
        assert train_here(*arguments) == 0
    marker = json.loads((stopped / "fold-00" / "PREEMPTED").read_text())
    assert (marker["job_id"], marker["restart_count"]) == (None, 0)
    checkpoints = sorted(stopped.glob("fold-00/checkpoints/step-*"))
    assert [path.name for path in checkpoints][-1:] == ([f"step-{saved:08d}"] if saved else [])
    assert marker["step"] == saved or not saved
    assert not (stopped / "metrics.json").exists()
    assert train_here(*arguments) == 0
    assert not (stopped / "fold-00" / "PREEMPTED").exists()
    expected, found = (checkpoint_tensors(newest_checkpoint(folder)) for folder in (reference, stopped))
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])] == []
    names = [sorted(path.name for path in folder.glob("fold-00/predictions/*")) for folder in (reference, stopped)]
    assert names[0] == names[1]
    assert logits(reference) == logits(stopped)


def test_one_signalled_process_stops_both(small_dataset, tiny_llm, tmp_path):
    """ZeRO-3 with everything divided, two micro-batches per step; only the second process is asked to stop."""
    run = tmp_path / "run"
    settings = overrides(
        small_dataset, tiny_llm, run, training__strategy=partition_everything(tmp_path), training__global_batch=8,
        training__micro_batch=2, training__epochs=999, training__max_steps=500, training__save_every_steps=2,
        training__evaluate_every_epochs=99, data__workers=1,
    )  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    with subprocess.Popen([*command, str(TRAIN), *settings], stderr=subprocess.PIPE, text=True) as launcher:
        checkpoints = run / "fold-00" / "checkpoints"
        while not list(checkpoints.glob("step-*")):
            assert launcher.poll() is None, launcher.stderr.read()
            time.sleep(0.1)
        os.kill(process_of_rank(1, launcher.pid), signal.SIGTERM)
        errors = launcher.communicate()[1]
    assert launcher.returncode == 0, errors
    marker = json.loads((run / "fold-00" / "PREEMPTED").read_text())
    assert newest_checkpoint(run).name == f"step-{marker['step']:08d}"
    assert marker["step"] < 500
    assert verify_checkpoint(newest_checkpoint(run)) == []


def process_of_rank(rank, parent):
    """Return the process of a rank below a launcher."""
    for child in psutil.Process(parent).children():
        if child.environ().get("RANK") == str(rank):
            return child.pid
    raise AssertionError(f"no process of rank {rank}")
