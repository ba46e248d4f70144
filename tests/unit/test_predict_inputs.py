"""Inputs of a prediction, damaged in many ways: read as they are, or refused or told in a line.

`tests/faults/predict_inputs.py` tries many more.
"""

import pytest
from clip_inputs import judge


@pytest.mark.parametrize("seed", range(60))
def test_an_input_is_read_as_it_is_or_told(tmp_path, seed):
    assert judge(seed, tmp_path) == ""
