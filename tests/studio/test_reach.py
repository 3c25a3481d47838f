"""The studio asks servers with TLS and with an API key, and says what to do where they cannot be asked."""

import http.client
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.studio.streams import DEADLINE_S, playing
from vllm_dllm.errors import ConfigError
from vllm_dllm.studio.record import Question, record
from vllm_dllm.studio.serve import page_server

QUESTION = Question("a")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of a key and of a certificate that it signed itself, for 127.0.0.1."""
    path = tmp_path_factory.mktemp("tls") / "own.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=studio"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", f"{path}.cert"]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.cert").read_text())
    return path


@contextmanager
def page_of(server: str) -> Iterator[int]:
    """Yield the port of a page that shows a server."""
    page = page_server(server, "127.0.0.1", 0)
    thread = threading.Thread(target=page.serve_forever)
    thread.start()
    try:
        yield page.server_port
    finally:
        page.shutdown()
        thread.join()
        page.server_close()


def models(server: str, key: str | None = None) -> tuple[int, str]:
    """What the page is told of a server's models."""
    with page_of(server) as port:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        client.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"} if key else {})
        reply = client.getresponse()
        said = reply.read().decode()
        client.close()
    return reply.status, said


def refused(server: str, key: str | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        record(server, QUESTION, key)
    return str(error.value)


def test_a_server_with_tls_whose_certificate_is_trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with playing(certificate=certificate, api_key="k") as (server, bodies):
        assert server.startswith("https://")
        assert models(server, "k") == (200, '{"data": [{"id": "tiny"}]}')
        assert len(record(server, QUESTION, "k")["runs"]) == len(bodies) == 2


def test_what_keeps_from_a_server_with_tls_is_said(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with playing(certificate=certificate) as (server, _), playing() as (bare, _):
        plain, other = server.replace("https", "http"), bare.replace("http", "https")
        cases = {
            server: "has a certificate that is not trusted here (self-signed certificate); set SSL_CERT_FILE to",
            other: "does not speak TLS (WRONG_VERSION_NUMBER); name it by --server with http://",
            plain: "name another one by --server, with https:// where it has TLS",
        }
        for address, said in cases.items():
            status, text = models(address)
            message = json.loads(text)["error"]["message"]
            assert (status, said in message, said in refused(address)) == (502, True, True), message
            assert message.startswith(address)


def test_an_api_key_is_asked_for() -> None:
    with playing(api_key="k") as (server, bodies):
        for wrong in (None, "other"):
            assert models(server, wrong)[0] == 401
            assert "answered 401" in (said := refused(server, wrong))
            assert "set OPENAI_API_KEY" in said
        assert models(server, "k")[0] == 200
        assert bodies == []
