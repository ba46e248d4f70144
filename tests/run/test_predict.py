"""`aullm-dist predict` gives a trained model's own answers, by one process and by a divided LLM."""

import csv
import math
from pathlib import Path

import pytest
from training_runs import launch, logits, newest_checkpoint, overrides, partition_everything, train_here

from aullm_dist.cli import main

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def run(tiny_dataset, tiny_llm, tmp_path_factory) -> Path:
    """A short run on an NF4 base with products in float32, so that rounding tells little."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    settings = overrides(tiny_dataset, tiny_llm, folder, model__quantization="nf4", training__max_steps=2)
    assert train_here(*settings) == 0
    return folder


def predict_here(*arguments: object) -> int:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return main(["predict", *map(str, arguments)])


def answers_in(path: Path) -> dict[str, list[float]]:
    """Return the logits by sample id."""
    rows = list(csv.reader(path.open()))
    assert rows[0][:3] == ["sample_id", "corpus", "subject"]
    assert all(name.startswith("AU") for name in rows[0][3:])
    return {row[0]: [math.log(float(p) / (1 - float(p))) for p in row[3:]] for row in rows[1:]}


def check(found: dict[str, list[float]], run: Path) -> None:
    held_out = logits(run)
    assert len(found) == 24
    assert len(held_out) > 8
    for sample_id, expected in held_out.items():
        assert found[sample_id] == pytest.approx(expected, abs=2e-5), sample_id


def test_one_process_gives_the_answers_of_the_run(run, tiny_dataset, tmp_path, capsys):
    out = tmp_path / "answers.csv"
    assert predict_here(run / "fold-00", tiny_dataset, "--out", out, "--set", "training.micro_batch=3") == 0
    check(answers_in(out), run)
    said = capsys.readouterr().out
    assert "24 clips in" in said
    assert "f1_macro" in said


def test_a_divided_llm_gives_the_answers_of_the_run(run, tiny_dataset, tmp_path):
    out = tmp_path / "answers.csv"
    strategy = f"training.strategy={partition_everything(tmp_path)}"
    result = launch(
        "predict", str(newest_checkpoint(run)), str(tiny_dataset), "--out", str(out), "--set", strategy,
        processes=2, launcher=("--module",), script=Path("aullm_dist.cli"),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "divided among 2 processes" in result.stderr
    check(answers_in(out), run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "{run}"}, "holds no valid checkpoint; give a checkpoint or a fold"),
        ({"out": "{dataset}"}, "exists already; give the name of a new file"),
        ({"set": "model.lora_rank=2"}, "a prediction takes it from the checkpoint; allowed: model.llm, "),
        ({"set": "training.micro_batch=0"}, "training.micro_batch is 0; allowed: a finite number above 0"),
        ({"dataset": "{run}"}, "no prepared dataset; write one with aullm-dist prepare"),
        ({"set": "model.llm={run}"}, "backbone {run}:"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(run, tiny_dataset, tmp_path, capsys, changes, message):
    given = {"checkpoint": run / "fold-00", "dataset": tiny_dataset, "out": tmp_path / "answers.csv", "set": None}
    given |= {key: value.format(run=run, dataset=tiny_dataset) for key, value in changes.items()}
    options = ["--set", given["set"]] if given["set"] else []
    assert predict_here(given["checkpoint"], given["dataset"], "--out", given["out"], *options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aullm-dist: error: ")]
    assert len(errors) == 1
    assert message.format(run=run) in errors[0]
    assert not (tmp_path / "answers.csv").exists()
