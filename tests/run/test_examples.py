"""The examples do what they say: the notebook runs as it stands, from a corpus to a picture."""

import json
import re
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from notebooks import code_cells, run_cells
from PIL import Image

from aullm_dist.config.schema import settings

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.rglob("*.ipynb"))
pytestmark = [pytest.mark.launch, pytest.mark.timeout(1200)]


def test_a_notebook_goes_from_a_corpus_to_a_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names = run_cells(EXAMPLES / "corpus_to_picture.ipynb")
    assert "It is for tests and demos; no claim about real faces" in names["outputs"][0]
    assert r"f1\_macro &" in names["outputs"][3]
    assert np.asarray(Image.open(tmp_path / "notebook" / "clip.png")).std() > 10
    assert len(names["answer"].probabilities) == len(names["aus"]) == 8
    # It has learnt something that a reader can see.
    assert names["metrics"]["mean"]["auc"] > 0.7


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_whole(path):
    """Settings exist, links lead somewhere, and nothing of the machine that ran it is in the outputs."""
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    known = {setting.name for setting in settings()}
    for source in code_cells(path):
        assert set(re.findall(r" ([a-z]+\.[a-z_]+)=", source)) <= known
    prose = "".join(line for cell in notebook["cells"] if cell["cell_type"] == "markdown" for line in cell["source"])
    for link in re.findall(r"\]\(([^)#]+)", prose):
        assert (path.parent / link).exists(), link
    for private in ("/home/", "/work/", "/tmp/", "/root/"):
        assert private not in text
