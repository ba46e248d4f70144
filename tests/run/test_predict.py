"""`aullm-dist predict` gives a trained model's own answers, whichever way the model and the clips come."""

import csv
import io
import json
import math
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from training_runs import fork, logits, newest_checkpoint, overrides, partition_everything, train_here

import aullm_dist
from aullm_dist.cli import main
from aullm_dist.data.clips import ClipStore
from aullm_dist.data.preparation.prepare import PrepareOptions, prepare
from aullm_dist.release.export import export

pytestmark = pytest.mark.launch


@pytest.fixture(scope="module")
def run(tiny_dataset, tiny_llm, tmp_path_factory) -> Path:
    """A short run on an NF4 base with products in float32, so that rounding tells little."""
    folder = tmp_path_factory.mktemp("predict") / "run"
    settings = overrides(tiny_dataset, tiny_llm, folder, model__quantization="nf4", training__max_steps=2)
    assert train_here(*settings) == 0
    return folder


def predict_here(*arguments: object) -> int:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return main(["predict", *map(str, arguments)])


def answers_in(text: str) -> dict[str, list[float]]:
    """Return the logits by clip, after a look at what else a row says."""
    answers: dict[str, list[float]] = {}
    for row in csv.DictReader(io.StringIO(text)):
        probability = float(row["probability"])
        assert int(row["active"]) == (probability > float(row["threshold"])), row
        answers.setdefault(row["clip"], []).append(math.log(probability / (1 - probability)))
    return answers


def written(row: list[float]) -> list[object]:
    """Return what a CSV may make of logits: it has six decimals of a probability, which say less of one near 0 or 1."""
    return [pytest.approx(logit, abs=2e-5 + 6e-7 * math.exp(abs(logit))) for logit in row]


def check(found: dict[str, list[float]], run: Path) -> None:
    held_out = logits(run)
    assert len(found) == 24
    assert len(held_out) > 8
    for sample_id, expected in held_out.items():
        assert found[sample_id] == written(expected), sample_id


@pytest.fixture(scope="module")
def clip(run, tiny_dataset, tmp_path_factory) -> tuple[str, list[str], np.ndarray]:
    """A held-out clip: its id, its folder in the corpus with its span as options, and its frames `[T, 64, 64]`."""
    sample_id = sorted(logits(run))[0]
    stored = ClipStore([tiny_dataset], 64).view([sample_id]).clip(0)
    folder = next((tiny_dataset.parent / "corpus").glob(f"CASME2_RAW*/{sample_id.removeprefix('casme2/')}"))
    span = ["--onset", str(stored.frame_numbers[0]), "--offset", str(stored.frame_numbers[-1])]
    return sample_id, [str(folder), *span], stored.frames


def write_video(path: Path, frames: np.ndarray) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 30, frames.shape[:0:-1], isColor=False)
    assert writer.isOpened()
    for frame in frames:
        writer.write(frame)
    writer.release()
    return path


def test_one_process_gives_the_answers_of_the_run(run, tiny_dataset, tmp_path, capsys):
    out = tmp_path / "answers.csv"
    assert predict_here(run / "fold-00", tiny_dataset, "--out", out, "--set", "training.micro_batch=3") == 0
    check(answers_in(out.read_text()), run)
    said = capsys.readouterr()
    assert said.out == ""
    assert re.search(r"24 clips in [0-9.]+ s \([0-9.]+ clips/s\)", said.err)
    # Scores of drawn faces are not taken for those of real ones, and CSV has no place to say it.
    scored, *notes = said.err.splitlines()[-3:]
    assert "f1_macro" in scored
    assert notes[0] == "Note: the model was trained on synthetic faces: its answers say nothing about real faces."
    assert "random weights" in notes[1]


def test_a_divided_llm_gives_the_answers_of_the_run(run, tiny_dataset, clip, tmp_path):
    """The last clip is a video: one process reads it, and both read the first."""
    out = tmp_path / "answers.csv"
    video = write_video(tmp_path / "clip.avi", clip[2])
    strategy = f"training.strategy={partition_everything(tmp_path)}"
    result = fork(
        "predict", str(newest_checkpoint(run)), str(tiny_dataset), str(video), "--out", str(out), "--set", strategy,
        processes=2, program="aullm_dist.cli",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "partitioned over 2 processes" in result.stderr
    found = answers_in(out.read_text())
    assert found.pop(str(video)) == written(logits(run)[clip[0]])
    check(found, run)


def test_folders_videos_arrays_and_releases_give_the_same_answer(run, clip, tmp_path, capsys):
    sample_id, folder, frames = clip
    expected = pytest.approx(logits(run)[sample_id], abs=2e-5)
    video = write_video(tmp_path / "clip.avi", frames)
    capsys.readouterr()
    assert predict_here(run / "fold-00", *folder, "--csv") == 0
    assert answers_in(capsys.readouterr().out) == {folder[0]: written(logits(run)[sample_id])}

    model = aullm_dist.load(run / "fold-00", device="cpu")
    assert model.config.data.crops == ("none",)
    answer = model.predict(np.concatenate([frames[:1], frames, frames[-1:]]), onset=1, offset=len(frames), explain=True)
    assert answer.logits.tolist() == expected
    assert answer.decisions.tolist() == (answer.probabilities > answer.thresholds).tolist()
    assert answer.explanation.evidence.shape == (1, 4, 162)
    assert model.predict(np.repeat(frames[..., None], 3, axis=-1)).explanation is None

    export(run / "fold-00", tmp_path / "release", format="adapter", device="cpu")
    picture = tmp_path / "picture.png"
    assert predict_here(tmp_path / "release", video, "--json", "--figure", picture) == 0
    told = json.loads(capsys.readouterr().out)
    (told_clip,) = told["clips"]
    assert [au["logit"] for au in told_clip["aus"]] == expected
    assert [au["threshold"] for au in told_clip["aus"]] == answer.thresholds.tolist()
    assert (told_clip["clip"], told["crop"]) == (str(video), "none")
    assert told["threshold_policy"] == answer.threshold_policy
    with Image.open(picture) as image:
        assert min(image.size) > 600


def test_a_table_names_each_au(run, tiny_dataset, clip, capsys):
    assert predict_here(run / "fold-00", tiny_dataset, "--clip", clip[0]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == clip[0]
    assert re.fullmatch(r"  AU4 Brow Lowerer +0\.\d{3} +0\.\d{3} +(yes|-)", lines[4])
    assert lines[-3].startswith("Thresholds: per fold and AU, highest f1_macro on the fold's own inner")
    assert lines[-2].startswith("Note: the model was trained on synthetic faces")
    assert lines[-1].startswith("Note: the model's LLM has random weights")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"release": "{tmp}/nowhere"}, "nowhere: no such folder; allowed: a release, a checkpoint or a fold of a run"),
        ({"release": "{run}"}, "holds no valid checkpoint; give a checkpoint or a fold"),
        ({"out": "{dataset}"}, "exists already; give the name of a new file"),
        ({"figure": "{dataset}"}, "exists already; give the name of a new file"),
        ({"figure": "{tmp}/x.gif"}, "x.gif: allowed: a name that ends in .png, .pdf, .svg"),
        ({"figure": "{tmp}/x.png"}, "--figure shows one clip, and there are 24; choose it with --clip ID"),
        ({"set": "model.lora_rank=2"}, "a prediction takes it from the checkpoint; allowed: model.llm, "),
        ({"set": "training.micro_batch=0"}, "training.micro_batch is 0; allowed: a finite number above 0"),
        ({"input": "{run}"}, "no frames in it; allowed: numbered .jpg"),
        ({"input": "{tmp}/nowhere"}, "nowhere: does not exist; give a folder of frames, a video file or a prepared"),
        ({"input": "{center}"}, "was prepared with crop center, but none is wanted"),
        ({"input": "{small}"}, "clips are 32x32 pixels, data.size is 64"),
        ({"input": "{folder}", "crop": "center"}, "crop center: the model was trained on clips cut with none"),
        ({"input": "{folder}", "onset": "100000"}, "onset 100000 lies outside of the clip; allowed: its frames"),
        ({"crop": "none"}, "--crop none: prepared datasets are cut already; leave it out"),
        ({"onset": "3"}, "--onset and --offset belong to one folder of frames or one video; give that alone"),
        ({"clip": "casme2/sub99/x"}, "--clip casme2/sub99/x: no such clip among the inputs; the first is casme2/"),
        ({"set": "model.llm={run}"}, "backbone {run}:"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(run, others, clip, tmp_path, capsys, changes, message):
    places = {"run": run, "tmp": tmp_path, "folder": clip[1][0], **others}
    given = {"release": run / "fold-00", "input": others["dataset"], "out": tmp_path / "answers.csv"}
    given |= {key: value.format(**places) for key, value in changes.items()}
    release, named = given.pop("release"), given.pop("input")
    options = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    assert predict_here(release, named, *options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aullm-dist: error: ")]
    assert len(errors) == 1
    assert message.format(**places) in errors[0]
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def others(tiny_dataset, tmp_path_factory) -> dict[str, Path]:
    """The dataset, and the same clips cut in another way and to another size."""
    folder = tmp_path_factory.mktemp("others")
    corpus = tiny_dataset.parent / "corpus"
    prepare("casme2", corpus, folder / "center", PrepareOptions(size=64, crop="center", num_workers=1))
    prepare("casme2", corpus, folder / "small", PrepareOptions(size=32, num_workers=1))
    return {"dataset": tiny_dataset, "center": folder / "center", "small": folder / "small"}
