"""Serve the page, and hand its requests on to the server that it shows.

A page of another origin may not ask a `vllm serve` that was not started with `--allowed-origins`. So the page asks who
served it, which hands three endpoints on and nothing else, each piece of a stream as it comes.
"""

import json
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from vllm_dllm.errors import ConfigError
from vllm_dllm.studio.page import live_page, policy

_ASKED = {("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions")}
_HANDED_ON = ("Content-Type", "Authorization")
_TIMEOUT_S = 600
_PIECE = 1 << 16
_MOST_BYTES = 1 << 24
"""Of a request's body."""


def origin_of(server: str) -> str:
    """Return a server's scheme, host and port. Raises: ConfigError where it is no address of one."""
    parts = urlsplit(server)
    try:
        is_known = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none
        is_known = False
    is_plain = not (parts.username or parts.query or parts.fragment) and parts.path.rstrip("/") in {"", "/v1"}
    if not is_known or not is_plain or set(parts.netloc) & set(" ;,'\"<"):
        raise ConfigError(
            f"--server is {server!r}; allowed are addresses as http://127.0.0.1:8000, what `vllm serve` prints at start"
        )
    return f"{parts.scheme}://{parts.netloc}"


def page_server(origin: str, host: str, port: int) -> ThreadingHTTPServer:
    """Bind a server of the page; `serve_forever` runs it.

    Args:
        origin: of the server that it shows.
        host, port: of the page. Raises: OSError where they are taken.
    """
    page = live_page(origin).encode()

    class Handler(_Handler):
        shown = origin
        body = page

    return ThreadingHTTPServer((host, port), Handler)


class _Handler(BaseHTTPRequestHandler):
    """Answers `/`, and what is handed on."""

    shown: str  # origin of the server
    body: bytes  # the page

    def do_GET(self) -> None:
        """Send the page, or what the server says."""
        if self._path == "/":
            self._send(200, "text/html; charset=utf-8", self.body)
        else:
            self._hand_on(None)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Hand a request on, if the page sent it.

        A page of another origin could send one that it may not read the answer of: browsers say where it came from.
        """
        came_from, length = self.headers.get("Origin"), self.headers.get("Content-Length", "")
        if came_from is not None and urlsplit(came_from).netloc != self.headers.get("Host"):
            self._fail(403, f"the request comes from a page of {came_from}; only the studio's own page may ask")
        elif not length.isdecimal() or int(length) > _MOST_BYTES:
            self._fail(413, f"the request's Content-Length is {length!r}; allowed are whole numbers to {_MOST_BYTES}")
        else:
            self._hand_on(self.rfile.read(int(length)))

    @property
    def _path(self) -> str:
        return urlsplit(self.path).path

    def _hand_on(self, body: bytes | None) -> None:
        if (self.command, self._path) not in _ASKED:
            asked = ", ".join(sorted(path for _, path in _ASKED))
            self._fail(404, f"there is no {self.command} {self._path} here; there are / and {asked}")
            return
        headers = {name: self.headers[name] for name in _HANDED_ON if name in self.headers}
        parts = urlsplit(self.shown)
        connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        with closing(connect(parts.netloc, timeout=_TIMEOUT_S)) as server:
            try:
                server.request(self.command, self._path, body, headers)
                reply = server.getresponse()
            except (OSError, HTTPException) as error:
                self._fail(502, f"{self.shown} does not answer ({error}); start it, or name another one by --server")
                return
            self._relay(reply)

    def _relay(self, reply: HTTPResponse) -> None:
        """Send a reply on, piece by piece; where either side ends it, both are closed, and vLLM aborts the request."""
        with suppress(OSError, HTTPException):
            self._begin(reply.status, reply.headers.get("Content-Type", "text/plain"))
            while piece := reply.read1(_PIECE):
                self.wfile.write(piece)

    def _fail(self, status: int, message: str) -> None:
        self._send(status, "application/json", json.dumps({"error": {"message": message}}).encode())

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self._begin(status, kind, len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def _begin(self, status: int, kind: str, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Content-Security-Policy", f"{policy(is_live=True)}; frame-ancestors 'none'")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""
