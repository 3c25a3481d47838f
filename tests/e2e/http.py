"""Servers that are started as a user starts them, and requests to them."""

import contextlib
import itertools
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import openai
import psutil

from tests.e2e.rig import CHECKPOINT, MAX_MODEL_LEN, Case

MODEL = "tiny"
DEADLINE_S = 240


@contextlib.contextmanager
def kept_port() -> Iterator[int]:
    """A port that nobody else is given, neither before its server is up nor by the system for a connection.

    vLLM binds it some seconds after it was named, which beside a socket that does not listen it may.
    """
    with socket.socket() as kept:
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield kept.getsockname()[1]


@contextlib.contextmanager
def server(
    log: Path, settings: dict[str, Any], *arguments: str, checkpoint: Path = CHECKPOINT, **variables: str
) -> Iterator[openai.OpenAI]:
    """A client of `vllm serve`, with no variable of ours or vLLM's set but those given."""
    # As many threads as vLLM takes by itself; how they wait stays as it is, since other tests run beside the server.
    ours = ("VLLM_", "TRITON_", "OMP_NUM_")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ours)} | variables
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(checkpoint), "--served-model-name", MODEL, "--host", "127.0.0.1"),
        *("--dtype", "float32", "--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--additional-config", json.dumps({"dllm": settings})),
        *arguments,
    ]
    with kept_port() as port, log.open("w") as stream:
        command += ["--port", str(port)]
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        yield from _client_of(process, port, log)


def _client_of(process: "subprocess.Popen[bytes]", port: int, log: Path) -> Iterator[openai.OpenAI]:
    """Wait until a server answers; yield its client, and end it."""
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(openai.APIConnectionError):
                client.models.list()
                break
            time.sleep(0.5)
        yield client
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()  # one that hangs fails the test and stays no longer


def complete(client: openai.OpenAI, case: Case, **changes: Any) -> Any:
    extra: dict[str, Any] = {
        "top_k": case.top_k,
        "ignore_eos": True,
        "return_token_ids": True,
        "vllm_xargs": case.sampling_params().extra_args,
    }
    extra |= changes.pop("extra_body", {})
    values = {
        "model": MODEL,
        "prompt": list(case.prompt),
        "max_tokens": case.max_tokens,
        "temperature": case.temperature,
        "top_p": case.top_p,
        "seed": case.seed,
        "extra_body": extra,
    }
    return client.completions.create(**(values | changes))


def assert_streamed(client: openai.OpenAI, case: Case, blocks: Sequence[list[int]]) -> None:
    """Assert that a reply comes in these blocks, some of them together: vLLM joins what a busy server sends late."""
    chunks = [chunk.choices[0].token_ids for chunk in complete(client, case, stream=True) if chunk.choices]
    chunks = [chunk for chunk in chunks if chunk]
    assert list(itertools.chain(*chunks)) == list(itertools.chain(*blocks))
    ends = {*itertools.accumulate(map(len, blocks))}
    assert {*itertools.accumulate(map(len, chunks))} <= ends, "a block arrives whole"
    assert len(chunks) > 1


def cache_counts(client: openai.OpenAI) -> tuple[float, float]:
    """Read vLLM's metrics of its prefix cache: positions that were looked up, and those that were found."""
    text = client._client.get(str(client.base_url).replace("/v1/", "/metrics")).text
    found = [
        re.findall(rf"^vllm:prefix_cache_{name}_total\{{.*\}} (\S+)$", text, re.MULTILINE)
        for name in ("queries", "hits")
    ]
    return sum(map(float, found[0])), sum(map(float, found[1]))


def counted(client: openai.OpenAI, before: tuple[float, float], is_enough: Callable[[float], bool]) -> list[float]:
    """Return what was counted since; the server exports its counters a moment after its replies."""
    deadline = time.monotonic() + 10
    while True:
        since = [now - then for now, then in zip(cache_counts(client), before, strict=True)]
        if is_enough(since[0]) or time.monotonic() > deadline:
            return since
        time.sleep(0.1)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def assert_all_end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=DEADLINE_S / 2)
    names = [each.name() for each in alive]
    for each in alive:
        each.kill()  # so that clients which wait for it, and the test, end
    assert not alive, names


NOT_OURS_TO_CAUSE = (
    "custom scheduler class",
    "Inductor compilation was disabled",
    "Default vLLM sampling parameters",
    "generation flags are not valid",
)
"""What vLLM says of settings that this plugin made, as if the user had."""


def lines_we_cause(log: Path, *more: str) -> list[str]:
    """Lines of a server's log that speak of what this plugin set; `more` are further ones that there should not be."""
    return [line for line in log.read_text().splitlines() if any(part in line for part in (*NOT_OURS_TO_CAUSE, *more))]
