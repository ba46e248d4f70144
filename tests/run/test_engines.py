"""Every engine trains the same function and writes the same checkpoint.

The ZeRO-3 that divides everything is started as a user would, the others are forked (`training_runs.fork`); DDP is
started so in `test_two_processes.py`.
"""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from training_runs import (
    Trained,
    checkpoint_tensors,
    fork,
    interrupted,
    launch,
    logits,
    newest_checkpoint,
    overrides,
    partition_everything,
    train_here,
)
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.launch

STEPS = 10
# Micro-batch of each engine's two processes: some accumulate, some do not, and the step is the same.
MICRO_BATCH = {"ddp": 4, "zero1": 4, "zero2": 2, "zero3": 4, "zero3_all": 2}
ENGINES = tuple(MICRO_BATCH)
LAUNCHED = ("zero3_all", "fp32", 2)
PRECISIONS = {
    "fp32": {},
    "bf16": {"training__precision": "bf16"},
    "nf4": {"model__quantization": "nf4", "training__precision": "bf16"},
    "nf4_fp32": {"model__quantization": "nf4"},
}
# Relative, of loss and gradient norm. In bfloat16 another order of sums is another rounding, and ZeRO-3 adds the bias
# of a float32 layer after rounding the product instead of before; ten steps of Adam make a few percent of that.
FLOAT32, BFLOAT16 = (1e-5, 1e-5), (0.02, 0.15)


@pytest.fixture(scope="module")
def train(small_dataset, tiny_llm, tmp_path_factory):
    """Return a function that trains ten steps on an engine, once for each combination asked for."""
    own = partition_everything(tmp_path_factory.mktemp("strategies"))
    done: dict[tuple, Trained] = {}

    def run(engine: str, precision: str = "fp32", processes: int = 2, **changes: object) -> Trained:
        key = (engine, precision, processes, *sorted(changes.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp(engine) / "run"
            common = {
                "training__strategy": own if engine == "zero3_all" else engine,
                "training__global_batch": 8,
                "training__micro_batch": MICRO_BATCH[engine] if processes == 2 else 8,
                "training__processes": processes,
                "training__epochs": 99,
                "training__max_steps": STEPS,
                "training__evaluate_every_epochs": 99,
                "training__save_every_steps": 5,
                "training__keep_checkpoints": 9,
                "model__dropout": 0.0,
            }
            settings = overrides(small_dataset, tiny_llm, folder, **common | PRECISIONS[precision] | changes)
            start = launch if key == LAUNCHED else fork
            result = start(*settings, processes=processes)
            assert result.returncode == 0, result.stderr
            done[key] = Trained(folder, settings, result.stderr)
        return done[key]

    return run


def agree(first: Trained, second: Trained, tolerances: tuple[float, float]) -> None:
    for expected, found, tolerance in zip(first.curve, second.curve, tolerances, strict=True):
        assert len(found) == STEPS
        assert found == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_train_what_one_trains(train, engine):
    agree(train("ddp", processes=1), train(engine), FLOAT32)


@pytest.mark.parametrize("engine", ["zero2", "zero3_all"])
def test_nf4_in_float32_is_the_same_in_every_engine(train, engine):
    agree(train("ddp", "nf4_fp32"), train(engine, "nf4_fp32"), FLOAT32)


@pytest.mark.parametrize("engine", ["zero2", "zero3_all"])  # zero1 divides less of what zero2 divides
@pytest.mark.parametrize("precision", ["bf16", "nf4"])
def test_bfloat16_agrees_to_its_rounding(train, engine, precision):
    agree(train("ddp", precision), train(engine, precision), BFLOAT16)


@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3_all"])
def test_packed_and_padded_agree(train, engine):
    agree(train(engine), train(engine, model__packing=False), FLOAT32)


@pytest.mark.parametrize(
    ("engine", "precision", "kind"),
    [("ddp", "fp32", "reentrant"), ("zero3_all", "nf4_fp32", "reentrant")],
)
def test_recomputed_activations_change_nothing(train, engine, precision, kind):
    """The other kind on a divided NF4 base is in the test of four processes."""
    agree(train(engine, precision), train(engine, precision, model__activation_checkpointing=kind), FLOAT32)


def test_four_processes_train_what_one_trains(train):
    """NF4, divided in four, packed, with recomputed activations, against the undivided model in one process."""
    changes = {"model__activation_checkpointing": "non_reentrant", "training__micro_batch": 2}
    agree(train("ddp", "nf4_fp32", processes=1), train("zero3_all", "nf4_fp32", processes=4, **changes), FLOAT32)


def test_parameters_used_outside_their_modules_are_gathered(train):
    """The readout `per_au` adds its markers and its bias by hand."""
    agree(train("ddp", model__readout="per_au"), train("zero3_all", model__readout="per_au"), FLOAT32)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_log_says_what_runs_and_why(train, engine):
    log = train(engine).stderr
    described = "DDP" if engine == "ddp" else f"DeepSpeed ZeRO-{engine[4]}"
    assert f"Engine: {described}" in log
    assert "training.strategy: " in log
    for line in ("Device: ", "Precision: float32 throughout", "Attention: prefix (auto", "rank 0 of 2"):
        assert line in log
    for noise in ("Warning", "WARNING", "Traceback"):
        assert noise not in log


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_every_engine_writes_the_same_checkpoint(train, engine):
    expected, found = (newest_checkpoint(train(name).folder) for name in ("ddp", engine))
    assert {path.name for path in expected.iterdir()} == {path.name for path in found.iterdir()}
    tensors, others = checkpoint_tensors(expected), checkpoint_tensors(found)
    described = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    assert described == {name: (tensor.shape, tensor.dtype) for name, tensor in others.items()}
    for name, tensor in tensors.items():
        # A gradient near 0 may have another sign, and Adam makes whole steps of it.
        assert (tensor - others[name]).abs().max() <= 0.02 * max(1.0, tensor.abs().max().item()), name


@pytest.mark.parametrize(("engine", "precision"), [("zero1", "fp32"), ("zero2", "fp32"), ("zero3_all", "nf4")])
def test_resume_is_bit_identical(train, tmp_path, engine, precision):
    """From step 5 of 10: inside an epoch, and for two of the three with two micro-batches per step."""
    whole = train(engine, precision)
    resumed = interrupted(whole.folder, tmp_path / "run")
    assert newest_checkpoint(resumed).name == "step-00000005"
    result = fork(*whole.settings, f"training.output={resumed}", "--resume", "auto", processes=2)
    assert result.returncode == 0, result.stderr
    expected, found = (checkpoint_tensors(newest_checkpoint(folder)) for folder in (whole.folder, resumed))
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert logits(whole.folder) == logits(resumed)


def test_a_resume_may_change_the_number_of_processes(train, tmp_path):
    """Two processes, then one, then two again, on a divided NF4 base: the loss curve of those that never stopped."""
    whole = train("zero3_all", "nf4_fp32")
    resumed = interrupted(whole.folder, tmp_path / "run")
    settings = [*whole.settings, f"training.output={resumed}", "training.save_every_steps=3", "--resume", "auto"]
    for processes, micro_batch, last in ((1, 8, "step-00000009"), (2, 2, "step-00000010")):
        changes = [f"training.processes={processes}", f"training.micro_batch={micro_batch}"]
        result = fork(*settings, *changes, processes=processes)
        assert result.returncode == 0, result.stderr
        assert json.loads((newest_checkpoint(resumed) / "MANIFEST.json").read_text())["world_size"] == processes
        if processes == 1:
            shutil.rmtree(newest_checkpoint(resumed))
            shutil.rmtree(resumed / "fold-00" / "predictions")
            assert newest_checkpoint(resumed).name == last
    agree(whole, Trained(resumed, settings, ""), FLOAT32)
    expected, found = logits(whole.folder), logits(resumed)
    for sample_id, row in found.items():
        assert row == pytest.approx(expected[sample_id], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("engine", "precision"), [("zero3_all", "nf4"), ("ddp", "nf4")])
def test_training_goes_on_unchanged_after_an_evaluation(train, engine, precision):
    seldom = train(engine, precision)
    often = train(engine, precision, training__evaluate_every_epochs=1)
    assert len(list((often.folder / "fold-00" / "predictions").iterdir())) > 3
    assert often.curve == seldom.curve


@pytest.mark.parametrize("engine", ENGINES)
def test_every_held_out_clip_is_answered_once_and_alike(train, engine):
    expected, found = logits(train("ddp", processes=1).folder), logits(train(engine).folder)
    assert len(found) == 12
    assert found.keys() == expected.keys()
    for sample_id, row in found.items():
        assert row == pytest.approx(expected[sample_id], rel=1e-2, abs=1e-2)


@pytest.mark.parametrize(
    ("engine", "precision"), [*((name, "fp32") for name in ENGINES[1:]), ("zero3_all", "nf4_fp32")]
)
def test_one_process_answers_from_the_checkpoint_as_the_engine_did(train, tmp_path, engine, precision):
    run = train(engine, precision)
    alone = tmp_path / "run"
    shutil.copytree(run.folder, alone)
    shutil.rmtree(alone / "fold-00" / "predictions")
    changes = ["training.strategy=ddp", "training.processes=1", "training.micro_batch=8", f"training.output={alone}"]
    assert train_here(*run.settings, *changes, "--resume", "auto") == 0
    expected, found = logits(run.folder), logits(alone)
    assert found.keys() == expected.keys()
    for sample_id, row in found.items():
        assert row == pytest.approx(expected[sample_id], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_adapter_loads_with_stock_peft(train, tiny_llm, engine):
    folders = [newest_checkpoint(train(name).folder) for name in (engine, "ddp")]
    ids = torch.arange(24)[None]
    plain = AutoModelForCausalLM.from_pretrained(tiny_llm)
    with torch.no_grad():
        without = plain(ids).logits
        # PEFT changes the model that it is given, so each adapter gets one of its own.
        answers, reference = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llm), folder).eval()(ids).logits
            for folder in folders
        )
    effect = (reference - without).norm()
    assert effect > 0.01 * without.norm(), "the adapter changes next to nothing"
    assert (answers - reference).norm() < 0.02 * effect


def test_folds_start_from_the_same_state(train):
    """The engine is made once; each fold finds trainables and optimizer as if nothing had been trained before."""
    changes = {"training__max_steps": 3, "training__save_every_steps": 3}
    together = train("zero3_all", data__fold=None, training__baseline=True, **changes)
    alone = train("zero3_all", data__fold=1, **changes)
    expected, found = (checkpoint_tensors(newest_checkpoint(run.folder, fold=1)) for run in (alone, together))
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    assert json.loads((together.folder / "baselines" / "led_cnn" / "metrics.json").read_text())["num_clips"] == 24


def test_a_resume_may_change_the_engine(train, tmp_path):
    before = train("zero2")
    resumed = interrupted(before.folder, tmp_path / "run")
    changes = [f"training.output={resumed}", "training.strategy=zero3"]
    result = fork(*before.settings, *changes, "--resume", "auto", processes=2)
    assert result.returncode == 0, result.stderr
    assert json.loads((resumed / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3
    expected, found = logits(before.folder), logits(resumed)
    for sample_id, row in found.items():
        assert row == pytest.approx(expected[sample_id], rel=1e-2, abs=1e-2)
