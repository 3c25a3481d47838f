"""The examples are short, and do what they say with the small models of the checkout."""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.http import MODEL, server
from tests.e2e.rig import CHECKPOINT
from vllm_dllm.spiffy_config import parse_spiffy, read_speculative_config

EXAMPLES = Path(__file__).parents[2] / "examples"
QUESTIONS = EXAMPLES / "tiny_llada/questions.jsonl"
SIMPLE = (
    "offline.py",
    "client.py",
    "structured.py",
    "scaffold.py",
    "own_policy/patient_policy.py",
    "calibrate.sh",
    "hex.py",
    "batch.py",
)
TOOK = re.compile(r"^ *\d+ forwards, \d+ of \d+ drafts accepted$", re.MULTILINE)

starts_an_engine = [pytest.mark.engine, pytest.mark.slow("examples"), pytest.mark.xdist_group("server")]


def run(name: str, *arguments: str) -> str:
    example = EXAMPLES / name
    command = [str(example), *arguments] if example.suffix == ".sh" else [sys.executable, str(example), *arguments]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("name", SIMPLE)
def test_an_example_is_short_and_is_on_the_page(name: str) -> None:
    assert len((EXAMPLES / name).read_text().splitlines()) <= 60
    assert f"(../examples/{name})" in (EXAMPLES.parent / "docs/examples.md").read_text()


class TestOfAServer:
    pytestmark = starts_an_engine

    @pytest.fixture(scope="class")
    def address(self, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
        with server(tmp_path_factory.mktemp("server") / "log", {}, "--spec-method", "spiffy") as client:
            yield str(client.base_url).rstrip("/")

    def test_client(self, address: str) -> None:
        said = run("client.py", address, "46 + 27 = ?")
        assert said.startswith("73\n")
        assert TOOK.search(said)

    def test_the_request_by_curl(self, address: str) -> None:
        page = (EXAMPLES.parent / "docs/examples.md").read_text()
        (command,) = re.findall(r"curl http://localhost:8000/v1(\S+) -H '([^:]+): ([^']+)' -d '([^']+)'", page)
        route, header, value, body = command
        data = json.dumps(json.loads(body) | {"model": MODEL}).encode()
        with urllib.request.urlopen(urllib.request.Request(address + route, data, {header: value})) as reply:
            assert json.load(reply)["choices"][0]["message"]["content"] == "73"

    def test_structured(self, address: str) -> None:
        assert run("structured.py", address, "JSON name ida, size 60") == "ida has size 60\n"


class TestOfAnEngine:
    pytestmark = starts_an_engine

    def test_offline(self) -> None:
        said = run("offline.py", str(CHECKPOINT), "46 + 27 = ?", "Sort 4 1 5 7 6", "--kv-cache-gib", "0.125")
        assert re.findall(r"^(?:46|Sort).*\n  (.*)$", said, re.MULTILINE) == ["73", "1 4 5 6 7"]
        assert len(TOOK.findall(said)) == 2

    def test_batch(self, tmp_path: Path) -> None:
        lines = QUESTIONS.read_text().splitlines()[:6]
        (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
        options = ("--kv-cache-memory-bytes", str(64 << 20), "--dtype", "float32", "--max-model-len", "128")
        run("batch.py", str(CHECKPOINT), str(tmp_path / "questions.jsonl"), str(tmp_path / "answers.jsonl"), *options)
        answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        assert answers == [json.loads(line) for line in lines]

    def test_calibrate(self, tmp_path: Path) -> None:
        options = (
            "--samples",
            "6",
            "--gen-length",
            "32",
            "--kv-cache-memory-bytes",
            str(64 << 20),
            "--dtype",
            "float32",
        )
        said = run("calibrate.sh", str(CHECKPOINT), str(QUESTIONS), str(tmp_path / "tiny"), *options)
        assert f"--speculative-config {tmp_path}/tiny.spiffy.json" in said
        config = read_speculative_config(tmp_path / "tiny.spiffy.json")
        assert isinstance(config, dict)
        assert Path(str(parse_spiffy(config).draft_graph)).is_file()
        assert (tmp_path / "tiny.svg").is_file()
