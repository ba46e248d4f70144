"""Serves the page and its requests on the loopback interface, to whoever has the address with its token.

Three things keep other pages of the user's browser, and other users of the machine, out: the socket is bound to
127.0.0.1, `Host` and `Origin` must name the loopback interface (no DNS rebinding), and every path begins with a random
token that is shown to the user alone.
"""

import hmac
import json
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import torch

from aullm_dist.app.answers import Answer, PageAnswerer
from aullm_dist.app.page import content_policy, render_page
from aullm_dist.app.refusals import Refused
from aullm_dist.app.uploads import Uploads
from aullm_dist.errors import UserError, system_error
from aullm_dist.log import get_logger

__all__ = ["PageServer", "open_server"]

logger = get_logger(__name__)

LOOPBACK = "127.0.0.1"
_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_MOST_JSON = 1 << 16
"""Bytes of a request that is no file."""
_SILENCE_SECONDS = 60
"""After which a connection that says nothing is closed."""


@dataclass(frozen=True, slots=True)
class _Reply:
    """What is sent back: content, its type, and the name of the file that the browser makes of it."""

    content: bytes
    kind: str = "application/json"
    save_as: str | None = None
    status: HTTPStatus = HTTPStatus.OK
    policy: str = "default-src 'none'"


class PageServer(ThreadingHTTPServer):
    """The page of one model, with the clips that it was given.

    Args:
        port: to listen at; 0 takes a free one.
        answerer: the model.
        uploads: where clips are stored.
        model: what the page says of the model, label by label.
        caveats: what it says above everything else, as sentences without a full stop.

    Raises:
        UserError: the port is taken or not allowed.
    """

    daemon_threads = True

    def __init__(
        self,
        port: int,
        answerer: PageAnswerer,
        uploads: Uploads,
        model: Mapping[str, str],
        caveats: Sequence[str],
    ) -> None:
        self.answerer, self.uploads, self.model, self.caveats = answerer, uploads, model, caveats
        self.token = secrets.token_urlsafe(16)
        self.answers: dict[str, Answer] = {}
        """The latest answer to each clip, for the downloads."""
        super().__init__((LOOPBACK, port), _Handler)

    def keep(self, key: str, answer: Answer) -> None:
        """Keep the latest answer to a clip, and those to clips that are still here."""
        known = self.uploads.keys()
        self.answers = {key: kept for key, kept in [*self.answers.items(), (key, answer)] if key in known}

    @property
    def address(self) -> str:
        """Return the address of the page, with its token."""
        return f"http://{LOOPBACK}:{self.server_port}/{self.token}/"


def open_server(
    port: int, answerer: PageAnswerer, uploads: Uploads, model: Mapping[str, str], caveats: Sequence[str] = ()
) -> PageServer:
    """Return a server that listens, as `PageServer` describes it.

    Raises:
        UserError: the port is taken or not allowed.
    """
    try:
        return PageServer(port, answerer, uploads, model, caveats)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; allowed: a free port, or 0 for any") from error


class _Handler(BaseHTTPRequestHandler):
    """Answers one connection; see the module for who may ask."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    timeout = _SILENCE_SECONDS
    _unread = 0
    """Bytes of the request's body that were not read yet."""

    def do_GET(self) -> None:
        """Answer with the page, a frame, or a file to keep."""
        self._reply(
            {"": self._page, "frames": self._frame, "picture.png": self._picture, "prediction.json": self._json}
        )

    def do_POST(self) -> None:
        """Begin a clip, read it, or answer it."""
        self._reply({"clips": self._begin, "read": self._read, "answer": self._answer})

    def do_PUT(self) -> None:
        """Store one file of a clip."""
        self._reply({"files": self._store})

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the signature of http.server
        """Leave requests unsaid: an address with its token belongs into no log."""

    def version_string(self) -> str:
        """Return what the server calls itself."""
        return "aullm-dist"

    def _reply(self, routes: Mapping[str, Callable[..., _Reply]]) -> None:
        try:
            self._unread = self._length()
            reply = self._route(routes)
        except Refused as error:
            reply = _refusal(error, error.status)
        except UserError as error:
            reply = _refusal(error, HTTPStatus.UNPROCESSABLE_ENTITY)
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # whoever asked has gone
            return
        except OSError as error:
            logger.warning("%s", refused := system_error(error, "is the disk of temporary files full?"))
            reply = _refusal(refused, HTTPStatus.INSUFFICIENT_STORAGE)
        except (MemoryError, torch.OutOfMemoryError):
            refused = UserError("not enough memory for this clip; free some, or give fewer or smaller frames")
            reply = _refusal(refused, HTTPStatus.INSUFFICIENT_STORAGE)
        try:
            self._send(reply)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _route(self, routes: Mapping[str, Callable[..., _Reply]]) -> _Reply:
        """Check who asks, and call what `[clips, ID,] NAME [, ARGUMENT]` behind the token names."""
        self._check_sender()
        _, token, *parts = [unquote(part) for part in urlsplit(self.path).path.split("/")]
        if not hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self.server.token.encode()):
            raise Refused("open the whole address that aullm-dist app shows in the terminal", HTTPStatus.FORBIDDEN)
        match parts:
            case [name] if name in routes and name in ("", "clips"):
                return routes[name]()
            case ["clips", key, name, *arguments] if name in routes and len(arguments) == (name in ("files", "frames")):
                return routes[name](key, *arguments)
        raise Refused("there is nothing at this address", HTTPStatus.NOT_FOUND)

    def _check_sender(self) -> None:
        """Refuse pages of other servers, which the user's browser may show as well."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        # Any port of the loopback interface: an SSH tunnel may have another one at its other end.
        if name not in _HOSTS or origin not in (None, f"http://{host}"):
            raise Refused("only this machine's own page is answered, at 127.0.0.1", HTTPStatus.FORBIDDEN)

    def _length(self) -> int:
        given = self.headers.get("Content-Length", "0" if self.command == "GET" else "")
        if self.headers.get("Transfer-Encoding") or not (given.isascii() and given.isdigit()):
            self.close_connection = True
            raise Refused("a request needs its Content-Length", HTTPStatus.LENGTH_REQUIRED)
        return int(given)

    def _fields(self, **kinds: type) -> list[Any]:
        """Return the fields of a JSON object, in the order of `kinds`."""
        if self._unread > _MOST_JSON:
            raise Refused("this request is too long", HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        content = self.rfile.read(self._unread)
        self._unread = 0
        try:
            given = json.loads(content)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict) or any(type(given.get(name)) is not kind for name, kind in kinds.items()):
            wanted = ", ".join(f"{name} ({kind.__name__})" for name, kind in kinds.items())
            raise Refused(f"a request of this kind is a JSON object with {wanted}", HTTPStatus.BAD_REQUEST)
        return [given[name] for name in kinds]

    def _page(self) -> _Reply:
        nonce = secrets.token_urlsafe(16)
        setup = {"max_bytes": self.server.uploads.max_bytes}
        page = render_page(self.server.model, self.server.caveats, setup, nonce)
        return _Reply(page.encode(), "text/html; charset=utf-8", policy=content_policy(nonce))

    def _begin(self) -> _Reply:
        (name,) = self._fields(name=str)
        return _of_json({"id": self.server.uploads.add(name)})

    def _store(self, key: str, name: str) -> _Reply:
        length = self._unread
        self.server.uploads.check_size(length)
        self.server.uploads.store(key, name, self.rfile, length)
        self._unread = 0
        return _of_json({})

    def _read(self, key: str) -> _Reply:
        upload = self.server.uploads.get(key)
        try:
            notes = upload.read()
        except UserError as error:
            raise UserError(upload.in_words(error)) from error
        return _of_json({"name": upload.name, "numbers": upload.numbers, "notes": notes})

    def _frame(self, key: str, number: str) -> _Reply:
        upload = self.server.uploads.get(key)
        if not (number.isascii() and number.isdigit()) or int(number) not in upload.numbers:
            raise Refused(f"the clip has no frame {number}", HTTPStatus.NOT_FOUND)
        return _Reply(upload.frame(int(number)).read_bytes(), "image/jpeg")

    def _answer(self, key: str) -> _Reply:
        upload = self.server.uploads.get(key)
        onset, offset = self._fields(onset=int, offset=int)
        if not upload.numbers:
            raise Refused("this clip was not read yet", HTTPStatus.CONFLICT)
        try:
            answer = self.server.answerer.answer(upload, onset, offset)
        except UserError as error:
            raise UserError(upload.in_words(error)) from error
        self.server.keep(key, answer)
        return _of_json(answer.shown)

    def _picture(self, key: str) -> _Reply:
        answer, name = self._answered(key)
        return _Reply(self.server.answerer.draw(answer), "image/png", f"{name}.png")

    def _json(self, key: str) -> _Reply:
        answer, name = self._answered(key)
        return _Reply(answer.json.encode(), save_as=f"{name}.json")

    def _answered(self, key: str) -> tuple[Answer, str]:
        upload = self.server.uploads.get(key)
        if key not in self.server.answers:
            raise Refused("this clip was not answered yet", HTTPStatus.CONFLICT)
        return self.server.answers[key], upload.name

    def _send(self, reply: _Reply) -> None:
        if self._unread:
            self.close_connection = True
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.kind)
        self.send_header("Content-Length", str(len(reply.content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", reply.policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        if self.close_connection:
            self.send_header("Connection", "close")
        if reply.save_as is not None:
            self.send_header("Content-Disposition", f"attachment; filename*=UTF-8''{quote(reply.save_as, safe='')}")
        self.end_headers()
        self.wfile.write(reply.content)
        self._drain()

    def _drain(self) -> None:
        """Read what a refused request still sends: a socket that is closed before that loses the refusal."""
        self._unread = min(self._unread, 2 * self.server.uploads.max_bytes)
        while self._unread and (chunk := self.rfile.read(min(self._unread, 1 << 20))):
            self._unread -= len(chunk)


def _of_json(content: Mapping[str, Any]) -> _Reply:
    return _Reply(json.dumps(content, allow_nan=False).encode())


def _refusal(error: UserError, status: HTTPStatus) -> _Reply:
    return _Reply(f"{error}\n".encode("utf-8", "backslashreplace"), "text/plain; charset=utf-8", status=status)
