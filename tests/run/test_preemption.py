"""A run that is asked to stop: wherever it is, it saves, leaves with 0 and a marker, and goes on as if nothing was."""

import json
import os
import signal

import pytest
import torch
from training_runs import (
    checkpoint_tensors,
    logits,
    newest_checkpoint,
    overrides,
    train_here,
)  # fmt: skip

from aullm_dist.training import checkpoint, fold, heldout, run, step

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def whole(tiny_dataset, tiny_llm, tmp_path_factory):
    """A run that nobody stops: six steps of two micro-batches, evaluations at steps 3 and 6."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    settings = overrides(
        tiny_dataset, tiny_llm, folder, training__micro_batch=2, training__max_steps=6, training__epochs=9,
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
