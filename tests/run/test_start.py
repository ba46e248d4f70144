"""How a run starts: on a base that was quantised beforehand, or not at all where memory is short."""

import pytest
from training_runs import overrides, train_here

from aullm_dist.cli import main
from aullm_dist.training import fitting

pytestmark = pytest.mark.launch


def test_a_run_trains_on_a_base_that_was_quantised_beforehand(small_dataset, tiny_llm, tmp_path):
    assert main(["quantize", str(tiny_llm), "--out", str(tmp_path / "nf4")]) == 0
    settings = overrides(
        small_dataset, tmp_path / "nf4", tmp_path / "run", model__quantization="nf4", training__max_steps=1
    )
    assert train_here(*settings) == 0


def test_the_trainer_refuses_before_it_has_a_run_folder(small_dataset, tiny_llm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fitting, "free_machine_memory", lambda: 4 * 2**20)
    output = tmp_path / "run"
    settings = overrides(small_dataset, tiny_llm, output, training__check_memory=True, model__structure=False)
    assert train_here(*settings) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert "does not fit" in error[-1]
    assert sum("does not fit" in line for line in error) == 1
    assert not output.exists()


@pytest.mark.parametrize("llm", ["/no/such/llm", "empty", "file", "~nobody-of-this-name/llm"])
def test_an_llm_that_is_not_there_is_refused_before_a_corpus_is_drawn(llm, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    before = sorted(tmp_path.iterdir())
    assert train_here(f"model.llm={llm}", "training.output=run", "training.check_memory=false") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert llm in line
    assert sorted(tmp_path.iterdir()) == before
