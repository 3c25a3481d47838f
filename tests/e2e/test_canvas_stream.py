"""A streamed reply's canvas as it is denoised, its numbers in its last chunk, and nothing of it for anybody else."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.http import MODEL, complete, server
from tests.e2e.rig import Case, Oracle

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server"), pytest.mark.slow("servers")]

SETTINGS = {"block_length": 8}
SHOWN = {"dllm_stream": "denoising"}
CASE = Case(prompt=(5, 6, 7), max_tokens=21)


@pytest.fixture(scope="module", params=["bidirectional", "block-causal"])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wild: Path, wild_sdar: Path
) -> Iterator[tuple[openai.OpenAI, Oracle]]:
    name = {"bidirectional": "oracle", "block-causal": "sdar_oracle"}[request.param]
    checkpoint = wild if request.param == "bidirectional" else wild_sdar
    expected = request.getfixturevalue(name)
    spiffy = json.dumps({"method": "spiffy", "budget": 3})
    log = tmp_path_factory.mktemp("server") / "log"
    check = {"VLLM_DLLM_CHECK": "1"}
    with server(log, SETTINGS, "--speculative-config", spiffy, checkpoint=checkpoint, **check) as client:
        yield client, expected


def chunks_of(client: openai.OpenAI, case: Case, options: dict[str, Any], **changes: Any) -> list[dict[str, Any]]:
    extra = {"vllm_xargs": (case.sampling_params().extra_args or {}) | options}
    return [chunk.model_dump() for chunk in complete(client, case, stream=True, extra_body=extra, **changes)]


def tokens_of(chunks: list[dict[str, Any]]) -> list[int]:
    return [token for chunk in chunks for choice in chunk["choices"] for token in choice["token_ids"] or ()]


def check_canvases(chunks: list[dict[str, Any]], answer: list[int], block_length: int) -> None:
    """Every canvas is a part of the answer under way: what is known stays, and each has more than the one before."""
    emitted, before = 0, {}
    for chunk in chunks:
        emitted += len(tokens_of([chunk]))
        if (canvas := chunk.get("dllm_canvas")) is None:
            continue
        assert chunk["choices"] == []
        start, tokens = canvas["start"], canvas["token_ids"]
        assert start == emitted, "canvases are of the block behind what was emitted"
        assert len(tokens) == min(block_length, len(answer) - start) or start == 0
        known = {start + i: token for i, token in enumerate(tokens) if token is not None}
        assert known == {place: answer[place] for place in known}
        assert before.items() <= known.items() or not before.keys() & set(range(start, start + block_length))
        assert [token is None for token in canvas["tokens"]] == [token is None for token in tokens]
        before = known


def test_canvases_are_the_answer_under_way(served: Any) -> None:
    client, expected = served
    answer = expected.tokens(CASE, SETTINGS)
    chunks = chunks_of(client, CASE, SHOWN)
    assert tokens_of(chunks) == answer
    check_canvases(chunks, answer, SETTINGS["block_length"])
    canvases = [chunk["dllm_canvas"] for chunk in chunks if chunk.get("dllm_canvas")]
    assert len({canvas["start"] for canvas in canvases}) >= 2, "of several blocks"
    partly = [c for c in canvases if None in c["token_ids"] and any(t is not None for t in c["token_ids"])]
    assert partly


def test_the_last_chunk_has_the_numbers_of_the_whole_reply(served: Any) -> None:
    client, _ = served
    whole = complete(client, CASE).kv_transfer_params
    for options in ({}, SHOWN):
        *others, last = chunks_of(client, CASE, options)
        assert last["choices"][0]["finish_reason"] == "length"
        assert last["kv_transfer_params"] == whole
        assert whole["dllm"]["nfe"] > 0
        assert not any(chunk.get("kv_transfer_params") for chunk in others)


def test_canvases_say_how_sure_their_tokens_are_and_what_was_done_so_far(served: Any) -> None:
    client, _ = served
    chunks = chunks_of(client, CASE, SHOWN, logprobs=0)
    final = [
        p
        for chunk in chunks
        for choice in chunk["choices"]
        for p in (choice["logprobs"] or {}).get("token_logprobs", ())
    ]
    canvases = [chunk["dllm_canvas"] for chunk in chunks if chunk.get("dllm_canvas")]
    num_known = 0
    for canvas in canvases:
        for i, (token, p) in enumerate(zip(canvas["token_ids"], canvas["logprobs"], strict=True)):
            assert p == (None if token is None else final[canvas["start"] + i])
            num_known += token is not None
    assert num_known > 0
    totals = chunks[-1]["kv_transfer_params"]["dllm"]
    for name in ("nfe", "nfe_refresh", "proposed", "accepted"):
        so_far = [canvas[name] for canvas in canvases]
        assert so_far == sorted(so_far)
        assert 0 <= so_far[-1] <= totals[name]
    assert len({canvas["nfe"] for canvas in canvases}) == len(canvases)
    assert not any("logprobs" in chunk.get("dllm_canvas", {}) for chunk in chunks_of(client, CASE, SHOWN))


def test_who_did_not_ask_sees_nothing(served: Any) -> None:
    """Watched and others in one batch, several prompts and completions: all get their own."""
    client, expected = served
    cases = [Case(prompt=(9 + i, 8, 7), max_tokens=12 + i, temperature=0.9, seed=i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        streams = list(pool.map(lambda i: chunks_of(client, cases[i], SHOWN if i % 2 else {}), range(6)))
    for i, (case, chunks) in enumerate(zip(cases, streams, strict=True)):
        answer = expected.tokens(case, SETTINGS)
        assert tokens_of(chunks) == answer
        assert any(chunk.get("dllm_canvas") for chunk in chunks) == bool(i % 2)
        check_canvases(chunks, answer, SETTINGS["block_length"])


def test_prompts_have_their_own_canvases(served: Any) -> None:
    client, _ = served
    case = Case(prompt=(5, 6, 7), max_tokens=9, temperature=0.8, seed=1)
    chunks = chunks_of(client, case, SHOWN, prompt=[[5, 6, 7], [8, 9]])
    for index in range(2):
        own = [
            {**chunk, "choices": [choice for choice in chunk["choices"] if choice["index"] == index]}
            for chunk in chunks
            if any(choice["index"] == index for choice in chunk["choices"])
            or (chunk.get("dllm_canvas") or {}).get("index") == index
        ]
        assert any(chunk.get("dllm_canvas") for chunk in own)
        check_canvases(own, tokens_of(own), SETTINGS["block_length"])


def test_chats_show_canvases(served: Any) -> None:
    client, _ = served
    chat = {"messages": [{"role": "user", "content": "61 + 27 = ?"}], "max_tokens": 16, "temperature": 0}
    stream = client.chat.completions.create(
        model=MODEL, stream=True, extra_body={"vllm_xargs": SHOWN, "ignore_eos": True}, **chat
    )
    chunks = [chunk.model_dump() for chunk in stream]
    assert any(chunk.get("dllm_canvas") for chunk in chunks)
    assert chunks[-1]["kv_transfer_params"]["dllm"]["nfe"] > 0


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/v1/completions", {"prompt": [5]}, "dllm_stream is 'denoising', but the reply is not streamed; allowed is"),
        (
            "/v1/completions",
            {"prompt": [5], "stream": True, "n": 2, "temperature": 1},
            "dllm_stream is 'denoising', but n is 2; allowed is n 1",
        ),
        ("/v1/responses", {"input": "a", "stream": True}, "dllm_stream is 'denoising', allowed are null here"),
        ("/v1/completions", {"prompt": [5], "vllm_xargs": {"dllm_stream": "all"}}, "dllm_stream is 'all', allowed are"),
    ],
)
def test_where_there_are_no_canvases_they_are_refused(served: Any, path: str, body: Any, message: str) -> None:
    client, _ = served
    request = {"model": MODEL, "vllm_xargs": SHOWN, **body}
    reply = client._client.post(str(client.base_url).replace("/v1/", path), json=request)
    assert reply.status_code == 400
    assert message in reply.json()["error"]["message"]
