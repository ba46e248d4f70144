"""Decisions, the frame worth showing, and answers as text, CSV and JSON."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest

from aullm_dist.evaluation.answers import Answers
from aullm_dist.prediction.report import Predictions, render_csv, render_json, render_text, scores
from aullm_dist.release.origin import Thresholds
from aullm_dist.release.predicting import decide, threshold_array

AUS = (4, 12)


def predictions(num_clips: int = 2, logits: tuple[float, float] = (-1.0, 2.0)) -> Predictions:
    ids = tuple(f"clip{number}" for number in range(num_clips))
    answers = Answers(
        sample_ids=ids,
        subjects=("casme2/sub01", *[""] * (num_clips - 1)),
        corpora=("casme2", *[""] * (num_clips - 1)),
        labels=np.array([[1.0, 0.0]] + [[0.0, 0.0]] * (num_clips - 1)),
        logits=np.tile(np.array(logits), (num_clips, 1)),
    )
    thresholds = Thresholds(values={12: 0.9, 4: 0.2}, policy="chosen by hand")
    return Predictions(model="release", answers=answers, aus=AUS, thresholds=thresholds, crop="center")


def test_each_au_has_its_own_threshold():
    limits = threshold_array({12: 0.9, 4: 0.2}, AUS)
    assert limits.tolist() == [0.2, 0.9]
    assert decide(np.array([[-1.0, 2.0], [-2.0, 3.0]]), limits).tolist() == [[True, False], [False, True]]
    # At the threshold itself an AU is not active, as in the evaluation.
    assert decide(np.zeros(2), np.array([0.5, 0.5])).tolist() == [False, False]


def test_few_clips_get_a_table_and_many_a_line():
    text = render_text(predictions())
    assert "  AU4 Brow Lowerer              0.269      0.200     yes\n" in text
    assert "  AU12 Lip Corner Puller        0.881      0.900       -\n" in text
    assert text.endswith("Thresholds: chosen by hand\n")
    lines = render_text(predictions(5)).splitlines()
    assert lines[:5] == [f"clip{number}  AU4 0.27" for number in range(5)]
    assert render_text(predictions(5, (-9.0, -9.0))).splitlines()[0] == "clip0  no AU"


def test_csv_has_a_row_per_clip_and_au():
    rows = list(csv.DictReader(io.StringIO(render_csv(predictions()))))
    assert len(rows) == 4
    assert rows[0] == {
        "clip": "clip0", "corpus": "casme2", "subject": "casme2/sub01", "au": "4", "name": "Brow Lowerer",
        "probability": "0.268941", "threshold": "0.200000", "active": "1",
    }  # fmt: skip
    assert (rows[3]["clip"], rows[3]["corpus"], rows[3]["active"]) == ("clip1", "", "0")


def test_json_says_what_csv_says_and_how_it_was_decided():
    told = json.loads(render_json(predictions()))
    assert (told["model"], told["crop"], told["threshold_policy"]) == ("release", "center", "chosen by hand")
    assert told["clips"][1]["subject"] is None
    assert told["clips"][0]["aus"][1] == {
        "au": 12, "name": "Lip Corner Puller", "probability": pytest.approx(0.8807970779778823), "logit": 2.0,
        "threshold": 0.9, "active": False,
    }  # fmt: skip


def test_what_limits_a_model_stands_with_its_answers():
    said = "the model was trained on synthetic faces: its answers say nothing about real faces"
    told = dataclasses.replace(predictions(), caveats=(said,))
    assert render_text(told).endswith(f"Thresholds: chosen by hand\nNote: {said}.\n")
    assert json.loads(render_json(told))["caveats"] == [said]
    assert json.loads(render_json(predictions()))["caveats"] == []


def test_only_clips_with_labels_are_scored():
    assert scores(predictions(), np.array([False, False])) == []
    (line,) = scores(predictions(), np.array([True, False]))
    # AU4 is missed and AU12 found where there is none.
    assert "f1_macro 0.0, f1_binary 0.0, no AU has both classes" in line
