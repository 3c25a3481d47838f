"""The studio's page as it is served and saved: it is all there is, a recording comes back, bad input is told."""

import base64
import hashlib
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.studio.streams import DEADLINE_S, drafted, plain, playing, recording_of
from vllm_dllm.cli import main
from vllm_dllm.errors import ConfigError
from vllm_dllm.policy_options import policy_names
from vllm_dllm.studio import record as recorder
from vllm_dllm.studio import serve
from vllm_dllm.studio.page import live_page, policy, recorded_page
from vllm_dllm.studio.record import Question, _chunks, _first_model, record
from vllm_dllm.studio.serve import origin_of, page_server

SERVER = "http://127.0.0.1:8000"
HOSTILE = "</script><script>alert(1)</script><!-- \u2028 $& é \\u003c"


@contextmanager
def served(origin: str = SERVER, host: str = "127.0.0.1") -> Iterator[http.client.HTTPConnection]:
    page = page_server(origin, host, 0)
    thread = threading.Thread(target=page.serve_forever)
    thread.start()
    try:
        yield http.client.HTTPConnection("127.0.0.1", page.server_port, timeout=DEADLINE_S)
    finally:
        page.shutdown()
        thread.join()
        page.server_close()


def test_the_page_is_served_with_its_type_and_policy() -> None:
    with served() as client:
        for method in ("GET", "HEAD"):
            client.request(method, "/")
            reply = client.getresponse()
            body = reply.read().decode()
            assert (reply.status, reply.headers["Content-Type"]) == (200, "text/html; charset=utf-8")
            assert reply.headers["Content-Security-Policy"] == f"{policy(is_live=True)}; frame-ancestors 'none'"
            assert reply.headers["X-Content-Type-Options"] == "nosniff"
            assert body == (live_page(SERVER) if method == "GET" else "")
            client.close()


def ask(client: http.client.HTTPConnection, method: str, path: str, **headers: str) -> tuple[int, str]:
    client.request(
        method, path, json.dumps(Question("a").body("m", drafts=True)) if method == "POST" else None, headers
    )
    reply = client.getresponse()
    client.close()
    return reply.status, reply.read().decode()


def test_requests_are_handed_on_and_their_streams_come_back() -> None:
    with playing() as (server, bodies), served(server) as client:
        assert ask(client, "GET", "/v1/models") == (200, '{"data": [{"id": "tiny"}]}')
        own = f"http://127.0.0.1:{client.port}"
        status, text = ask(client, "POST", "/v1/chat/completions", Origin=own)
        assert (status, bodies) == (200, [Question("a").body("m", drafts=True)])
        assert text == "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in drafted()) + "data: [DONE]\n\n"
    with playing(error="max_tokens is 0") as (server, _), served(server) as client:
        assert ask(client, "POST", "/v1/completions") == (400, '{"error": {"message": "max_tokens is 0"}}')


def test_a_stream_comes_as_it_is_sent() -> None:
    """Each chunk is sent when the one before has arrived."""
    turns = threading.Semaphore(1)

    def turn() -> None:
        assert turns.acquire(timeout=DEADLINE_S)

    with playing(wait=turn) as (server, _), served(server) as client:
        client.request("POST", "/v1/chat/completions", json.dumps(Question("a").body("m", drafts=True)))
        reply = client.getresponse()
        pieces = []
        while piece := reply.read1():
            pieces.append(piece)
            turns.release()
    assert b"".join(pieces).count(b"data: ") == len(drafted()) + 1


def test_nothing_else_is_handed_on() -> None:
    with playing() as (server, bodies), served(server) as client:
        for method, path in (("GET", "/page.html"), ("GET", "/metrics"), ("POST", "/v1/models"), ("POST", "/sleep")):
            assert ask(client, method, path)[0] == 404
        status, text = ask(client, "POST", "/v1/completions", Origin="http://elsewhere.example")
        assert (status, "a page of http://elsewhere.example; only" in text) == (403, True)
        for length, said in (("1048577", "1048577"), ("9" * 5000, "9" * 20), ("-1", "-1")):
            status, text = ask(client, "POST", "/v1/completions", **{"Content-Length": length})
            assert (status, f"Content-Length is '{said}'; allowed" in text) == (413, True)
        assert bodies == []
    with deaf_server() as server, served(server) as client:
        status, text = ask(client, "GET", "/v1/models")
        assert (status, "does not answer" in text, "--server" in text) == (502, True, True)


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_other_names_are_refused(bound: str) -> None:
    """By DNS rebinding a page of another name has our address, and so `Host` and `Origin` that are alike."""
    asked = [("GET", "/"), ("HEAD", "/"), ("GET", "/v1/models"), ("POST", "/v1/chat/completions")]
    with playing() as (server, bodies), served(server, bound) as client:
        for name in ("elsewhere.example", "localhost.elsewhere.example", "127.0.0.1.elsewhere.example", "", "[::1"):
            host = f"{name}:{client.port}"
            for method, path in asked:
                status, text = ask(client, method, path, Host=host, Origin=f"http://{host}")
                assert status == 403
                assert method == "HEAD" or f"Host is '{host}'; allowed are IP addresses, localhost" in text
        assert bodies == []
        for name in ("127.0.0.1", "192.0.2.1", "localhost", "LOCALHOST", "[::1]"):
            for host in (name, f"{name}:9000"):  # a tunnel has a port of its own
                assert [ask(client, *each, Host=host, Origin=f"http://{host}")[0] for each in asked] == [200] * 4


def test_the_name_that_it_is_bound_to_is_allowed() -> None:
    assert serve._is_address("Box.example:80", "box.Example")
    assert not serve._is_address("other.example", "box.example")


def test_who_falls_silent_is_given_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(recorder.TIMEOUT_S, "GET", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, served(f"http://127.0.0.1:{port_of(silent)}") as client:
        status, text = ask(client, "GET", "/v1/models")
        assert (status, "does not answer (timed out)" in text) == (502, True)
        monkeypatch.setattr(serve._Handler, "timeout", 0.5)  # and no shorter for who asks above
        for begun in (b"", b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"):
            with socket.create_connection(("127.0.0.1", client.port), timeout=DEADLINE_S) as half:
                half.sendall(begun)
                assert half.recv(1) == b""
        with pytest.raises(ConfigError, match=r"does not answer \(.*timed out.*\); start it"):
            record(f"http://127.0.0.1:{port_of(silent)}", Question("a"))
    assert capsys.readouterr() == ("", "")


@contextmanager
def deaf_server() -> Iterator[str]:
    """An address where nobody listens, and nobody else can meanwhile."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{port_of(deaf)}"


def port_of(bound: socket.socket) -> int:
    return bound.getsockname()[1]


def test_the_policy_allows_the_page_and_its_server_alone() -> None:
    page = live_page(SERVER)
    stated = dict(part.split(" ", 1) for part in re.search(r'Policy" content="([^"]*)"', page)[1].split("; "))

    def hashes(pattern: str) -> str:
        digests = (hashlib.sha256(text.encode()).digest() for text in re.findall(pattern, page, re.S))
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    assert stated == {
        "default-src": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "script-src": hashes(r"<script id=[^>]*>(.*?)</script>"),
        "style-src": hashes(r"<style>(.*?)</style>"),
        "connect-src": "'self'",
    }
    assert stated["script-src"].count("sha256") == 2


def test_the_page_loads_nothing_and_puts_text_in_as_text() -> None:
    page = live_page(SERVER)
    assert re.findall(r"<(?:link|img|iframe|object)|\ssrc=|\shref=|@import|url\(|\son\w+=|\sstyle=", page) == []
    assert re.findall(r"innerHTML|insertAdjacentHTML|document\.write|eval\(|outerHTML *=|srcdoc", page) == []


def test_the_page_proposes_the_policies_that_there_are() -> None:
    given = json.loads(re.search(r'id="given">([^<]*)<', live_page(SERVER))[1])
    assert given == {"server": SERVER, "policies": list(policy_names())}


def test_a_recording_comes_back_as_it_was() -> None:
    runs = [{"name": HOSTILE, "body": {"prompt": HOSTILE}, "events": [[0.1, drafted()[1]]]}]
    recording = {"version": 1, "model": "m", "prompt": HOSTILE, "runs": runs}
    page = recorded_page(recording)
    assert recording_of(page) == recording
    assert page.count("<script") == live_page(SERVER).count("<script")
    assert policy(is_live=False) in page
    assert "connect-src" not in policy(is_live=False)


def test_a_server_is_recorded_with_drafts_and_without() -> None:
    with playing() as (server, bodies):
        recording = record(server, Question("a", max_tokens=10))
    assert bodies == [run["body"] for run in recording["runs"]]
    assert [body["vllm_xargs"].get("dllm_speculation") for body in bodies] == [None, False]
    dropped = {"id", "object", "created", "model"}
    for run, chunks in zip(recording["runs"], (drafted(), plain()), strict=True):
        times, kept = zip(*run["events"], strict=True)
        assert list(kept) == [{name: chunk[name] for name in chunk.keys() - dropped} for chunk in chunks]
        assert sorted(times) == list(times)


def test_a_server_without_speculation_is_asked_once() -> None:
    with playing(exactness=None) as (server, bodies):
        assert len(record(server, Question("a"))["runs"]) == len(bodies) == 1


def test_what_a_server_refuses_is_said() -> None:
    with playing(error="max_tokens is 0") as (server, _), pytest.raises(ConfigError, match=r"400.*max_tokens is 0"):
        record(server, Question("a"))
    with (
        deaf_server() as server,
        pytest.raises(ConfigError, match=f"{server} does not answer .*; start it with `vllm serve MODEL`"),
    ):
        record(server, Question("a"))


def test_what_speaks_no_http_is_told() -> None:
    def greet() -> None:
        with listening.accept()[0] as peer:
            peer.sendall(b"SSH-2.0-a\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ConfigError, match=r"does not answer .*SSH-2\.0-a"):
            record(f"http://127.0.0.1:{port_of(listening)}", Question("a"))
        thread.join()


def test_an_answer_that_is_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "_MOST_BYTES", 1000)
    with playing() as (server, _), pytest.raises(ConfigError, match=r"more than 1000 bytes.* fewer tokens by --max"):
        record(server, Question("a"))


def test_a_stream_that_ends_before_its_end_is_told() -> None:
    for lines in ([b'data: {"a": 1}\n', b"\n"], [b"data: {}\n", b"data: {\n"], [b"<html>\n"], []):
        with pytest.raises(ConfigError, match="http://a broke off the stream"):
            list(_chunks("http://a", iter(lines)))
    whole = [b'data: {"a": 1}\n', b"\n", b"data: [DONE]\n"]
    assert list(_chunks("http://a", iter(whole))) == [{"a": 1}]


def test_a_server_of_something_else_is_told() -> None:
    with (
        playing(is_ours=False) as (server, _),
        pytest.raises(ConfigError, match=r"'tiny' is none that vllm-dllm serves"),
    ):
        record(server, Question("a"))
    for said in (b"<html>", b"[]", b'{"data": []}', b'{"data": null}', b"null"):
        with pytest.raises(ConfigError, match=r"which lists no models; name a running `vllm serve`"):
            _first_model("http://a", said)


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://localhost/v1/", "http://localhost"),
        ("https://a.example:443/v1", "https://a.example:443"),
        ("http://[::1]:8000", "http://[::1]:8000"),
    ],
)
def test_a_server_is_its_origin(given: str, origin: str) -> None:
    assert origin_of(given) == origin


@pytest.mark.parametrize(
    "given",
    [
        "",
        "127.0.0.1:8000",
        "ftp://a",
        "http://",
        "http://a:b",
        "http://a:0",
        "http://u:p@a",
        "http://a/x",
        "http://a; *",
        "http://a?b",
    ],
)
def test_what_is_no_server_is_told(given: str) -> None:
    with pytest.raises(ConfigError, match=r"--server is .*; allowed are addresses as"):
        origin_of(given)


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What a command that fails says."""
    result = CliRunner().invoke(main.app, ["studio", *words])
    assert isinstance(result.exception, ConfigError)
    return str(result.exception)


def test_the_command_serves_the_page() -> None:
    # What a shell starts in the background ignores the signal, and so do its children.
    command = ["env", "--default-signal=INT", str(Path(sys.executable).with_name("vllm-dllm"))]
    command += ["studio", "--server", SERVER, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        line = process.stdout.readline()
        found = re.fullmatch(rf"http://127\.0\.0\.1:(\d+) shows {SERVER}; Ctrl\+C ends it\n", line)
        assert found, line
        client = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=DEADLINE_S)
        assert ask(client, "GET", "/") == (200, live_page(SERVER))
        process.send_signal(signal.SIGINT)
        assert (process.communicate(timeout=60)[0], process.returncode) == ("ended\n", 0)


def test_the_command_saves_a_recording(tmp_path: Path) -> None:
    with playing() as (server, _):
        words = ["studio", "--server", server, "--save", str(tmp_path / "a.html"), "--prompt", "a", "--max-tokens", "9"]
        result = CliRunner().invoke(main.app, words)
    assert result.exit_code == 0, result.output
    recording = recording_of((tmp_path / "a.html").read_text())
    assert (recording["prompt"], recording["runs"][0]["body"]["max_tokens"]) == ("a", 9)


def test_wrong_options_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "go together" in run(monkeypatch, "--prompt", "a")
    assert "--save" in run(monkeypatch, "--save", str(tmp_path / "no/a.html"), "--prompt", "a")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = port_of(taken)
        assert f"--host 127.0.0.1 --port {port} (Address already in use)" in run(monkeypatch, "--port", str(port))
