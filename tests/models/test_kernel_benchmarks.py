"""The benchmarks of the kernels: every provider computes the same, no speed-up without green tests, tables, work."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"
NAMES = ("driver", "evidence_pool", "graph_attention", "compare", "gpu_check")
CEILINGS = SimpleNamespace(copy=1e10, matmul=1e12, issue=None)


@pytest.fixture(scope="module")
def bench():
    """The modules of the folder by name; they belong to no package."""
    sys.path.insert(0, str(FOLDER))
    try:
        modules = {name: importlib.import_module(name) for name in NAMES}
        spec = importlib.util.spec_from_file_location("kernel_benchmark", FOLDER / "__main__.py")
        modules["main"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules["main"])
        yield SimpleNamespace(**modules)
    finally:
        sys.path.remove(str(FOLDER))
        for name in NAMES:
            sys.modules.pop(name, None)


@pytest.fixture
def quick(bench, monkeypatch):
    """Times of one call each, the ceilings given."""
    ceilings = bench.driver.Ceilings(1e10, 1e12, None)
    monkeypatch.setattr(bench.main, "measure_ceilings", lambda device: ceilings)
    monkeypatch.setattr(bench.driver, "times", lambda call, device: (call(), (3e-4, 2e-4, 4e-4))[1])
    return bench


def test_a_run_measures_every_provider_and_tells_what_is_absent(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quick.main, "tests_are_green", lambda path: Path(path).exists())
    monkeypatch.chdir(FOLDER.parents[1])
    files = ["--json", str(tmp_path / "out" / "k.json"), "--markdown", str(tmp_path / "out" / "k.md")]
    assert quick.main.main(files) == 0
    told = capsys.readouterr().out
    assert max(map(len, told.splitlines())) <= 120 or "command: " in max(told.splitlines(), key=len)
    for provider in ("eager ", "autocast eager", "SDPA", "ours: torch"):
        assert f"\n{provider}" in told
    assert "PyG GATv2Conv        not run: " in told or "PyG GATv2Conv        forward" in told
    assert "flex_attention       not run: score_mod sees a number" in told
    rows = [row for result in read(tmp_path / "out" / "k.json")["results"] for row in result["rows"]]
    for row in rows:
        if "mode" in row and row["error"] is not None:
            assert row["error"] < (2e-2 if "autocast" in row["provider"] else 2e-6), row["provider"]
            assert row["provider"] == "ours: torch" or row["ours_faster"] == 1.0
    assert {row["mode"] for row in rows if "mode" in row} == {"forward", "backward", "full"}
    assert (tmp_path / "out" / "k.md").read_text().count("| eager | full |") == 2


def read(path):
    return json.loads(path.read_text())


def test_red_tests_keep_every_speedup_back(quick, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(quick.main, "tests_are_green", lambda path: False)
    assert quick.main.main(["--op", "evidence_pool", "--json", str(tmp_path / "k.json")]) == 1
    assert "- tests are red: no speed-up is reported" in capsys.readouterr().out
    (result,) = read(tmp_path / "k.json")["results"]
    assert not any("ours_faster" in row for row in result["rows"])


def test_the_tests_are_really_run(bench, tmp_path):
    for body, green in (("assert True", True), ("assert False", False)):
        path = tmp_path / f"test_{green}.py"
        path.write_text(f"def test_it():\n    {body}\n")
        assert bench.main.tests_are_green(str(path)) is green


def test_more_than_ten_times_comes_with_the_arithmetic(bench):
    rows = [
        {"provider": name, "mode": "full", "p50_us": time} for name, time in (("a", 50.0), ("b", 101.0), ("me", 10.0))
    ]
    assert bench.driver.add_speedups(rows, "me", "bytes") == ["10.1 times b in full: bytes"]
    assert [row.get("ours_faster") for row in rows] == [5.0, 10.1, None]


def test_the_floor_is_the_largest_of_bytes_flops_and_instructions(bench):
    work, ceilings = bench.driver.Work, bench.driver.Ceilings(100.0, 1000.0, 10.0)
    assert ceilings.floor(work(50, 100, 1)) == (0.5, "bytes")
    assert ceilings.floor(work(50, 900, 1)) == (0.9, "flops")
    assert ceilings.floor(work(50, 900, 20)) == (2.0, "issue")
    assert bench.driver.Ceilings(100.0, 1000.0, None).floor(work(50, 900, 20))[1] == "flops"


@pytest.mark.parametrize("op", ["evidence_pool", "graph_attention"])
def test_bytes_are_those_of_the_tensors(bench, op):
    """Forward: inputs once and outputs once. Counted from the tensors themselves, which is less than 1.2 times less."""
    stem = getattr(bench, op)
    inputs, rest = stem.make_inputs("tiny", "cpu", torch.float32)
    expected, work = stem.expected(inputs, rest), stem.work("tiny", torch.float32)
    held = sum(value.nbytes for value in inputs.values()) + expected["out"].numel() * 4
    assert 0.7 < work["forward"].bytes / held < 1.5
    gradients = sum(value.numel() * 4 for name, value in expected.items() if name != "out")
    assert work["backward"].bytes >= 0.9 * gradients
    assert work["full"].bytes == work["forward"].bytes + work["backward"].bytes
    assert stem.arithmetic("tiny")


def test_float64_in_pieces_is_float64_at_once(bench, monkeypatch):
    stem = bench.graph_attention
    inputs, rest = stem.make_inputs("tiny", "cpu", torch.float32)
    inputs["strength"], rest = inputs["strength"][:2], rest | {"branch_index": None, "mask": rest["mask"][:2]}
    whole = stem.expected(inputs, rest)
    monkeypatch.setattr(stem, "_CHUNK", 1)
    for name, value in stem.expected(inputs, rest).items():
        torch.testing.assert_close(value, whole[name])


def test_a_provider_without_memory_or_compiler_does_not_end_the_run(bench):
    def fail(error):
        def call(**_):
            raise error

        return call

    inputs = {"x": torch.ones(2)}
    out_of_memory = bench.driver.Provider("big", fail(torch.OutOfMemoryError("no")))
    broken = bench.driver.Provider("broken", fail(RuntimeError("no compiler\nhere")))
    ours = bench.driver.Provider("ours", fail(RuntimeError("wrong")), ours=True)
    assert bench.driver.row(out_of_memory, inputs, {}, {}, CEILINGS)[0]["skip"] == "more memory than the device has"
    assert bench.driver.row(broken, inputs, {}, {}, CEILINGS)[0]["skip"] == "no compiler"
    with pytest.raises(RuntimeError, match="wrong"):
        bench.driver.row(ours, inputs, {}, {}, CEILINGS)


def test_the_share_of_a_step_is_told(bench):
    (line,) = bench.main.share([{"provider": "eager", "mode": "full", "p50_us": 500.0}, {"provider": "x"}], 2, 100.0)
    assert line == "eager: 2 x 500 us of a step of 100 ms are 1.000 %"


def test_comparing_with_a_file(bench, monkeypatch, tmp_path, capsys):
    """Plain PyTorch stands in for both sides; a wrong number and a foreign file are found."""
    results = bench.compare.results
    monkeypatch.setattr(bench.compare, "results", lambda size, kernels, device: results(size, "torch", "cpu"))
    path = tmp_path / "k" / "cpu.npz"
    assert bench.compare.main(["--write", str(path)]) == 0
    assert bench.compare.main(["--read", str(path), "--kernels", "torch"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 2 * (4 + 7)
    assert all(line.startswith("ok ") for line in lines)
    arrays = dict(np.load(path))
    np.savez(
        path, **(arrays | {"odd/graph_attention/float32/gate": arrays["odd/graph_attention/float32/gate"] * 1.001})
    )
    assert bench.compare.main(["--read", str(path), "--kernels", "torch"]) == 1
    assert "BAD odd/graph_attention/float32/gate" in capsys.readouterr().out
    np.savez(path, **(arrays | {"odd/evidence_pool/inputs": np.zeros(32, dtype=np.uint8)}))
    assert bench.compare.main(["--read", str(path), "--kernels", "torch"]) == 2
    assert "compare: odd/evidence_pool/inputs: the file was made from other draws" in capsys.readouterr().err


def test_the_gpu_command_runs_each_step_and_sums_up(bench, monkeypatch, tmp_path, capsys):
    lines = {"tests": "print('3 passed')", "compare": "raise SystemExit(1)", "bench": "import time; time.sleep(60)"}

    def commands(step, expected, out, sizes):
        return {step: [sys.executable, "-c", lines[step]]} if step in lines else {"memcheck-odd": "no tool"}

    monkeypatch.setattr(bench.gpu_check, "commands", commands)
    assert bench.gpu_check.main(["--out", str(tmp_path / "gpu"), "--minutes", "0.02"]) == 1
    summary = (tmp_path / "gpu" / "summary.txt").read_text().splitlines()
    assert [line.split(", ")[0] for line in summary] == [
        "tests             ok",
        "compare           exit code 1",
        "memcheck-odd      not run: no tool",
        "bench             out of time",
    ]
    assert summary[0].endswith("3 passed")
    assert (tmp_path / "gpu" / "gpu_check.log").read_text().startswith("===== tests: ")
    assert capsys.readouterr().out.splitlines() == summary


def test_the_gpu_command_names_what_exists(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.gpu_check.shutil, "which", lambda name: f"/usr/bin/{name}")
    root = FOLDER.parents[1]
    found = {}
    for step in bench.gpu_check.STEPS:
        found |= bench.gpu_check.commands(step, tmp_path / "k.npz", tmp_path, ["model"])
    assert list(found) == [
        "tests", "compare", "memcheck-odd", "memcheck-model", "racecheck-odd", "racecheck-model", "bench",
    ]  # fmt: skip
    for command in found.values():
        for part in command:
            if part.startswith(("tests/", "kernels/")):
                assert (root / part).exists(), part
    bench.main.parse(found["bench"][2:])
    assert "no --expected" in bench.gpu_check.commands("compare", None, tmp_path, None)["compare"]
