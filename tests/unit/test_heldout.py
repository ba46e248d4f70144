"""Answers on held-out clips: every clip once, in the view's order, and a bar for those who wait."""

import numpy as np
import pytest
from accelerate import Accelerator
from tqdm import tqdm

from aullm_dist.config import load
from aullm_dist.data.clips import ClipStore
from aullm_dist.evaluation.answers import Answers
from aullm_dist.training import heldout
from aullm_dist.training.build import build_model, evaluation_recipe

AUS = (1, 2, 4, 7, 12)


@pytest.fixture
def answer(tiny_dataset):
    config = load(None, ["model.llm=none"])
    store = ClipStore([tiny_dataset], 64)
    built = build_model(config, AUS, "none")
    view = store.view([sample.sample_id for sample in store.samples])

    def run(micro_batch: int) -> Answers:
        held_out = heldout.HeldOut(Accelerator(cpu=True), evaluation_recipe(config, built), AUS, micro_batch)
        return held_out.answer(built.model, view, name="Held-out clips")[None]

    return run


def test_the_micro_batch_does_not_change_the_answers(answer):
    whole, cut = answer(24), answer(5)
    assert whole.sample_ids == cut.sample_ids
    assert len(set(whole.sample_ids)) == 24
    np.testing.assert_allclose(whole.logits, cut.logits, atol=1e-5)


def test_who_waits_sees_the_clips_counted(answer, capsys, monkeypatch):
    answer(5)
    assert capsys.readouterr().err == "", "a moment needs no bar"
    monkeypatch.setattr(heldout, "tqdm", lambda **options: tqdm(**{**options, "delay": 0, "leave": True}))
    answer(5)
    assert "Held-out clips: 100%" in (shown := capsys.readouterr().err)
    assert "24/24" in shown
