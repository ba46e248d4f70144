"""`aullm-dist report` on a run as training leaves it, on parts of one, and on what is none."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from pages import browser, look_at
from PIL import Image
from training_runs import overrides, scalars, train_here

from aullm_dist.cli import main

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def run(tiny_dataset, tiny_llm, tmp_path_factory) -> Path:
    """A short run of one fold of three, with its baseline."""
    folder = tmp_path_factory.mktemp("report") / "run"
    settings = overrides(tiny_dataset, tiny_llm, folder, training__max_steps=3, training__baseline=True)
    settings.append("monitor.trackers=[file_tracker:FileTracker]")
    assert train_here(*settings) == 0
    return folder


def test_the_run_was_logged_to_another_tracker_as_to_tensorboard(run):
    lines = [json.loads(line) for line in (run / "aullm-dist-run-fold-00.jsonl").read_text().splitlines()]
    assert (lines[0]["what"], lines[1]["what"], lines[-1]["what"]) == ("start", "settings", "finish")
    assert lines[1]["values"]["training.max_steps"] == 3
    logged = {
        (tag, line["step"]): value for line in lines if line["what"] == "log" for tag, value in line["values"].items()
    }
    assert [logged["Loss/loss", step] for step in (1, 2, 3)] == pytest.approx(scalars(run, "loss/loss"))
    assert {tag for tag, _ in logged} >= {"heldout/auc", "step_ms/total", "train/grad_norm"}


def report(*arguments: object) -> int:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return main(["report", *map(str, arguments), "--bootstrap", "20"])


def state_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_becomes_a_page_that_stands_alone(run, tmp_path, capsys, caplog):
    caplog.set_level("INFO", "aullm_dist")
    before, out = state_of(run), tmp_path / "page"
    assert report(run, "--out", out, "--clips", 2) == 0
    assert state_of(run) == before, "a report changes nothing in the run"
    told = caplog.text
    assert told.index("Report of run") < told.index("Results") < told.index("Features of") < told.index("Settings")
    page = (out / "index.html").read_text(encoding="utf-8")
    pictures = {path.stem for path in (out / "figures").glob("*.svg")}
    assert {path.stem for path in (out / "figures").glob("*.png")} == pictures
    wanted = {"evidence-0", "evidence-1", "graph-strengths", "relations-influence", "difference-f1_macro"}
    # Two spaces: the baseline's and the model's; four steps from the visual summary to the final hidden state.
    wanted |= {"tsne-0", "tsne-1", *(f"evolution-{step}" for step in range(4)), "curve-loss-loss", "curve-heldout-auc"}
    assert wanted <= pictures
    assert "evidence-2" not in pictures
    assert all(f'src="figures/{name}.svg"' in page for name in pictures)
    assert "frames of the corpus: casme2" in page
    assert "AULLM++, content token (CT) zeroed" in page
    assert "no LLM (led_cnn)" in page
    # Drawn faces are named above everything else, and in the title of each table of scores.
    assert page.index("The faces are synthetic") < page.index("<nav")
    titles = re.findall(r'<p class="title">(.*?)</p>', page)
    assert [title for title in titles if "in percent" in title or "threshold" in title]
    assert all("(synthetic faces, random LLM)" in title for title in titles if "threshold" in title)
    for png in (out / "figures").glob("*.png"):
        assert len(set(Image.open(png).convert("L").tobytes())) > 4, png
    said = capsys.readouterr()
    assert f"Report: {out / 'index.html'}" in said.out
    # One fold of three was trained, on one corpus.
    assert "1 of 3 folds are here" in said.err
    assert "one corpus alone" in said.err


@pytest.mark.skipif(
    not browser() and not os.environ.get("AULLM_REQUIRE_CHROMIUM"),
    reason="no Chromium to look at the page with (Debian: apt-get install chromium)",
)
@pytest.mark.parametrize("width", [1280, 400])
def test_a_browser_shows_the_whole_page_at_any_width(run, tmp_path, width):
    assert report(run, "--out", tmp_path / "page") == 0
    seen = look_at(tmp_path / "page" / "index.html", width, tmp_path / "page.png")
    assert seen["broken"] == ""
    assert int(seen["width"]) <= width, "nobody scrolls sideways"
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    # Names of rows stay where the numbers beside them are scrolled.
    assert "position: sticky; left: 0" in page
    with Image.open(tmp_path / "page.png") as shot:
        assert shot.size == (width, int(seen["height"]))
        # Each quarter of the page shows something.
        for top in range(0, shot.height, shot.height // 4)[:4]:
            part = shot.crop((0, top, width, top + shot.height // 4)).convert("L")
            assert part.getextrema()[0] < 100, f"nothing between {top} and {top + shot.height // 4} pixels"


def test_an_unfinished_and_damaged_run_is_shown_as_far_as_it_goes(run, tmp_path, capsys):
    part = tmp_path / "part"
    shutil.copytree(run, part)
    shutil.rmtree(part / "tensorboard")
    shutil.rmtree(part / "baselines" / "led_cnn" / "fold-00" / "predictions")
    shutil.rmtree(part / "fold-00" / "checkpoints")
    (part / "environment.json").write_text("{")
    assert report(part, "--out", tmp_path / "page") == 0
    said = capsys.readouterr().err
    for text in ("no event files", "no fold-*/predictions", "there is no checkpoint of any fold", "not valid JSON"):
        assert text in said, text
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "Held-out subjects, threshold fixed at 0.5" in page
    assert "global_batch: 4" in page
    assert not list((tmp_path / "page" / "figures").iterdir())


def test_an_empty_folder_says_what_is_missing(run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert report(empty, "--out", tmp_path / "page") == 0
    said = capsys.readouterr().err
    for name in ("config.yaml", "environment.json", "folds.json", "predictions", "no event files"):
        assert name in said, name
    mixed = tmp_path / "mixed"
    shutil.copytree(run, mixed)
    folds = json.loads((mixed / "folds.json").read_text())
    (mixed / "folds.json").write_text(json.dumps({**folds, "aus": [1, 2]}))
    assert report(mixed, "--out", tmp_path / "mixed-page", "--no-model") == 0
    assert "folds.json has [1, 2]" in capsys.readouterr().err
    assert (tmp_path / "mixed-page" / "figures" / "curve-loss-loss.svg").exists()


def test_two_runs_stand_beside_each_other(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run / "baselines" / "led_cnn", other)
    assert report(run, other, "--out", tmp_path / "page", "--no-model") == 0
    page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
    assert "other minus run" in page
    assert 'src="figures/run2-to-run1-difference-auc.svg"' in page
    assert 'src="figures/run2-curve-loss-loss.svg"' in page


def test_mistakes_leave_nothing_behind(run, tmp_path, capsys):
    out = tmp_path / "page"
    for arguments in ((run,), (tmp_path / "none", "--out", out), (run, run, "--out", out), (run, "--out", run)):
        assert report(*arguments) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not out.exists()
    assert not list(tmp_path.iterdir())
