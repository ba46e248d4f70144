"""`aullm-dist app` with a model behind it: the answers of `aullm-dist predict`, in a browser at two widths."""

import json
import os
import signal
import tempfile
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from devtools import Page, open_browser
from pages import browser
from PIL import Image
from release_samples import write_run

from aullm_dist.app.answers import PageAnswerer
from aullm_dist.app.server import PageServer, open_server
from aullm_dist.app.uploads import Uploads
from aullm_dist.cli import main
from aullm_dist.commands.app import _model_facts
from aullm_dist.prediction.session import InputOptions, open_answerer
from aullm_dist.release.export import export

pytestmark = pytest.mark.launch


def reset() -> None:
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset, tiny_llm, tmp_path_factory) -> Path:
    """A checkpoint whose answer has stages; its weights are random."""
    return write_run(tmp_path_factory.mktemp("app") / "run", tiny_dataset, tiny_llm, answer="stages")


@pytest.fixture(scope="module")
def server(checkpoint, tmp_path_factory) -> Iterator[PageServer]:
    reset()
    answerer = open_answerer(checkpoint, [], InputOptions(inputs=()))
    uploads = Uploads(tmp_path_factory.mktemp("uploads"), 5 << 20)
    facts = _model_facts(answerer, "none")
    with open_server(0, PageAnswerer(answerer, None), uploads, facts, answerer.caveats) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield served
        served.shutdown()
        thread.join()
    answerer.close()


@pytest.fixture(scope="module")
def clip(tiny_dataset) -> Path:
    """A folder of frames of the drawn corpus."""
    return next(path.parent for path in sorted((tiny_dataset.parent / "corpus").rglob("*1.jpg")))


def numbers_of(clip: Path) -> list[int]:
    return sorted(int("".join(filter(str.isdigit, path.stem))) for path in clip.glob("*.jpg"))


def ask(server: PageServer, method: str, path: str, body: bytes | None = None) -> bytes:
    request = urllib.request.Request(f"{server.address}{path}", body, method=method)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.read()


def test_the_json_is_what_predict_says_of_the_same_frames(server, checkpoint, clip, monkeypatch, capsys):
    key = json.loads(ask(server, "POST", "clips", json.dumps({"name": clip.name}).encode()))["id"]
    for file in clip.iterdir():
        ask(server, "PUT", f"clips/{key}/files/{file.name}", file.read_bytes())
    numbers = json.loads(ask(server, "POST", f"clips/{key}/read", b""))["numbers"]
    assert numbers == numbers_of(clip)
    monkeypatch.chdir(clip.parent)
    for onset, offset in ((numbers[0], numbers[-1]), (numbers[1], numbers[4])):
        span = json.dumps({"onset": onset, "offset": offset}).encode()
        shown = json.loads(ask(server, "POST", f"clips/{key}/answer", span))
        told = json.loads(ask(server, "GET", f"clips/{key}/prediction.json"))
        reset()
        capsys.readouterr()
        assert (
            main(["predict", str(checkpoint), clip.name, "--json", "--onset", str(onset), "--offset", str(offset)]) == 0
        )
        assert told == json.loads(capsys.readouterr().out)
        assert ["synthetic faces" in told["caveats"][0], "random" in told["caveats"][1]] == [True, True]
        # What the page shows is the same, and its ladder ends with it.
        assert [au["probability"] for au in told["clips"][0]["aus"]] == [au["probability"] for au in shown["aus"]]
        assert shown["stages"] == ["evidence", "structure", "deduction"]
        assert all(au["ladder"][-1] == au["probability"] for au in shown["aus"])
        assert len({tuple(au["ladder"]) for au in shown["aus"]}) == len(shown["aus"])
        assert shown["frames"][0::2] == [onset, offset]
    assert ask(server, "GET", f"clips/{key}/picture.png").startswith(b"\x89PNG")


def answered(page: Page) -> None:
    page.wait("!document.getElementById('result').hidden && document.getElementById('status').hidden")
    page.wait("[...document.images].every(image => image.closest('[hidden]') || image.naturalWidth)")


@pytest.mark.skipif(
    not browser() and not os.environ.get("AULLM_REQUIRE_CHROMIUM"),
    reason="no Chromium to look at the page with (Debian: apt-get install chromium)",
)
def test_a_clip_goes_in_and_the_picture_comes_out(server, clip, tmp_path):
    files, numbers = sorted(clip.glob("*.jpg")), numbers_of(clip)
    (tmp_path / "notes.txt").write_text("what I saw\n")
    with open(tmp_path / "long.avi", "wb") as file:
        file.truncate(6 << 20)
    with open_browser(tmp_path / "profile") as page:
        for width in (1280, 400):
            page.open(server.address, width)
            banner = page.tell("document.querySelector('.caveats').innerText")
            assert banner.startswith("The model was trained on synthetic faces")
            if width == 1280:
                page.drop("#drop", [clip])
            else:
                page.choose("#files", files)
            answered(page)
            assert page.tell("document.getElementById('error').hidden")
            title = page.tell("document.getElementById('result-title').textContent")
            assert (clip.name in page.tell("document.getElementById('clip-title').textContent")) == (width == 1280)
            assert title.endswith(f"action units active in frames {numbers[0]} to {numbers[-1]}")
            assert page.tell("document.querySelectorAll('#bars tbody tr').length") == 8
            assert page.tell("document.documentElement.scrollWidth") <= width, "nobody scrolls sideways"
            page.picture(tmp_path / f"app-{width}.png")
            with Image.open(tmp_path / f"app-{width}.png") as shot:
                assert shot.width == width
                for top in range(0, shot.height - shot.height // 4, shot.height // 4):
                    part = shot.crop((0, top, width, top + shot.height // 4)).convert("L")
                    assert part.getextrema()[0] < 100, f"nothing below {top} pixels"
        # Another span, by the keyboard's way: the sliders.
        page.tell("const s = document.getElementById('onset'); s.value = 2; s.dispatchEvent(new Event('input'))")
        assert page.tell("!document.getElementById('stale').hidden")
        page.tell("document.getElementById('predict').click()")
        page.wait(f"document.getElementById('result-title').textContent.includes('frames {numbers[2]} to')")
        # What is no clip gets a sentence, and the page goes on.
        page.choose("#files", [tmp_path / "notes.txt"])
        page.wait("document.getElementById('error').textContent.startsWith('notes.txt: cannot be read as a video')")
        page.choose("#files", [tmp_path / "long.avi"])
        page.wait("document.getElementById('error').textContent.startsWith('6.0 MB; allowed: 5.0 MB')")
        refused = [said for said in page.complaints if "422" not in said]
        assert refused == [], "nothing was blocked, nothing failed"


@pytest.mark.parametrize("kind", ["fold", "release"])
def test_the_command_serves_until_it_is_interrupted(checkpoint, kind, monkeypatch, tmp_path, tmp_path_factory, capsys):
    model = checkpoint.parents[1]
    if kind == "release":
        model = tmp_path_factory.mktemp("released") / "release"
        export(checkpoint, model, format="adapter", device="cpu")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    addresses = []

    def serve(self: PageServer) -> None:
        addresses.append(self.address)
        assert list(tmp_path.iterdir()), "clips have a folder"
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    monkeypatch.setattr(PageServer, "serve_forever", serve)
    before = signal.getsignal(signal.SIGTERM)
    reset()
    try:
        assert main(["app", str(model)]) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    told = capsys.readouterr()
    assert told.out.splitlines() == addresses
    assert told.err.splitlines()[-1] == "Stopped; the clips are removed"
    assert not list(tmp_path.iterdir())
