"""What a sweep is made of, what does not go together, and what its parts do to each other: nothing is trained here."""

import argparse
import logging
import resource
from pathlib import Path

import pytest
import torch
import yaml

from aullm_dist import cli, log
from aullm_dist.commands import launch, train
from aullm_dist.commands.sweep import add_sweep_arguments, sweep_of
from aullm_dist.config import load, shipped_names
from aullm_dist.config.schema import settings
from aullm_dist.errors import UserError
from aullm_dist.llm.backbone import BackboneOptions, load_backbone
from aullm_dist.llm.lora import lora_values
from aullm_dist.runs import job, lock
from aullm_dist.runs.sweep import ALIKE, check_engine
from aullm_dist.runtime.slurm import Job

DOCS = Path(__file__).resolve().parents[2] / "docs" / "sweeps.md"
LLM = ["model.llm=/some/llm", "training.precision=fp32"]


def asked(*words):
    parser = argparse.ArgumentParser()
    parser.add_argument("words", nargs="*")
    add_sweep_arguments(parser)
    args = parser.parse_intermixed_args(words)
    return sweep_of(args, args.words)


def test_arms_and_seeds_are_runs_of_their_own():
    sweep = asked("ablation/full", "ablation/no_it", *LLM, "--out", "runs/x", "--seeds", "0", "2", "training.epochs=3")
    assert list(sweep.configs) == ["full-0", "full-2", "no_it-0", "no_it-2"]
    alone = load("configs/experiments/ablation/no_it.yaml", [*LLM, "training.epochs=3", "training.seed=2"])
    values = {"training.output": "runs/x/no_it-2", "training.folds_at_once": "auto"}
    assert sweep.configs["no_it-2"] == alone.changed(values)
    assert (str(sweep.folder), sweep.is_one) == ("runs/x", False)


def test_without_seeds_the_run_files_keep_theirs():
    sweep = asked("ablation/full", *LLM, "training.seed=7", "--out", "x", "--at-once", "4")
    ((name, config),) = sweep.configs.items()
    assert (name, config.training.seed, config.training.folds_at_once, sweep.is_one) == ("full", 7, 4, False)


def test_more_runs_are_lines_of_a_file(tmp_path):
    listed = tmp_path / "runs.txt"
    listed.write_text(
        "# learning rates\nablation/full training.lr_lora=1e-3 'training.output=x/high rate'\n\n"
        "ablation/full training.lr_lora=1e-5 training.output=elsewhere/low\n"
    )
    sweep = asked("ablation/ccr", *LLM, "--out", "x", "--seeds", "1", "--runs", str(listed))
    rates = {name: config.training.lr_lora for name, config in sweep.configs.items()}
    assert rates == {"ccr-1": 1e-4, "high rate-1": 1e-3, "elsewhere/low-1": 1e-5}
    assert sweep.configs["elsewhere/low-1"].training.output == "elsewhere/low-1"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ablation/evidence", "--out", "x"], "ablation/evidence: has no LLM that it could share (model.llm: none)"),
        (["ablation/full"], "--out is missing"),
        (["--out", "x"], "no run is given"),
        (["ablation/full", "ablation/full", "--out", "x"], "two runs would be trained in x/full"),
        (["ablation/full", "--out", "x", "--seeds", "1", "1"], "--seeds gives 1 twice"),
        (["ablation/full", "--out", "x", "--seeds", "training.epochs=1"], "--seeds training.epochs=1: is no seed"),
        (["ablation/full", "--out", "x", "--seeds", "99999999999"], "training.seed is 99999999999; allowed"),
        (["ablation/full", "--out", "x", "--seeds", "1", "training.seed=2"], "--seeds gives it; keep one"),
        (["ablation/full", "--out", "x", "training.output=y"], "a folder of its own below --out"),
        (["ablation/full", "--out", "x", "training.folds_at_once=2"], "give --at-once"),
        (["ablation/full", "--out", "x", "--at-once", "0"], "training.folds_at_once is 0; allowed: 1 or more"),
        (["ablation/full", "--out", "x", "--at-once", "all"], "--at-once is 'all'; allowed: a number from 1, or auto"),
        (["ablation/full", "--out", "x", "model.compile=blocks"], "allowed in a sweep: none"),
        (["ablation/full", "--out", "x", "--runs", "nowhere"], "--runs nowhere: cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_sweep_is_one_line(words, message):
    with pytest.raises(UserError) as error:
        asked(*words, *LLM)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ablation/full", "line 1: gives training.output 0 times"),
        ("ablation/full 'training.output=x", "line 1: no closing quotation"),
        ("ablation/led_cnn training.output=x", "ablation/led_cnn: has no LLM"),
    ],
)
def test_a_line_that_is_no_run_is_named(tmp_path, line, message):
    (tmp_path / "runs.txt").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        asked("ablation/full", *LLM, "--out", "x", "--runs", str(tmp_path / "runs.txt"))


# Another value of each setting that all runs share, and what it takes beside.
OTHERS = {
    "model.llm": "/another/llm", "model.llm_architecture": "qwen2", "model.llm_hidden": 64, "model.llm_layers": 2,
    "model.trust_remote_code": True, "model.quantization": "nf4", "model.attention": "sdpa", "model.packing": False,
    "model.suffixes_per_row": 4, "model.suffix_multiple": 4, "model.activation_checkpointing": "reentrant",
    "model.lora_rank": 4, "model.lora_alpha": 8.0, "model.lora_dropout": 0.2, "model.lora_targets": ["q_proj"],
    "model.kernels": "torch", "training.strategy": "zero3", "training.processes": 2, "training.cpu_threads": 1,
    "training.precision": "bf16", "training.global_batch": 64, "training.micro_batch": 16,
    "training.deterministic": False, "training.grace_seconds": 9.0, "training.max_failures": 1,
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(set(ALIKE) - {"training.folds_at_once", "model.compile"}))
def test_what_all_share_is_refused_where_it_differs(tmp_path, key):
    group, _, short = key.partition(".")
    base = {"model": {"llm": "/some/llm"}, "training": {"global_batch": 32, "micro_batch": 8}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(base))
    base[group][short] = OTHERS[key]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(base))
    with pytest.raises(UserError, match=rf"other: {key} is .* in one; the runs of a sweep share LLM and processes"):
        asked(str(tmp_path / "one.yaml"), str(tmp_path / "other.yaml"), "--out", "x")


def test_every_arm_with_an_llm_goes_together():
    arms = [name for name in shipped_names("ablation") if load(f"configs/experiments/{name}.yaml").model.llm != "none"]
    assert len(arms) > 9
    assert len(asked(*arms, *LLM, "--out", "x").configs) == len(arms)


def test_what_all_share_are_settings_and_documented():
    assert not set(ALIKE) - {setting.name for setting in settings()}
    text = DOCS.read_text(encoding="utf-8")
    assert [key for key in ALIKE if f"`{key}`" not in text] == []


@pytest.mark.parametrize(
    ("strategy", "processes", "at_once", "refused"),
    [("ddp", 1, "1", False), ("ddp", 2, "1", False), ("zero3", 2, "auto", False), ("zero3", 2, "2", False),
     ("zero3", 2, "1", True), ("zero3", 1, "auto", True), ("zero2", 2, "auto", True), ("zero1", 1, "1", True)],
)  # fmt: skip
def test_models_take_turns_on_ddp_and_on_a_divided_llm_alone(strategy, processes, at_once, refused):
    words = [f"training.strategy={strategy}", "--out", "x", "--at-once", at_once]
    sweep = asked("ablation/full", "ablation/ccr", *LLM, *words)
    if refused:
        with pytest.raises(UserError, match=f"training.strategy is {strategy} with {processes} process"):
            check_engine(sweep, processes)
    else:
        check_engine(sweep, processes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x", "training.epochs=1"], "--out is given without --sweep"),
        (["--seeds", "1"], "--seeds is given without --sweep"),
        (["--sweep", "--config", "demo", "ablation/full", "--out", "x"], "--config demo is given with --sweep"),
    ],
)
def test_the_main_job_refuses_half_a_sweep(capsys, arguments, message):
    assert train.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_main_job_gets_the_same_sweep(monkeypatch, tmp_path):
    import accelerate.commands.launch as launcher

    started = []
    monkeypatch.setattr(launcher, "launch_command", started.append)
    words = ["ablation/full", *LLM, "--seeds", "0", "1", "--out", str(tmp_path), "--processes", "2", "--offline"]
    assert cli.main(["sweep", *words, "training.epochs=2"]) == 0
    (given,) = started
    assert (given.training_script, given.num_processes) == (str(launch.TRAIN), 2)
    assert given.training_script_args[0] == "--sweep"
    asked_for = train._asked_for(train.build_parser().parse_intermixed_args(given.training_script_args))
    assert asked_for == asked(*words[:-3], "training.epochs=2")


def test_a_dry_run_says_what_the_runs_are_and_writes_nothing(capsys, tmp_path, monkeypatch, tiny_dataset):
    monkeypatch.chdir(tmp_path)
    words = ["ablation/full", "ablation/no_it", "--seeds", "0", "1", "model.llm=tiny", f"data.train=[{tiny_dataset}]"]
    assert cli.main(["sweep", *words, "--out", "out dir", "--processes", "2", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("4 run(s) in 2 process(es), auto folds at once\n")
    assert (
        "\nno_it-1\nmodel.structure: false\ntraining.output: out dir/no_it-1\ntraining.seed: 1\nData: as full-0\n"
        in said
    )
    assert "--out 'out dir' --at-once auto\nNothing was written." in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("status", "preempted", "code"), [(0, False, 3), (0, True, 0), (2, False, 3)])
def test_a_job_of_a_sweep_is_decided_on_by_its_own_marker(monkeypatch, capsys, tmp_path, status, preempted, code):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    if preempted:
        job.write_marker(tmp_path, Job("7", 0), run="full-1", fold=0, step=3)
    words = ["sweep", "ablation/full", *LLM, "--seeds", "1", "2", "--out", str(tmp_path), "training.epochs=2"]
    assert cli.main(["requeue", f"--status={status}", "--signal=USR1", "--", *words]) == code
    assert capsys.readouterr().out.startswith("Job 7: ")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_lora_of_another_seed_begins_as_if_it_had_been_loaded_with_it(tiny_llm, quantization):
    def loaded(seed):
        options = {"quantization": quantization, "lora_rank": 3, "lora_dropout": 0.1}
        return load_backbone(tiny_llm, BackboneOptions(seed=seed, **options)).model

    expected = {name: p for name, p in loaded(5).named_parameters() if ".lora_" in name}
    state = torch.random.get_rng_state()
    found = lora_values(loaded(0), 5)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


def test_lines_say_first_of_which_run_they_are(capsys):
    logger = log.get_logger("aullm_dist.sweeps")
    log.set_up(logging.INFO)
    with log.speaking("full-0"), log.speaking("Fold 3"):
        logger.info("Fold 3: resumed")
        logger.info("Epoch 1")
    logger.info("done")
    assert capsys.readouterr().err == "full-0: Fold 3: resumed\nfull-0: Fold 3: Epoch 1\ndone\n"


@pytest.mark.parametrize(("limits", "raised"), [((1024, 4096), 1292), ((1024, 1200), 1200), ((9000, 9000), None)])
def test_many_locks_are_many_open_files(monkeypatch, limits, raised):
    raises = []
    monkeypatch.setattr(lock, "_limits", lambda: limits)
    monkeypatch.setattr(lock.resource, "setrlimit", lambda kind, values: raises.append(values[0]))
    lock.allow_locks(780)
    assert raises == ([] if raised is None else [raised])


def test_more_locks_than_files_can_be_open_are_refused(monkeypatch):
    monkeypatch.setattr(lock, "_limits", lambda: (256, 512))
    with pytest.raises(UserError, match=r"780 folds are to be trained and locked, but a process may open 512 files"):
        lock.allow_locks(780)
    monkeypatch.setattr(lock, "_limits", lambda: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(lock.resource, "setrlimit", lambda *_: None)
    lock.allow_locks(780)
