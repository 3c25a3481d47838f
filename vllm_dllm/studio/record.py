"""Record how a server denoises a prompt, with drafts and without: the streams as they came, for the page to show."""

import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http.client import HTTPException, HTTPResponse
from typing import Any

from vllm_dllm.errors import ConfigError
from vllm_dllm.studio.page import VERSION

NAMES = {True: "With drafts", False: "Without drafts"}
_DROPPED = {"id", "object", "created", "model", "system_fingerprint"}
TIMEOUT_S = {"GET": 30, "POST": 600}
"""Without a byte of a server; models are listed at once, a reply may wait for others."""
_MOST_BYTES = 1 << 26
"""Of an answer: some hundred times what a reply of a thousand tokens takes."""
_MOST_SAID = 1 << 16
"""Of a refusal."""


@dataclass(frozen=True, slots=True)
class Question:
    """What to ask.

    Attributes:
        prompt: of the user.
        max_tokens: of the reply.
    """

    prompt: str
    max_tokens: int = 64

    def body(self, model: str, *, drafts: bool) -> dict[str, Any]:
        """Return the request, as the page sends it: greedy, by the server's policy."""
        return {
            "model": model,
            "messages": [{"role": "user", "content": self.prompt}],
            "logprobs": True,
            "top_logprobs": 3,
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "vllm_xargs": {"dllm_stream": "denoising"} | ({} if drafts else {"dllm_speculation": False}),
        }


def record(server: str, question: Question, api_key: str | None = None) -> dict[str, Any]:
    """Ask a server twice, the second time without drafts where it has any; returns the recording.

    Args:
        server: its origin, as `http://127.0.0.1:8000`.
        question: what to ask its first model.
        api_key: of the server, where it wants one.

    Raises: ConfigError where it does not answer, refuses, or serves none of our models.
    """
    with _ask(server, "/v1/models", None, api_key) as reply:
        model = _first_model(server, reply.read(_MOST_BYTES))
    runs = [_run(server, question.body(model, drafts=True), NAMES[True], api_key)]
    if _numbers(server, runs[0])["exactness"] is not None:
        runs.append(_run(server, question.body(model, drafts=False), NAMES[False], api_key))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"version": VERSION, "model": model, "prompt": question.prompt, "created": created, "runs": runs}


def _first_model(server: str, said: bytes) -> str:
    try:
        model: str = json.loads(said)["data"][0]["id"]
    except (ValueError, LookupError, TypeError):
        raise ConfigError(
            f"{server}/v1/models says {said[:80]!r}, which lists no models; name a running `vllm serve` by --server"
        ) from None
    return model


def _numbers(server: str, run: dict[str, Any]) -> dict[str, Any]:
    """Return what the server says that the request took."""
    for _, chunk in reversed(run["events"]):
        if numbers := (chunk.get("kv_transfer_params") or {}).get("dllm"):
            return dict(numbers)
    raise ConfigError(
        f"{server} does not say how it denoised: its model {run['body']['model']!r} is none that vllm-dllm serves; "
        "name another server by --server"
    )


def _run(server: str, body: dict[str, Any], name: str, api_key: str | None) -> dict[str, Any]:
    begin = time.monotonic()
    events: list[tuple[float, dict[str, Any]]] = []
    with _ask(server, "/v1/chat/completions", body, api_key) as reply:
        for chunk in _chunks(server, _lines(server, reply)):
            if "error" in chunk:
                raise ConfigError(f"{server} ended the stream: {chunk['error'].get('message')}; its log says why")
            kept = {key: value for key, value in chunk.items() if key not in _DROPPED}
            events.append((round(1e3 * (time.monotonic() - begin), 1), kept))
    return {"name": name, "body": body, "events": events}


def _lines(server: str, reply: HTTPResponse) -> Iterator[bytes]:
    left = _MOST_BYTES
    while line := reply.readline(left):
        left -= len(line)
        if left == 0:
            raise ConfigError(
                f"{server} answers with more than {_MOST_BYTES} bytes, allowed is so much for a recording; ask for "
                "fewer tokens by --max-tokens, or name another server by --server"
            )
        yield line


def _chunks(server: str, lines: Iterator[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the bodies of a stream of server-sent events, each of which vLLM sends as one line."""
    data = b""
    try:
        for line in filter(bytes.strip, lines):
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    except (OSError, HTTPException, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{server} broke off the stream ({error!r} behind {data[:80]!r}); its log says why") from None
    raise ConfigError(f"{server} broke off the stream behind {data[:80]!r}; its log says why")


@contextmanager
def _ask(server: str, path: str, body: dict[str, Any] | None, api_key: str | None) -> Iterator[HTTPResponse]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S[request.get_method()]) as reply:
            yield reply
    except urllib.error.HTTPError as error:
        said = error.read(_MOST_SAID).decode(errors="replace")
        raise ConfigError(
            f"{server}{path} answered {error.code}: {said}; mend the request, or set OPENAI_API_KEY for a 401"
        ) from None
    except (OSError, HTTPException) as error:
        raise ConfigError(no_answer(server, error)) from None


def no_answer(server: str, error: Exception) -> str:
    """Return why a server cannot be asked, and what to do."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"{server} has a certificate that is not trusted here ({cause.verify_message}); set SSL_CERT_FILE to the "
            "file of the authority's certificate, or of the server's own where it signed itself, and run this again"
        )
    if isinstance(cause, ssl.SSLError):
        return f"{server} does not speak TLS ({cause.reason}); name it by --server with http://, as it was started"
    tls = "" if server.startswith("https") else ", with https:// where it has TLS"
    return f"{server} does not answer ({error}); start it with `vllm serve MODEL`, or name another one by --server{tls}"
