"""`make gpu`: steps that fail, hang or cannot run are reported, and the next one runs."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def on_gpu():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("on_gpu", BENCHMARKS / "on_gpu.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def steps(on_gpu):
    return sys.modules["on_gpu_steps"]


PLAIN = {
    "gpus": [],
    "gib": 0.0,
    "packages": [],
    "driver": None,
    "cpu": "a CPU",
    "cores": 2,
    "python": "3",
    "commit": "0",
}


def play(on_gpu, monkeypatch, tmp_path, made, *arguments, found=PLAIN):
    monkeypatch.setattr(on_gpu, "steps_for", lambda machine: made)
    monkeypatch.setattr(on_gpu, "describe", lambda python, environment: found | {"versions": {}})
    monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--out", str(tmp_path / "out"), *arguments])
    code = on_gpu.main()
    return code, json.loads((tmp_path / "out" / "on_gpu.json").read_text())["steps"]


def test_a_failure_and_a_hang_keep_nothing_from_running(on_gpu, steps, monkeypatch, tmp_path, capsys):
    made = [
        steps.Step("check", ("-c", "print('what went wrong'); raise SystemExit(3)"), 1),
        steps.Step("hang", ("-c", "import time; time.sleep(60)"), 0.02),
        steps.Step("timed", ("-c", "print(1)"), 1, after=("check",)),
        steps.Step("large", ("-c", "print(1)"), 1, gpus=1, gib=70),
        steps.Step("lacking", ("-c", "print(1)"), 1, packages=("nosuch",)),
        steps.Step("last", ("-c", "print(1)"), 1),
    ]
    start = time.monotonic()
    code, rows = play(on_gpu, monkeypatch, tmp_path, made)
    assert time.monotonic() - start < 30, "what hangs is ended"
    assert code == 1
    assert [row["verdict"] for row in rows] == ["failed", "failed", "not run", "not run", "not run", "ok"]
    assert "exit code 3" in rows[0]["reason"]
    assert rows[0]["output"] == ["what went wrong"]
    assert rows[1]["reason"] == "out of time"
    assert "check did not pass" in rows[2]["reason"]
    assert "needs 1 GPU" in rows[3]["reason"]
    assert "nosuch" in rows[4]["reason"]
    page = (tmp_path / "out" / "on_gpu.md").read_text()
    assert "rehearsal with small sizes" in page
    assert "what went wrong" in page
    assert len(capsys.readouterr().out.splitlines()) == len(made) + 1


def test_targets_are_results_and_no_failures(on_gpu, steps, monkeypatch, tmp_path):
    def reached(out):
        return [steps.Target("faster", 3.0, 4.0), steps.Target("GB", 70.0, 75.0, at_least=False)]

    made = [steps.Step("one", ("-c", "raise SystemExit(1)"), 1, bars=True, targets=reached)]
    code, rows = play(on_gpu, monkeypatch, tmp_path, made, found=PLAIN | {"gpus": ["H200"], "gib": 140.0})
    assert code == 0
    assert [target["met"] for target in rows[0]["targets"]] == [False, True]
    page = (tmp_path / "out" / "on_gpu.md").read_text()
    assert "rehearsal" not in page
    assert "| one: faster | 3 | at least 4 | **missed** |" in page


def test_an_old_result_is_not_shown_for_a_step_that_fails(on_gpu, steps, monkeypatch, tmp_path):
    old = tmp_path / "out" / "plan" / "result.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"missed": []}')
    made = [steps.Step("plan", ("-c", "raise SystemExit(1)"), 1, bars=True, targets=steps._missed("missed"))]
    code, rows = play(on_gpu, monkeypatch, tmp_path, made)
    assert (code, rows[0]["verdict"]) == (1, "failed")


def test_no_step_begins_when_the_minutes_are_spent(on_gpu, steps, monkeypatch, tmp_path):
    made = [steps.Step("long", ("-c", "print(1)"), 10)]
    code, rows = play(on_gpu, monkeypatch, tmp_path, made, "--minutes", "1")
    assert (code, rows[0]["verdict"]) == (0, "not run")


@pytest.mark.parametrize(("gpus", "gib"), [(0, 0.0), (1, 140.0), (2, 80.0)])
def test_every_step_names_a_script_of_ours_and_its_own_files(steps, gpus, gib):
    made = steps.steps_for(steps.Machine(gpus, gib, frozenset(), small=gpus == 0))
    assert len({step.name for step in made}) == len(made)
    for step in made:
        assert (BENCHMARKS.parent / step.command[0]).exists(), step.command
        earlier = [other.name for other in made[: made.index(step)]]
        assert set(step.after) <= set(earlier), f"{step.name} comes before what it waits for"
    names = [step.name for step in made]
    assert names.index("kernels") < names.index("kernel-times")
    assert ("step-70b-nf4" in names) == bool(gpus)


def test_targets_are_read_from_what_the_benchmarks_write(steps, tmp_path):
    (tmp_path / "result.json").write_text(json.dumps({
        "targets": [{"name": "peak", "found": 76.0, "bar": 75.0, "at_least": False, "met": False}], "missed": ["a"],
        "results": [{"op": "evidence_pool", "size": "L", "rows": [
            {"provider": "eager", "mode": "full", "ours_faster": 5.0}, {"provider": "SDPA", "error": "none"}]}],
    }))  # fmt: skip
    assert [target.met for target in steps._step_targets(tmp_path)] == [False]
    assert steps._missed("m")(tmp_path)[0].found == 1
    found = {target.name.rpartition(" than ")[2]: target.met for target in steps._kernel_targets(tmp_path)}
    assert found == {"eager": True, "compile": False, "SDPA": False}


def test_unknown_steps_and_folders_without_wheels_are_refused(on_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(on_gpu, "describe", lambda python, environment: PLAIN)
    for arguments, words in ((["--steps", "nosuch"], "allowed: kernels"), (["--wheels", str(tmp_path)], "gpu-wheels")):
        monkeypatch.setattr(sys, "argv", ["on_gpu.py", "--out", str(tmp_path / "out"), *arguments])
        with pytest.raises(SystemExit) as stopped:
            on_gpu.main()
        assert words in str(stopped.value) + capsys.readouterr().err
