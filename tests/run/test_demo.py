"""The embedded demo learns: far above its floors on held-out subjects, for any seed, and only from the clips."""

import json
from pathlib import Path

import pytest
from training_runs import fork, launch

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1500)]

UNSEEN_SEEDS = (101, 102, 103)
ONE_THREAD = "training.cpu_threads=1"  # other tests run beside these
# Half the demo's epochs: enough to be far above the floors, or to overfit what must not be learnt.
LAST_SCORES_ALONE = (
    ONE_THREAD, "training.epochs=6", "training.baseline=false", "training.evaluate_every_epochs=99", "monitor.clips=0",
    "monitor.projector_clips=0",
)  # fmt: skip


def _metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def _points_above_floor(run: Path) -> float:
    metrics = _metrics(run)
    return 100 * (metrics["mean"]["f1_macro"] - metrics["floors"]["f1_macro"])


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What `make demo` runs, in a folder of its own."""
    run = tmp_path_factory.mktemp("demo") / "run"
    result = launch(ONE_THREAD, f"training.output={run}")
    assert result.returncode == 0, result.stderr
    return run, result


def test_the_demo_is_twenty_points_above_its_floor(demo):
    run, _ = demo
    assert _points_above_floor(run) >= 20


def test_the_demo_says_what_a_new_user_needs(demo):
    run, result = demo
    for part in (
        "Held-out subjects, threshold fixed at 0.5",
        "AU12 Lip Corner Puller",
        "Ladder: the answer stage by stage",
        "no-LLM baseline (evidence)",
        "no-LLM baseline (sssnet_of)",
        "content token (CT) zeroed",
        "instruction token (IT) zeroed",
        f"tensorboard --logdir {run}/tensorboard",
        "says nothing about real faces",
        "aullm-dist prepare",
    ):
        assert part in result.stdout, part
    assert f"Synthetic corpus: writing {run}/corpus" in result.stderr
    assert "Fold 0: 100%" in result.stderr


def test_both_tokens_carry_the_answers(demo):
    """Without either token the answers are others, and without the content token worse ones."""
    run, _ = demo
    sensitivity = json.loads((run / "fold-00" / "sensitivity.json").read_text())
    assert sensitivity["f1_macro"] - sensitivity["content"]["f1_macro"] > 0.01
    assert sensitivity["content"]["mean_abs_change"] > 0.02
    assert sensitivity["instruction"]["mean_abs_change"] > 0.02


@pytest.mark.parametrize("seed", UNSEEN_SEEDS)
def test_unseen_generator_seeds_are_learnt_as_well(tmp_path, seed):
    run = tmp_path / "run"
    result = fork(f"training.output={run}", f"data.synthetic_seed={seed}", *LAST_SCORES_ALONE)
    assert result.returncode == 0, result.stderr
    assert _points_above_floor(run) >= 20


def test_shuffled_labels_fall_to_the_floor(tmp_path):
    """With clips and labels torn apart nothing is left to learn; anything above the floors would be a leak."""
    run = tmp_path / "run"
    result = fork(f"training.output={run}", "data.shuffle_labels=true", *LAST_SCORES_ALONE)
    assert result.returncode == 0, result.stderr
    assert _points_above_floor(run) <= 5
    assert _metrics(run)["mean"]["auc"] < 0.6
