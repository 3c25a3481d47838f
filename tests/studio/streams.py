"""Streams as our server sends them, made up by hand, and a server that plays them."""

import json
import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from vllm_dllm.studio.page import VERSION

TOKENS = ["{", '"room"', ": ", "13", ",\n", '"name"', ": ", "<b>emu</b>", "}", "<|endoftext|>"]
"""Of the reply, in blocks of 4; two of the last block are never shown."""
LOGPROBS = [-0.0001, -0.02, -0.1, -0.7, -0.3, -0.002, -0.04, -1.2, -0.0005, -0.01]
BLOCK = 4
DEADLINE_S = 60
"""For what takes milliseconds, so that it is missed by what hangs alone."""


def logprobs(begin: int, end: int) -> dict[str, Any]:
    """Those of a chat's chunk."""
    top = [{"token": "other", "logprob": -3.0}]
    tokens = zip(TOKENS[begin:end], LOGPROBS[begin:end], strict=True)
    return {"content": [{"token": token, "logprob": p, "top_logprobs": top} for token, p in tokens]}


def canvas(start: int, known: set[int], numbers: tuple[int, int, int]) -> dict[str, Any]:
    """A chunk with the canvas of the block at `start`, of which places of the reply are known."""
    places = range(start, min(start + BLOCK, len(TOKENS)))
    nfe, proposed, accepted = numbers
    shown = {
        "index": 0,
        "start": start,
        "token_ids": [place if place in known else None for place in places],
        "logprobs": [LOGPROBS[place] if place in known else None for place in places],
        "tokens": [TOKENS[place] if place in known else None for place in places],
    }
    shown |= {"nfe": nfe, "nfe_refresh": 1, "proposed": proposed, "accepted": accepted}
    return {"id": "a", "object": "o", "created": 1, "model": "m", "choices": [], "dllm_canvas": shown}


def tokens(begin: int, end: int, numbers: tuple[int, int, int] | None = None, exactness: str | None = "exact") -> dict:
    """A chunk with tokens, the last one where there are numbers."""
    text = "".join(TOKENS[begin:end]).replace("<|endoftext|>", "")
    choice = {"index": 0, "delta": {"content": text}, "logprobs": logprobs(begin, end), "finish_reason": None}
    chunk = {"id": "a", "object": "o", "created": 1, "model": "m", "choices": [choice]}
    if numbers is not None:
        nfe, proposed, accepted = numbers
        own = {"exactness": exactness, "nfe": nfe, "nfe_refresh": 1, "proposed": proposed, "accepted": accepted}
        choice["finish_reason"] = "stop"
        chunk["kv_transfer_params"] = {"dllm": own}
    return chunk


ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 10, "total_tokens": 17}}


def drafted(exactness: str | None = "exact") -> list[dict[str, Any]]:
    """A reply with drafts: 6 forwards."""
    return [
        ROLE,
        canvas(0, {0, 2}, (1, 3, 1)),
        tokens(0, 4),
        canvas(4, set(), (2, 6, 2)),
        canvas(4, {5}, (3, 6, 2)),
        canvas(4, {5, 4, 6}, (4, 9, 3)),
        tokens(4, 8),
        canvas(8, set(), (5, 12, 3)),
        tokens(8, 10, (6, 14, 4), exactness),
        USAGE,
    ]


def plain() -> list[dict[str, Any]]:
    """The same without: a position each forward."""
    chunks: list[dict[str, Any]] = [ROLE]
    for place in range(9):
        if place % BLOCK == BLOCK - 1:
            chunks.append(tokens(place - BLOCK + 1, place + 1))
        start = (place + 1) // BLOCK * BLOCK
        chunks.append(canvas(start, set(range(start, place + 1)), (place + 1, 0, 0)))
    return [*chunks, tokens(8, 10, (10, 0, 0)), USAGE]


def events_of(chunks: list[dict[str, Any]], ms: float = 10.0) -> list[list[Any]]:
    """As a recording has them."""
    return [[ms * i, chunk] for i, chunk in enumerate(chunks)]


def recording_of(page: str) -> dict[str, Any]:
    """The recording of a page that was saved."""
    given = re.search(r'<script type="application/json" id="given">([^<]*)</script>', page)
    recording = json.loads(given[1])["recording"]
    assert recording["version"] == VERSION
    return recording


class _Handler(BaseHTTPRequestHandler):
    """Refuses those without its key, as vLLM does."""

    key: str | None

    def parse_request(self) -> bool:
        if not super().parse_request():
            return False
        if self.key is None or self.headers["Authorization"] == f"Bearer {self.key}":
            return True
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.begin(401, "application/json")
        self.wfile.write(b'{"error": "Unauthorized"}')
        return False

    def begin(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def _scheme(server: ThreadingHTTPServer, certificate: Path | None) -> str:
    """Let it speak TLS where there is a certificate."""
    if certificate is None:
        return "http"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    return "https"


@contextmanager
def playing(
    wait: Callable[[], object] = lambda: None,
    exactness: str | None = "exact",
    error: str | None = None,
    is_ours: bool = True,
    most: int = 99,
    api_key: str | None = None,
    certificate: Path | None = None,
) -> Iterator[tuple[str, list]]:
    """Yield the address of a server that plays these streams, and the bodies that it was sent.

    Args:
        wait: is called before each chunk.
        exactness: of its speculation.
        error: what it refuses requests with.
        is_ours: whether its model is one of ours.
        most: chunks, behind which it breaks off.
        api_key: that it asks for.
        certificate: a file of its key and certificate, with which it speaks TLS.
    """
    bodies: list[dict[str, Any]] = []

    class Server(_Handler):
        key = api_key

        def do_GET(self) -> None:
            self.begin(200, "application/json")
            self.wfile.write(json.dumps({"data": [{"id": "tiny"}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append(body)
            if error is not None:
                self.begin(400, "application/json")
                self.wfile.write(json.dumps({"error": {"message": error}}).encode())
                return
            self.begin(200, "text/event-stream")
            own = body["vllm_xargs"]
            chunks = plain() if own.get("dllm_speculation") is False else drafted(exactness)
            for chunk in chunks[:most]:
                if not is_ours:
                    chunk.pop("kv_transfer_params", None)
                    if chunk.pop("dllm_canvas", None):
                        continue
                wait()
                self.wfile.write(f"data: {json.dumps(chunk)}\n\n".encode())
            if len(chunks) <= most:
                self.wfile.write(b"data: [DONE]\n\n")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    scheme = _scheme(server, certificate)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"{scheme}://127.0.0.1:{server.server_port}", bodies
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
