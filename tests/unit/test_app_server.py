"""The server behind `aullm-dist app`: who is answered, what is taken, and how the rest is refused; without a model."""

import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from aullm_dist.app.answers import Answer, PageAnswerer, _ladder
from aullm_dist.app.server import PageServer, open_server
from aullm_dist.app.uploads import Upload, Uploads
from aullm_dist.cli import main
from aullm_dist.errors import UserError
from aullm_dist.model.aullm import Explanation

MAX_BYTES = 1 << 20
WHOLE = [0, 1, 2, 3]


class Model:
    """Stands for `PageAnswerer`: answers with what it was asked, and fails as it is told."""

    fault: BaseException | None = None

    def answer(self, upload: Any, onset: int, offset: int) -> Answer:
        if self.fault:
            raise self.fault
        if onset >= offset:
            raise UserError(f"{upload.path}: onset {onset}, offset {offset}")
        picture: Any = SimpleNamespace(clip=upload.name)
        return Answer(f'{{"clip": "{upload.name}"}}\n', picture, {"frames": [onset, offset]})

    def draw(self, answer: Answer) -> bytes:
        return answer.picture.clip.encode()


@pytest.fixture
def server(tmp_path) -> Iterator[PageServer]:
    model: Any = Model()
    with open_server(0, model, Uploads(tmp_path / "uploads", MAX_BYTES), {"Model": "<run>"}) as served:
        thread = threading.Thread(target=served.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield served
        served.shutdown()
        thread.join()


def ask(
    server: PageServer, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request(method, path if path.startswith("/") else f"/{server.token}/{path}", body, headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, content, reply.headers


def refusal(server: PageServer, *request: Any, **headers: str) -> tuple[int, str]:
    status, content, kept = ask(server, *request, **headers)
    assert status >= 400
    assert kept["Content-Type"] == "text/plain; charset=utf-8"
    assert content.count(b"\n") == 1, "one line"
    return status, content.decode().strip()


def jpeg(level: int = 90) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((48, 64), level, np.uint8)).save(buffer, format="jpeg")
    return buffer.getvalue()


def begin(server: PageServer, name: str = "clip") -> str:
    status, content, _ = ask(server, "POST", "clips", json.dumps({"name": name}).encode())
    assert status == 200, content
    return json.loads(content)["id"]


def upload(server: PageServer, files: dict[str, bytes], name: str = "clip") -> str:
    key = begin(server, name)
    for file, content in files.items():
        status, told, _ = ask(server, "PUT", f"clips/{key}/files/{file}", content)
        assert status == 200, told
    return key


def frames(count: int = 4) -> dict[str, bytes]:
    return {f"img{number}.jpg": jpeg(60 + 20 * number) for number in range(count)}


def test_what_limits_the_model_stands_above_everything_else(server):
    assert b'class="caveats"' not in ask(server, "GET", "")[1]
    server.caveats = ("drawn <faces>", "random")
    page = ask(server, "GET", "")[1].decode()
    assert "<p>Drawn &lt;faces&gt;.</p>\n<p>Random.</p>" in page
    assert page.index('class="caveats" role="note"') < page.index("&lt;run&gt;") < page.index("<main>")


def test_the_page_asks_nobody_else(server):
    status, content, headers = ask(server, "GET", "")
    page = content.decode()
    assert status == 200
    assert server.server_address[0] == "127.0.0.1"
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;run&gt;" in page
    policy = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
    assert (policy["default-src"], policy["connect-src"]) == ("'none'", "'self'")
    assert page.count(f'nonce="{policy["script-src"][7:-1]}"') == 2
    assert headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/", {}, 403),
        ("/wrong/", {}, 403),
        ("/%ff/clips", {}, 403),
        ("", {"Host": "attacker.example"}, 403),
        ("", {"Host": "127.0.0.1.attacker.example:80"}, 403),
        ("", {"Origin": "http://attacker.example"}, 403),
        ("", {"Origin": "null"}, 403),
        ("nothing", {}, 404),
        ("clips/none/frames/0", {}, 404),
        ("", {"Host": "localhost:9999"}, 200),
        ("", {"Host": "localhost:9999", "Origin": "http://localhost:9999"}, 200),
    ],
)
def test_only_its_own_page_with_the_token_is_answered(server, path, headers, status):
    assert ask(server, "GET", path, **headers)[0] == status


def test_other_pages_cannot_send_clips(server):
    """A form of another page is sent without a preflight: the token and `Origin` keep it out."""
    for headers in ({"Origin": "http://127.0.0.1:1"}, {"Host": "attacker.example"}):
        status, _ = refusal(server, "POST", "clips", b'{"name": "clip"}', **headers)
        assert status == 403
    assert refusal(server, "POST", "/guess/clips", b'{"name": "clip"}')[0] == 403
    assert not server.uploads.keys()


def test_frames_are_read_shown_and_answered(server):
    key = upload(server, frames(), "EP01")
    assert refusal(server, "POST", f"clips/{key}/answer", b'{"onset": 0, "offset": 3}')[0] == 409
    status, content, _ = ask(server, "POST", f"clips/{key}/read", b"")
    assert status == 200, content
    assert json.loads(content) == {"name": "EP01", "numbers": WHOLE, "notes": []}
    _, picture, headers = ask(server, "GET", f"clips/{key}/frames/2")
    assert headers["Content-Type"] == "image/jpeg"
    assert np.asarray(Image.open(io.BytesIO(picture))).mean() == pytest.approx(100, abs=2)
    assert refusal(server, "GET", f"clips/{key}/frames/9")[0] == 404
    assert refusal(server, "GET", f"clips/{key}/picture.png")[0] == 409
    _, content, _ = ask(server, "POST", f"clips/{key}/answer", b'{"onset": 1, "offset": 3}')
    assert json.loads(content) == {"frames": [1, 3]}
    _, content, headers = ask(server, "GET", f"clips/{key}/prediction.json")
    assert json.loads(content) == {"clip": "EP01"}
    assert headers["Content-Disposition"] == "attachment; filename*=UTF-8''EP01.json"
    assert ask(server, "GET", f"clips/{key}/picture.png")[1] == b"EP01"


def test_a_video_is_read(server, tmp_path):
    file = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter_fourcc(*"FFV1"), 30, (64, 48))
    for number in WHOLE:
        writer.write(np.full((48, 64, 3), 40 * number, np.uint8))
    writer.release()
    content = file.read_bytes()
    key = upload(server, {"clip.avi": content}, "clip.avi")
    assert json.loads(ask(server, "POST", f"clips/{key}/read", b"")[1])["numbers"] == WHOLE
    key = upload(server, {"clip.avi": content[: len(content) // 2]}, "clip.avi")
    status, said = refusal(server, "POST", f"clips/{key}/read", b"")
    assert (status, said[:9]) == (422, "clip.avi:")
    assert str(tmp_path) not in said


@pytest.mark.parametrize(
    ("files", "part"),
    [
        ({}, "no files"),
        ({"notes.txt": b"what I saw\n"}, "notes.txt: cannot be read as a video"),
        ({"clip.mp4": b""}, "clip.mp4"),
        ({"1.jpg": jpeg()}, "2 or more"),
        ({"a.jpg": jpeg(), "b.jpg": jpeg()}, "no frames in it"),
        ({"1.jpg": jpeg(), "2.jpg": b"\xff\xd8broken"}, "2.jpg: cannot be read as an image"),
        ({"1.tif": b"II*", "2.tif": b"II*"}, "2 .tif"),
    ],
)
def test_what_is_no_clip_gets_a_sentence(server, tmp_path, files, part):
    status, said = refusal(server, "POST", f"clips/{upload(server, files)}/read", b"")
    assert status == 422
    assert part in said
    assert str(tmp_path) not in said, "the user knows no temporary folder"


def test_pictures_that_are_no_frames_are_noted(server):
    key = upload(server, {**frames(), "thumb.jpg": jpeg()})
    (note,) = json.loads(ask(server, "POST", f"clips/{key}/read", b"")[1])["notes"]
    assert "thumb.jpg" in note


def test_a_clip_over_the_limit_is_refused_unread(server, tmp_path):
    key = begin(server)
    status, said = refusal(server, "PUT", f"clips/{key}/files/a.avi", bytes(MAX_BYTES + 1))
    assert (status, said) == (413, "1.0 MB; allowed: 1 MB in all, which --max-mb changes")
    # The files of a clip count together.
    assert ask(server, "PUT", f"clips/{key}/files/1.jpg", bytes(MAX_BYTES - 10))[0] == 200
    assert refusal(server, "PUT", f"clips/{key}/files/2.jpg", bytes(11))[0] == 413
    assert [path.name for path in (tmp_path / "uploads").rglob("*.*")] == ["1.jpg"]
    assert refusal(server, "POST", "clips", b" " * (1 << 17))[0] == 413


def test_a_clip_of_too_many_frames_is_refused(server, monkeypatch):
    monkeypatch.setattr("aullm_dist.app.uploads.MOST_FRAMES", 3)
    status, said = refusal(server, "POST", f"clips/{upload(server, frames())}/read", b"")
    assert (status, said) == (422, "clip: more than 3 frames; allowed: the movement alone")


@pytest.mark.parametrize("name", ["..%2F..%2Fevil.jpg", "..", "%2Fetc%2Fpasswd", "a%00.jpg", "a%0Ab.jpg", "x" * 300])
def test_no_file_leaves_its_folder(server, tmp_path, name):
    status, said = refusal(server, "PUT", f"clips/{begin(server)}/files/{name}", b"x")
    assert status == 400
    assert "file name" in said
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b'{"onset": "0", "offset": 3}', b'{"onset": true, "offset": 3}', b"[" * 60_000, b"\xff"]
)
def test_a_request_of_another_form_is_refused(server, body):
    key = upload(server, frames())
    ask(server, "POST", f"clips/{key}/read", b"")
    assert refusal(server, "POST", f"clips/{key}/answer", body)[0] == 400


def test_a_file_that_is_given_twice_or_late_is_refused(server):
    key = upload(server, frames())
    assert "img0.jpg" in refusal(server, "PUT", f"clips/{key}/files/img0.jpg", jpeg())[1]
    ask(server, "POST", f"clips/{key}/read", b"")
    assert refusal(server, "PUT", f"clips/{key}/files/img9.jpg", jpeg())[0] == 409


def test_what_stops_an_answer_is_told_in_a_sentence(server):
    key = upload(server, frames(), "EP01")
    ask(server, "POST", f"clips/{key}/read", b"")
    whole = ("POST", f"clips/{key}/answer", b'{"onset": 0, "offset": 3}')
    assert refusal(server, *whole[:2], b'{"onset": 3, "offset": 3}') == (422, "EP01: onset 3, offset 3")
    for fault in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        server.answerer.fault = fault
        status, said = refusal(server, *whole)
        assert (status, said[:17]) == (507, "not enough memory")
    server.answerer.fault = OSError(28, "No space left on device")
    status, said = refusal(server, *whole)
    assert status == 507
    assert "No space left" in said
    server.answerer.fault = None
    assert ask(server, *whole)[0] == 200, "the server goes on"


def test_the_ladder_has_the_stages_that_the_model_has():
    predictions: Any = SimpleNamespace(probabilities=np.array([[0.5, 0.9]]))
    logits = torch.zeros(1, 2)
    bare = Explanation(logits, logits)
    assert list(_ladder(predictions, bare)) == ["answer"]
    assert list(_ladder(predictions, bare._replace(evidence_logits=logits))) == ["evidence", "deduction"]
    whole = _ladder(predictions, bare._replace(evidence_logits=logits, structure_logits=logits + np.log(3)))
    assert {stage: values.round(6).tolist() for stage, values in whole.items()} == {
        "evidence": [0.5, 0.5], "structure": [0.75, 0.75], "deduction": [0.5, 0.9]
    }  # fmt: skip


def test_one_clip_is_answered_at_a_time():
    """Requests come in threads of their own; a model on a GPU holds one clip's activations."""
    inside, most = [], []

    def ask_model(options: Any) -> Any:
        inside.append(options)
        most.append(len(inside))
        time.sleep(0.02)
        inside.pop()
        raise UserError("no answer")

    answerer: Any = SimpleNamespace(asked=ask_model)
    model, upload = PageAnswerer(answerer, None), Upload(Path("clip"), "clip")

    def ask_page() -> None:
        with pytest.raises(UserError):
            model.answer(upload, 0, 1)

    threads = [threading.Thread(target=ask_page) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1, 1]


def test_old_clips_make_room_for_new_ones(server, tmp_path):
    first = upload(server, frames())
    ask(server, "POST", f"clips/{first}/read", b"")
    ask(server, "POST", f"clips/{first}/answer", b'{"onset": 0, "offset": 3}')
    others = [upload(server, frames(2)) for _ in range(4)]
    assert refusal(server, "POST", f"clips/{first}/read", b"")[1] == "this clip is no longer here; drop it again"
    assert sorted(path.name for path in (tmp_path / "uploads").iterdir()) == sorted(others)
    ask(server, "POST", f"clips/{others[0]}/read", b"")
    ask(server, "POST", f"clips/{others[0]}/answer", b'{"onset": 0, "offset": 1}')
    assert list(server.answers) == others[:1], "answers go with their clips"


def test_a_taken_port_is_told(server, tmp_path):
    with pytest.raises(UserError, match=f"--port {server.server_port}: .*allowed: a free port"):
        open_server(server.server_port, server.answerer, server.uploads, {})


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["/no/such/run"], "no such folder"),
        (["/tmp", "--port", "70000"], "--port 70000"),
        (["/tmp", "--max-mb", "0"], "--max-mb 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, arguments, part):
    assert main(["app", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


def test_a_clip_stays_in_its_temporary_folder(server, tmp_path):
    key = upload(server, frames(), "EP01")
    ask(server, "POST", f"clips/{key}/read", b"")
    written = {path.relative_to(tmp_path).parts[:2] for path in Path(tmp_path).rglob("*") if path.is_file()}
    assert written == {("uploads", key)}
