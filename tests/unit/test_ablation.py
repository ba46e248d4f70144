"""The arms of the ablation as run files, and their table: what is paired with what, and what is left out."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from aullm_dist.cli import main
from aullm_dist.config import find_config, load, shipped_names, to_dict
from aullm_dist.data.protocols import FoldPlan, SampleInfo, make_folds, write_folds
from aullm_dist.errors import UserError
from aullm_dist.evaluation.compare import compare_runs
from aullm_dist.report.ablation import ablation, problem_of
from aullm_dist.report.ablation_table import ablation_blocks
from aullm_dist.report.arms import FULL, NAMES, arm_of, name_of, other_differences
from aullm_dist.runs.paths import FoldPaths
from aullm_dist.runs.predictions import StoredPrediction, read_predictions, write_predictions

AUS = (1, 4, 12)
SHIPPED = [name.removeprefix("ablation/") for name in shipped_names("ablation")]


def shipped(arm, *overrides):
    return load(find_config(f"ablation/{arm}"), list(overrides))


def make_run(folder, arm="full", *, seed=0, target="samm", strength=2.0, overrides=(), step=None):
    """Write a finished cross-domain run of an arm whose logits follow the labels with `strength`."""
    settings = ["data.protocol=cross", "data.train=[a]", "data.test=[b]", f"training.seed={seed}"]
    config = shipped(arm, *settings, "training.epochs=1", "training.global_batch=8", *overrides)
    labels = np.random.default_rng(7)
    samples = [
        SampleInfo(f"{corpus}/s{subject}/c{clip}", f"{corpus}/s{subject}", corpus, ())
        for corpus in ("casme2", target)
        for subject in range(5)
        for clip in range(4)
    ]
    truth = {sample.sample_id: labels.random(len(AUS)) < 0.4 for sample in samples}
    folds = make_folds(samples, "cross", train_corpora=["casme2"], test_corpora=[target])
    write_folds(folder / "folds.json", FoldPlan("cross", ("casme2", target), AUS, seed, folds))
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config)))
    noise = np.random.default_rng(seed)
    rows = [
        StoredPrediction(
            name, name.rpartition("/")[0], target, 0, "test", tuple(truth[name].astype(int).tolist()),
            tuple((strength * (truth[name] - 0.5) + noise.normal(size=len(AUS))).tolist()),
        )
        for name in folds[0].test
    ]  # fmt: skip
    last = -(-len(folds[0].train) // 8)
    write_predictions(FoldPaths(folder, 0).predictions(1), rows, aus=AUS, epoch=1, step=last if step is None else step)
    return folder


def test_each_shipped_arm_is_an_arm_of_its_own_and_has_a_name():
    arms = {name: arm_of(shipped(name)) for name in SHIPPED}
    assert len(SHIPPED) == 16
    assert set(arms.values()) == set(NAMES)
    assert arms["full"] == FULL == arm_of(load())
    assert arms["ccr"] == arm_of(load(None, ["counterfactual.enabled=true"]))
    assert {name for name, arm in arms.items() if not arm.llm} == {"evidence", "led_cnn", "led_sssnet", "sssnet_of"}
    assert {name for name, arm in arms.items() if arm.crossed} == {"ccr"}
    alone = {name: arm.interventions for name, arm in arms.items() if name.endswith("_only")}
    assert alone == {f"{kind}_only": (kind,) for kind in ("structure", "appearance", "neutral")}
    assert {name for name, arm in arms.items() if arm.branches} == {"ccr", *alone}


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_arm_differs_from_the_full_model_in_nothing_else(name):
    full, arm = shipped("full"), shipped(name)
    assert other_differences(full, arm) == []
    assert arm.training.output == f"runs/ablation/{name}"
    assert not arm.training.baseline
    assert f"ablation/{name}" in find_config(f"ablation/{name}").read_text()
    assert other_differences(full, shipped(name, "training.epochs=7")) == ["training.epochs"]
    assert other_differences(full, shipped(name, "training.micro_batch=4", "model.packing=false")) == []


@pytest.mark.parametrize(
    ("base", "name", "setting", "seen"),
    [
        ("ccr", "appearance_only", "counterfactual.appearance_weight=0.1", True),
        ("ccr", "appearance_only", "counterfactual.neutral_weight=0.1", False),
        ("full", "appearance_only", "counterfactual.appearance_weight=0.1", False),
        ("ccr", "no_it", "counterfactual.contradiction_margin=0.3", False),
        ("full", "no_it", "model.llm=other", True),
        ("full", "no_it", "model.lora_rank=4", True),
        ("full", "led_cnn", "model.lora_rank=4", False),
    ],
)
def test_settings_count_where_both_runs_use_them(base, name, setting, seen):
    assert other_differences(shipped(base), shipped(name, setting)) == ([setting.partition("=")[0]] if seen else [])


def test_an_arm_that_is_not_shipped_is_described():
    arm = arm_of(
        load(None, ["counterfactual.enabled=true", "counterfactual.contradiction_weight=0", "model.evidence=mid_only"])
    )
    assert arm not in NAMES
    assert name_of(arm) == "evidence mid_only, CCR 2 of structure+appearance+neutral"


def test_one_pair_is_what_compare_says_of_it(tmp_path):
    full = make_run(tmp_path / "x", strength=3.0)
    arm = make_run(tmp_path / "y", "no_it", strength=1.0)
    found = ablation([arm, full], bootstrap=200)["families"]["cross-domain"]["arms"]
    expected = compare_runs(full, arm, bootstrap=200)["mean"]
    assert list(found) == ["full model", "no instruction token"]
    for score in ("f1_macro", "auc"):
        assert found["full model"][score]["score"] == pytest.approx(expected[score]["first"])
        assert found["no instruction token"][score]["score"] == pytest.approx(expected[score]["second"])
        assert found["no instruction token"][score]["difference"] == pytest.approx(expected[score]["difference"])
        assert found["no instruction token"][score]["ci"] == pytest.approx(expected[score]["ci"])
    assert found["no instruction token"]["auc"]["difference"] < -0.05


def test_differences_are_averaged_over_seeds_and_pairs(tmp_path):
    runs, alone = [], {}
    for target in ("samm", "4dme"):
        for seed in (0, 1):
            place = tmp_path / f"{target}-{seed}"
            full = make_run(place / "full", seed=seed, target=target)
            arm = make_run(place / "arm", "led_cnn", seed=seed, target=target, strength=0.5 + seed)
            alone[target, seed] = compare_runs(full, arm, bootstrap=0)["mean"]["f1_macro"]["difference"]
            runs += [full, arm]
    result = ablation(runs, bootstrap=100)
    assert result["notes"] == []
    family = result["families"]["cross-domain"]
    assert family["sides"] == ["casme2->4dme", "casme2->samm"]
    own = family["arms"]["no LLM (led_cnn)"]["f1_macro"]
    assert own["difference"] == pytest.approx(np.mean(list(alone.values())))
    assert own["by_seed"]["1"] == pytest.approx((alone["samm", 1] + alone["4dme", 1]) / 2)
    assert own["by_side"]["casme2->4dme"] == pytest.approx((alone["4dme", 0] + alone["4dme", 1]) / 2)
    assert own["ci"][0] < own["difference"] < own["ci"][1]
    assert json.loads(json.dumps(result)) == result
    first, second = ablation_blocks(result)
    assert first.rows[1][0] == "no LLM (led_cnn)"
    assert first.rows[1][3] == f"{100 * own['difference']:+.1f}"
    assert second.header == ("arm", "seed 0", "seed 1", "casme2->4dme", "casme2->samm")


def test_the_ladder_of_arms_with_stages_stands_below_their_tables(tmp_path):
    full, arm, alone = (make_run(tmp_path / name, name, strength=3.0) for name in ("full", "no_it", "led_cnn"))
    for run, stages in ((full, ("evidence", "structure")), (arm, ("evidence",))):
        final = read_predictions(FoldPaths(run, 0).predictions(1))
        for number, stage in enumerate(stages):
            rows = [replace(row, logits=tuple(0.1 * (number + 1) * x - 0.2 for x in row.logits)) for row in final.rows]
            write_predictions(FoldPaths(run, 0).stage(stage), rows, aus=AUS, epoch=1, step=final.step)
    result = ablation([full, arm, alone], bootstrap=0)["families"]["cross-domain"]
    found = result["ladder"]
    assert {name: list(stages) for name, stages in found.items()} == {
        "full model": ["evidence", "structure", "deduction"],
        "no instruction token": ["evidence", "deduction"],
    }
    assert found["full model"]["deduction"]["f1_macro"] == result["arms"]["full model"]["f1_macro"]["score"]
    assert found["full model"]["evidence"]["auc"] == pytest.approx(found["full model"]["deduction"]["auc"])
    assert found["full model"]["evidence"]["f1_macro"] < found["full model"]["deduction"]["f1_macro"]
    table = ablation_blocks(ablation([full, arm, alone], bootstrap=0))[-1]
    assert table.header == ("arm", *2 * ("evidence", "+ structure", "+ deduction"))
    assert [row[2] == "-" for row in table.rows] == [False, True]


def test_corpora_do_not_share_their_resamples(tmp_path):
    """Two test corpora of equally many subjects are independent: their mean varies less than either alone."""
    one = [make_run(tmp_path / "1", seed=0), make_run(tmp_path / "2", "no_it", seed=0, strength=0.0)]
    other = [make_run(tmp_path / f"4dme-{run.name}", seed=0, target="4dme") for run in one[:1]]
    other.append(make_run(tmp_path / "4dme-2", "no_it", seed=0, target="4dme", strength=0.0))

    def width(runs):
        ci = ablation(runs, bootstrap=1000)["families"]["cross-domain"]["arms"]["no instruction token"]["auc"]["ci"]
        return ci[1] - ci[0]

    assert width([*one, *other]) < 0.9 * min(width(one), width(other))


def test_what_cannot_be_paired_is_named_and_left_out(tmp_path):
    full, arm = make_run(tmp_path / "full"), make_run(tmp_path / "arm", "no_it")
    bad = {
        "no config.yaml": tmp_path / "empty",
        "no full model on casme2->samm with seed 5": make_run(tmp_path / "seed5", "no_it", seed=5),
        "in data.cut_fraction as well": make_run(tmp_path / "other", "deduction", overrides=["data.cut_fraction=0.1"]),
        "same arm, test side and seed": make_run(tmp_path / "twice", "no_it"),
        "unfinished": make_run(tmp_path / "begun", "led_cnn", step=1),
    }
    bad["no config.yaml"].mkdir()
    result = ablation([full, arm, *bad.values()], bootstrap=0)
    for text, path in bad.items():
        (note,) = [note for note in result["notes"] if str(path) in note]
        assert text in note
    assert list(result["families"]["cross-domain"]["arms"]) == ["full model", "no instruction token"]
    assert "unfinished" in problem_of(bad["unfinished"])
    assert problem_of(full) is None
    notes = ablation_blocks(result)[0].notes
    assert sum(note.startswith("Note: left out") for note in notes) == 5


def test_nothing_to_compare_is_one_line(tmp_path, capsys):
    arm, full = make_run(tmp_path / "arm", "no_it"), make_run(tmp_path / "full")
    with pytest.raises(UserError, match="finished run of the full model"):
        ablation([arm])
    with pytest.raises(UserError, match="no run could be paired"):
        ablation([full])
    assert main(["report", "ablation"]) == 2
    assert main(["report", "ablation", str(arm), "--out", str(tmp_path / "o")]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    assert main(["report", "ablation", str(full), str(arm), "--bootstrap", "20", "--format", "markdown"]) == 0
    assert "| no instruction token | 1 |" in capsys.readouterr().out
