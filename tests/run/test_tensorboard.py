"""TensorBoard itself on a real run of two processes that divide every parameter, asked through its HTTP API."""

import io
import json
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from PIL import Image
from training_runs import fork, free_port, overrides, partition_everything, train_here

pytestmark = pytest.mark.launch

AUS = ("AU1", "AU2", "AU4", "AU7", "AU12", "AU14", "AU15", "AU17")


class Board:
    """A running TensorBoard."""

    def __init__(self, port):
        self.address = f"http://127.0.0.1:{port}"
        # Whatever proxies the environment names, this machine is asked directly.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def get(self, path, **query):
        address = f"{self.address}/data/{path}?{urllib.parse.urlencode(query)}"
        with self._opener.open(address, timeout=20) as answer:
            return answer.read()

    def json(self, path, **query):
        return json.loads(self.get(path, **query))


@pytest.fixture(scope="module")
def run(tiny_dataset, tiny_llm, tmp_path_factory):
    folder = tmp_path_factory.mktemp("board")
    settings = overrides(
        tiny_dataset, tiny_llm, folder / "run", training__micro_batch=2, training__max_steps=2,
        training__strategy=partition_everything(folder), monitor__clips=2, monitor__projector_clips=200,
        monitor__communication_every_steps=1,
    )  # fmt: skip
    result = fork(*settings, processes=2)
    assert result.returncode == 0, result.stderr
    return folder / "run", result.stderr


@pytest.fixture(scope="module")
def board(run, tmp_path_factory):
    port = free_port()
    command = [
        sys.executable, "-m", "tensorboard.main", f"--logdir={run[0] / 'tensorboard'}", "--host=127.0.0.1",
        f"--port={port}", "--load_fast=false", "--reload_interval=1",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("log") / "tensorboard.txt"
    with open(log, "w") as output, subprocess.Popen(command, stdout=output, stderr=output) as server:
        try:
            board, deadline = Board(port), time.monotonic() + 90
            while not _is_ready(board):
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.2)
            yield board
        finally:
            server.terminate()
            server.wait(20)


def _is_ready(board):
    try:
        return set(board.json("runs")) == {"all-folds", "fold-00"}
    except urllib.error.URLError:
        return False


def test_scalars_of_every_group(board):
    tags = board.json("plugin/scalars/tags")
    groups = {tag.partition("/")[0] for tag in tags["fold-00"]}
    assert {"Loss", "lr", "train", "step_ms", "memory", "heldout", "heldout_auc", "sensitivity"} <= groups
    parts = {"data", "forward", "backward", "optimizer", "total", "communication_wait"}
    assert {tag for tag in tags["fold-00"] if tag.startswith("step_ms/")} == {f"step_ms/{part}" for part in parts}
    assert "train/tflops_per_device" in tags["fold-00"]
    assert "train/mfu" not in tags["fold-00"], "nobody knows the peak of this CPU"
    for tag in ("Loss/loss", "step_ms/communication_wait", "step_ms/optimizer"):
        rows = board.json("plugin/scalars/scalars", run="fold-00", tag=tag)
        assert [row[1] for row in rows] == [1, 2]
        assert all(row[2] > 0 for row in rows), tag


def test_pictures_and_curves(board):
    tags = board.json("plugin/images/tags")["fold-00"]
    assert set(tags) == {
        "confusion/per_au", "evidence/onset_and_apex", "au_graph/factual_beside_counterfactual",
    }  # fmt: skip
    for tag in tags:
        (row,) = board.json("plugin/images/images", run="fold-00", tag=tag, sample=0)
        key = row["query"].removeprefix("blob_key=")
        picture = Image.open(io.BytesIO(board.get("plugin/images/individualImage", blob_key=key)))
        assert min(picture.size) > 100
        assert len(np.unique(np.array(picture.convert("L")))) > 10
    assert set(board.json("plugin/pr_curves/tags")["fold-00"]) == {f"pr/{au}" for au in AUS}
    (curve,) = board.json("plugin/pr_curves/pr_curves", run="fold-00", tag="pr/AU1")["fold-00"]
    # How many points differ depends on how far apart the answers are after two steps.
    assert curve["precision"]
    assert len(curve["precision"]) == len(curve["recall"])
    assert max(curve["true_positives"]) > 0


def test_histograms_texts_and_the_first_screen(board):
    histograms = board.json("plugin/histograms/tags")["fold-00"]
    assert {"lora_update/q_proj", "lora_update/layers"} <= set(histograms)
    (row,) = board.json("plugin/histograms/histograms", run="fold-00", tag="lora_update/layers")
    buckets = row[2]
    assert sum(bucket[2] for bucket in buckets) == 2, "two decoder layers"
    assert max(bucket[1] for bucket in buckets) > 0, "LoRA has moved"
    assert set(board.json("plugin/text/tags")["fold-00"]) == {"config/text_summary", "run/text_summary"}
    text = json.dumps(board.json("plugin/text/text", run="fold-00", tag="run/text_summary"))
    for fact in ("commit", "torch", "fold_name"):
        assert fact in text
    layout = board.json("plugin/custom_scalars/layout")
    assert layout["category"][0]["title"] == "Is the run healthy?"


def test_the_projector_shows_labelled_clips(board, run):
    assert set(board.json("plugin/projector/runs")) == {"fold-00"}
    info = board.json("plugin/projector/info", run="fold-00")
    assert [entry["tensorName"] for entry in info["embeddings"]] == ["content_token", "final_hidden_state"]
    metadata = board.get("plugin/projector/metadata", run="fold-00", name="content_token").decode().splitlines()
    clips = len(json.loads((run[0] / "folds.json").read_text())["folds"][0]["test"])
    assert len(metadata) == clips + 1
    assert metadata[0].split("\t")[:5] == ["clip", "subject", "AUs", "answer", "AU1"]
    for name in ("content_token", "final_hidden_state"):
        values = np.frombuffer(board.get("plugin/projector/tensor", run="fold-00", name=name), dtype=np.float32)
        assert values.size % clips == 0
        assert np.abs(values).max() > 0
    sprite = board.get("plugin/projector/sprite_image", run="fold-00", name="content_token")
    assert sprite.startswith(b"\x89PNG")


def test_all_folds_in_one_view_with_hyperparameters(board, run):
    rows = board.json("plugin/scalars/scalars", run="all-folds", tag="pooled/f1_macro")
    assert [row[1] for row in rows] == [1]
    metrics = json.loads((run[0] / "metrics.json").read_text())
    assert rows[-1][2] == pytest.approx(metrics["mean"]["f1_macro"])
    wanted = {"colParams": [], "startIndex": 0, "sliceSize": 10, "allowedStatuses": ["STATUS_SUCCESS"]}
    (group,) = board.json("plugin/hparams/session_groups", request=json.dumps(wanted))["sessionGroups"]
    assert group["hparams"]["model.lora_rank"] == 4
    (session,) = group["sessions"]
    found = {value["name"]["tag"]: value["value"] for value in session["metricValues"]}
    assert found["final/f1_macro"] == pytest.approx(metrics["mean"]["f1_macro"])


def test_the_console_says_how_far_it_is_and_how_it_went(run):
    log = run[1].splitlines()
    (last,) = [line for line in log if line.startswith("Fold 0: 100% 2/2 steps, loss ")]
    assert " clips/s, " in last
    assert last.endswith(" GiB")
    (summary,) = [line for line in log if line.startswith("Fold 0: 2 steps in ")]
    assert "memory at most" in summary


def test_a_run_whose_event_files_cannot_be_written_trains_on(tiny_dataset, tiny_llm, tmp_path, capsys):
    settings = overrides(tiny_dataset, "none", tmp_path / "run", training__max_steps=1, monitor__clips=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("in the way")
    assert train_here(*settings) == 0
    captured = capsys.readouterr()
    assert captured.err.count("the run continues without event files") == 1
    assert "Traceback" not in captured.err
    assert "Held-out subjects" in captured.out
