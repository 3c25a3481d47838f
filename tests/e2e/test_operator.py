"""What an operator of vLLM uses daily: each row of the table in docs/operate.md is shown by a test, mostly here."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.e2e import last_words
from tests.e2e.http import DEADLINE_S, MODEL, complete, server, wait_until
from tests.e2e.rig import CHECKPOINT, Case, Oracle
from tests.e2e.wild import make_wild_checkpoint
from tests.test_dashboard import shown
from vllm_dllm.engine.stat_logger import DRAFT_COUNTERS

pytestmark = [pytest.mark.engine, pytest.mark.slow("operator"), pytest.mark.xdist_group("server")]

SETTINGS = {"block_length": 8}
NUM_IDS = 10_240
"""Of the model: `vllm bench latency` draws prompts of ids below 10,000."""
PAGES_THAT_FIT = 3
OTHER = Case(prompt=(5, 6, 7), max_tokens=16)
LONG = Case(prompt=(8, 9, 10, 11), max_tokens=360)
"""Many blocks, so that a request is under way when the next call comes."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("operator") / "checkpoint"
    make_wild_checkpoint(path, vocab_size=NUM_IDS, embedding_size=NUM_IDS)
    return path


@pytest.fixture(scope="module")
def expected(wide: Path) -> Oracle:
    return Oracle(wide, max_model_len=PAGES_THAT_FIT * 128)


@pytest.fixture(scope="module")
def client(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("server") / "log"
    # Of the page size on a CPU, 128 tokens: two times 3 layers of 2 heads of 32 float32, and the page that vLLM keeps.
    num_bytes = (PAGES_THAT_FIT + 1) * 128 * 2 * 3 * 2 * 32 * 4
    more = ("--max-model-len", "auto", "--kv-cache-memory-bytes", str(num_bytes), "--enable-server-load-tracking")
    more += ("--middleware", "tests.e2e.last_words.HealthWhenDead")
    variables = {"VLLM_SERVER_DEV_MODE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    with server(log, SETTINGS, *more, checkpoint=wide, **variables) as client:
        yield client


def call(client: openai.OpenAI, method: str, path: str, **options: Any) -> Any:
    reply = client._client.request(method, str(client.base_url).replace("/v1/", path), **options)
    assert reply.status_code == 200, reply.text
    return reply


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def under_way(client: openai.OpenAI, pool: ThreadPoolExecutor) -> "Future[Any]":
    """Send a request, and wait until it is decoded."""
    reply = pool.submit(complete, client, LONG)
    wait_until(lambda: reply.done() or number(client, "vllm:num_requests_running") == 1)
    assert not reply.done()
    return reply


def number(client: openai.OpenAI, metric: str) -> float:
    text = call(client, "GET", "/metrics").text
    found = re.search(rf"^{metric}{{.*}} (\S+)$", text, re.M)
    assert found, metric
    return float(found[1])


def rows() -> list[tuple[str, str]]:
    """What the table names, and the test that shows it."""
    page = (Path(__file__).parents[2] / "docs/operate.md").read_text()
    table = page.split("| of vLLM | here | shown by |\n")[1].split("\n\n")[0]
    return [(cells[1].strip(), cells[3].strip()) for cells in (line.split("|") for line in table.splitlines()[1:])]


def test_every_row_names_a_test_and_every_test_here_is_named() -> None:
    named = {test for _, test in rows()}
    assert all(re.fullmatch(r"`test_\w+\.py::test_\w+`", test) for test in named)
    here = set(re.findall(r"^def (test_\w+)\(client|^def (test_\w+)\(\s*wide", Path(__file__).read_text(), re.M))
    assert {f"`test_operator.py::{first or second}`" for first, second in here} <= named


def test_a_length_that_fits_itself(client: openai.OpenAI, expected: Oracle) -> None:
    (model,) = client.models.list().data
    assert model.max_model_len == PAGES_THAT_FIT * 128  # type: ignore[attr-defined]
    longest = Case(prompt=(5,) * 70, max_tokens=PAGES_THAT_FIT * 128 - 70 - 2)
    assert complete(client, longest).choices[0].token_ids == expected.tokens(longest, SETTINGS)


def test_the_server_tells_of_itself(client: openai.OpenAI) -> None:
    assert call(client, "GET", "/health").text == ""
    assert call(client, "GET", "/version").json()["version"]
    assert call(client, "GET", "/load").json() == {"server_load": 0}
    assert number(client, "vllm:dllm_forwards_total") >= 0


def test_the_dashboard_asks_for_what_there_is(client: openai.OpenAI) -> None:
    complete(client, OTHER)
    text = call(client, "GET", "/metrics").text
    with_drafts = {f"vllm:dllm_{name}_total" for name in DRAFT_COUNTERS}
    assert [name for name in shown() - with_drafts if f"\n{name}{{" not in text] == []


@pytest.mark.parametrize("mode", ["abort", "wait", "keep"])
def test_pause(client: openai.OpenAI, pool: ThreadPoolExecutor, expected: Oracle, mode: str) -> None:
    reply = under_way(client, pool)
    assert call(client, "POST", "/pause", params={"mode": mode}).json() == {"status": "paused"}
    later = pool.submit(complete, client, OTHER)
    if mode != "keep":
        reply.result(DEADLINE_S)
    time.sleep(0.5)
    assert not later.done()
    assert reply.done() == (mode != "keep")
    call(client, "POST", "/resume")
    (choice,) = reply.result(DEADLINE_S).choices
    assert choice.finish_reason == ("abort" if mode == "abort" else "length")
    if mode != "abort":
        assert choice.token_ids == expected.tokens(LONG, SETTINGS)
    assert later.result(DEADLINE_S).choices[0].token_ids == expected.tokens(OTHER, SETTINGS)


def test_sleep(client: openai.OpenAI, expected: Oracle) -> None:
    call(client, "POST", "/sleep", params={"level": 1})
    assert call(client, "GET", "/is_sleeping").json() == {"is_sleeping": True}
    call(client, "POST", "/wake_up")
    assert complete(client, OTHER).choices[0].token_ids == expected.tokens(OTHER, SETTINGS)


def test_caches_are_reset(client: openai.OpenAI, expected: Oracle) -> None:
    assert call(client, "POST", "/reset_prefix_cache").json() == {"success": True}
    call(client, "POST", "/reset_mm_cache")
    assert complete(client, OTHER).choices[0].token_ids == expected.tokens(OTHER, SETTINGS)


def test_collective_rpc(client: openai.OpenAI) -> None:
    assert call(client, "POST", "/collective_rpc", json={"method": "check_health"}).json() == {"results": [None]}


def vllm(*arguments: str) -> str:
    """Run a command of vLLM's and return what it said."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("vllm")), *arguments], capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_bench_serve(client: openai.OpenAI, wide: Path) -> None:
    address = str(client.base_url).removesuffix("/v1/")
    random = ("--dataset-name", "random", "--random-input-len", "8", "--random-output-len", "16", "--num-prompts", "4")
    said = vllm("bench", "serve", "--base-url", address, "--model", MODEL, "--tokenizer", str(wide), *random)
    assert re.search(r"Successful requests: +4\b", said)
    assert re.search(r"Denoising steps per canvas: +8\.0", said), "8 steps a block of 8"


SMALL = ("--dtype", "float32", "--max-num-seqs", "4", "--kv-cache-memory-bytes", str(16 << 20))


@pytest.mark.parametrize("what", ["latency", "throughput"])
def test_bench_offline(wide: Path, tmp_path: Path, what: str) -> None:
    lengths = ("--input-len", "8", "--output-len", "16")
    sizes = ("--batch-size", "2", "--num-iters-warmup", "1", "--num-iters", "1")
    if what == "throughput":
        lengths = ("--dataset-name", "random", "--random-input-len", "8", "--random-output-len", "16")
        sizes = ("--num-prompts", "3")
    out = tmp_path / "out.json"
    settings = ("--additional-config", json.dumps({"dllm": SETTINGS}), "--max-model-len", "128")
    vllm("bench", what, "--model", str(wide), *lengths, *sizes, *SMALL, *settings, "--output-json", str(out))
    measured = json.loads(out.read_text())
    assert measured["avg_latency" if what == "latency" else "tokens_per_second"] > 0


def test_run_batch(wide: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "61 + 27 = ?"}]
    bodies = [{"max_tokens": 8}, {"max_tokens": 8, "vllm_xargs": {"dllm_policy": "greedy"}}, {"max_tokens": 8}]
    lines = [
        {
            "custom_id": str(i),
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": MODEL, "messages": messages, **body},
        }
        for i, body in enumerate(bodies)
    ]
    given, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("\n".join(map(json.dumps, lines)))
    model = ("--model", str(CHECKPOINT), "--served-model-name", MODEL)
    vllm("run-batch", "-i", str(given), "-o", str(out), *model, *SMALL)
    replies = {reply["custom_id"]: reply for reply in map(json.loads, out.read_text().splitlines())}
    texts = {replies[i]["response"]["body"]["choices"][0]["message"]["content"] for i in ("0", "2")}
    assert texts == {"88"}
    assert "dllm_policy is 'greedy'" in json.dumps(replies["1"]["error"])


def test_a_killed_worker_is_an_error_for_everybody(client: openai.OpenAI) -> None:
    """The last of this file: it ends the server."""
    (process,) = [each for each in psutil.Process().children() if "serve" in each.cmdline()]
    (worker,) = [each for each in process.children(recursive=True) if "Worker" in each.name()]
    with ThreadPoolExecutor(7) as pool:
        replies = [pool.submit(read_to_the_end, client, is_stream=i % 2 == 0) for i in range(6)]
        health = pool.submit(client._client.get, str(client.base_url).replace("/v1/", last_words.PATH))
        states = ("vllm:num_requests_running", "vllm:num_requests_waiting")
        wait_until(lambda: sum(number(client, state) for state in states) == len(replies))
        worker.kill()
        errors = [reply.exception(DEADLINE_S) for reply in replies]
        assert all(isinstance(error, openai.APIError) for error in errors), errors
        assert health.result(DEADLINE_S).status_code == 503
    with pytest.raises(openai.APIError):
        complete(client, OTHER)
    assert process.wait(DEADLINE_S) == 1


def read_to_the_end(client: openai.OpenAI, *, is_stream: bool) -> None:
    reply = complete(client, LONG, stream=is_stream)
    if is_stream:
        list(reply)
