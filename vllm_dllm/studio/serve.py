"""Serve the page, and hand its requests on to the server that it shows.

A page of another origin may not ask a `vllm serve` that was not started with `--allowed-origins`. So the page asks who
served it, which hands three endpoints on and nothing else, each piece of a stream as it comes.
"""

import json
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from urllib.parse import urlsplit

from vllm_dllm.errors import ConfigError
from vllm_dllm.studio.page import live_page, policy
from vllm_dllm.studio.record import TIMEOUT_S, no_answer

_ASKED = {("GET", "/v1/models"), ("POST", "/v1/chat/completions"), ("POST", "/v1/completions")}
_HANDED_ON = ("Content-Type", "Authorization")
_PIECE = 1 << 16
_MOST_BYTES = 1 << 20
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
        host, port: of the page, which answers to this name, to localhost and to addresses.

    Raises: OSError where they are taken.
    """
    page = live_page(origin).encode()

    class Handler(_Handler):
        shown = origin
        body = page
        bound = host

    return ThreadingHTTPServer((host, port), Handler)


def _is_address(host: str, bound: str) -> bool:
    """Tell whether a Host header is an IP address, localhost or the name that the page is bound to."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name in {"localhost", bound.lower()} or bool(ip_address(name))
    except ValueError:
        return False


class _Handler(BaseHTTPRequestHandler):
    """Answers `/`, and what is handed on."""

    shown: str  # origin of the server
    body: bytes  # the page
    bound: str  # host of the page
    timeout = 60  # seconds without a byte taken from, or by, who asks

    def handle(self) -> None:
        """Answer one request; who asks may go away, or fall silent, at any time."""
        with suppress(OSError):
            super().handle()

    def do_GET(self) -> None:
        """Send the page, or what the server says."""
        if not self._may_ask():
            return
        if self._path == "/":
            self._send(200, "text/html; charset=utf-8", self.body)
        else:
            self._hand_on(None)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Hand a request on."""
        if not self._may_ask():
            return
        length = self.headers.get("Content-Length", "")[:20]
        if not length.isdecimal() or int(length) > _MOST_BYTES:
            self._fail(413, f"the request's Content-Length is {length!r}; allowed are whole numbers to {_MOST_BYTES}")
        else:
            self._hand_on(self.rfile.read(int(length)))

    def _may_ask(self) -> bool:
        """Tell whether the page itself asks, and refuse others.

        A page of another origin could send a request that it may not read the answer of: browsers say where it came
        from. One whose name was made to point here meanwhile has our origin by that name (DNS rebinding).
        """
        host, came_from = self.headers.get("Host", ""), self.headers.get("Origin")
        if not _is_address(host, self.bound):
            self._fail(
                403,
                f"the request's Host is {host!r}; allowed are IP addresses, localhost and the name given as --host; "
                "open the page by one of these",
            )
        elif came_from is not None and came_from.partition("://")[2] != host:
            self._fail(403, f"the request comes from a page of {came_from}; only the studio's own page may ask")
        else:
            return True
        return False

    @property
    def _path(self) -> str:
        return self.path.partition("?")[0]

    def _hand_on(self, body: bytes | None) -> None:
        if (self.command, self._path) not in _ASKED:
            asked = ", ".join(sorted(path for _, path in _ASKED))
            self._fail(404, f"there is no {self.command} {self._path} here; there are / and {asked}")
            return
        headers = {name: self.headers[name] for name in _HANDED_ON if name in self.headers}
        parts = urlsplit(self.shown)
        connect = HTTPSConnection if parts.scheme == "https" else HTTPConnection
        with closing(connect(parts.netloc, timeout=TIMEOUT_S[self.command])) as server:
            try:
                server.request(self.command, self._path, body, headers)
                reply = server.getresponse()
            except (OSError, HTTPException) as error:
                self._fail(502, no_answer(self.shown, error))
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
