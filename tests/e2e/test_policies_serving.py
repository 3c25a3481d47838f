"""Guidance, KV policies and LLaDA2 over HTTP: the tokens and forwards of the reference; and HEX on a server."""

import dataclasses
import itertools
import json
import runpy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e import llada22 as llada22_cases
from tests.e2e.http import MODEL, complete, server
from tests.e2e.llada2 import LLaDA2Oracle, make_random
from tests.e2e.rig import EXAMPLES, Case, Oracle, mixed_cases
from tests.e2e.sdar import sdar_cases
from tests.e2e.torch_cases import SETTINGS, check_own, handful, write_package
from vllm_dllm.names import DELAYED

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server"), pytest.mark.slow("servers")]

SPIFFY = ("--speculative-config", json.dumps({"method": "spiffy", "budget": 3}))
PUBLISHED: dict[str, Any] = {"threshold": 0.5, "edit_threshold": 0.0, "post_steps": 16}
CANVASES = {"vllm_xargs": {"dllm_stream": "denoising"}, "ignore_eos": True, "return_token_ids": True}
GUIDED = {"block_length": 8, "refresh_every": 1, "cfg_scale": 0.75}
CACHED = {
    "freecache": {"block_length": 8, "kv_policy": "freecache"},
    "vicinity": {"block_length": 8, "kv_policy": "vicinity", "prefix_look": 5, "after_look": 11, "warmup_steps": 2},
    "dkv": {"block_length": 8, "kv_policy": "dkv", "refresh_every": 5},
    "dkv_pd": {"block_length": 8, "kv_policy": "dkv_pd", "refresh_every": 5},
}


def ask_all(client: openai.OpenAI, cases: list[Case]) -> list[Any]:
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(lambda case: complete(client, case), cases))


def tokens_of(replies: list[Any]) -> list[list[int]]:
    return [reply.choices[0].token_ids for reply in replies]


def streamed(client: openai.OpenAI, case: Case) -> list[int]:
    chunks = complete(client, case, stream=True)
    return [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids or ()]


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory, mild: Path) -> Iterator[openai.OpenAI]:
    with server(tmp_path_factory.mktemp("server") / "log", GUIDED, *SPIFFY, checkpoint=mild) as client:
        yield client


def test_guidance_of_each_request_equals_the_reference(guided: openai.OpenAI, mild_oracle: Oracle) -> None:
    scales = (None, 0.0, 2.5, 0.3)
    cases = [dataclasses.replace(case, cfg_scale=scales[i % 4]) for i, case in enumerate(mixed_cases(8, seed=9))]
    replies = ask_all(guided, cases)
    expected = [mild_oracle.tokens(case, GUIDED) for case in cases]
    assert tokens_of(replies) == expected
    unguided = [mild_oracle.tokens(dataclasses.replace(case, cfg_scale=0.0), GUIDED) for case in cases]
    assert sum(a != b for a, b in zip(expected, unguided, strict=True)) >= 6, "guidance changes too little"
    assert sum(reply.kv_transfer_params["dllm"]["accepted"] for reply in replies) > 0
    assert streamed(guided, cases[2]) == expected[2]


@pytest.mark.parametrize(
    ("scale", "message"),
    [(-1, "dllm_cfg_scale is -1"), (101, "dllm_cfg_scale is 101"), ("much", "dllm_cfg_scale is 'much'")],
)
def test_a_scale_that_is_none_is_a_400(guided: openai.OpenAI, scale: Any, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        complete(guided, Case((5,), 8), extra_body={"vllm_xargs": {"dllm_cfg_scale": scale}})


@pytest.mark.slow("demo")
def test_hex_takes_the_answer_of_most_replies(tmp_path: Path) -> None:
    script = runpy.run_path(str(EXAMPLES / "hex.py"))
    with server(tmp_path / "log", {"block_length": 8}) as client:
        texts = script["replies"](client, "61 + 27 = ?", [8, 4, 2], 3, 8)
    assert len(texts) == 9
    answer, votes = script["most_frequent"](texts, r"-?[\d.]*\d(?=\D*$)")
    assert (answer, votes >= 5) == ("88", True), texts


@pytest.fixture(scope="module", params=CACHED)
def cached(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, mild: Path
) -> Iterator[tuple[openai.OpenAI, dict[str, Any]]]:
    drafts = () if request.param in DELAYED else SPIFFY
    settings = CACHED[request.param]
    with server(tmp_path_factory.mktemp("server") / "log", settings, *drafts, checkpoint=mild) as client:
        yield client, settings


def test_kv_policies_equal_the_reference(cached: Any, mild_oracle: Oracle) -> None:
    client, settings = cached
    cases = mixed_cases(8, seed=4)
    replies = ask_all(client, cases)
    assert tokens_of(replies) == [mild_oracle.tokens(case, settings) for case in cases]
    took = [reply.kv_transfer_params["dllm"] for reply in replies]
    expected = [mild_oracle.generation(case, settings) for case in cases]
    assert [n["nfe_refresh"] for n in took] == [e.nfe_refresh for e in expected]
    assert settings["kv_policy"] in DELAYED or sum(n["accepted"] for n in took) > 0
    # A draft that came true saves one; those behind an answer's end save nothing.
    assert all(n["nfe"] <= e.nfe <= n["nfe"] + n["accepted"] for n, e in zip(took, expected, strict=True))
    assert streamed(client, cases[0]) == mild_oracle.tokens(cases[0], settings)
    with pytest.raises(openai.BadRequestError, match="dllm_cfg_scale is 1"):
        complete(client, cases[0], extra_body={"vllm_xargs": {"dllm_cfg_scale": 1}})


@pytest.fixture(scope="module")
def llada2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[openai.OpenAI, LLaDA2Oracle]]:
    folder = tmp_path_factory.mktemp("server")
    oracle = LLaDA2Oracle(make_random(folder / "checkpoint", mixing=0.2))
    with server(folder / "log", {}, *SPIFFY, "--block-size", "32", checkpoint=oracle.checkpoint) as client:
        yield client, oracle


def test_llada2_equals_the_reference(llada2: tuple[openai.OpenAI, LLaDA2Oracle]) -> None:
    client, oracle = llada2
    settings = {"block_length": 32}
    cases = sdar_cases(32, seed=21)
    replies = ask_all(client, cases)
    assert tokens_of(replies) == [oracle.tokens(case, settings) for case in cases]
    assert streamed(client, cases[0]) == oracle.tokens(cases[0], settings)
    assert {reply.kv_transfer_params["dllm"]["exactness"] for reply in replies} == {"exact"}


@pytest.fixture(scope="module")
def llada22(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[openai.OpenAI, LLaDA2Oracle]]:
    folder = tmp_path_factory.mktemp("server")
    oracle = llada22_cases.make_random(folder / "checkpoint")
    sizes = ("--block-size", "32", "--max-model-len", str(llada22_cases.MAX_MODEL_LEN))
    with server(folder / "log", {}, *SPIFFY, *sizes, checkpoint=oracle.checkpoint) as client:
        yield client, oracle


def test_llada22_equals_the_reference(llada22: tuple[openai.OpenAI, LLaDA2Oracle]) -> None:
    """A server that is told nothing of decoding deletes and inserts, and a request may have another policy."""
    client, oracle = llada22
    own, others = llada22_cases.cases(1, 8), sdar_cases(32, seed=21)[:4]
    replies = ask_all(client, [*own, *others])
    took = [reply.kv_transfer_params["dllm"] for reply in replies]
    found = [(tokens, n["nfe"] + n["accepted"]) for tokens, n in zip(tokens_of(replies), took, strict=True)]
    assert found[: len(own)] == [case.expected(oracle) for case in own]
    assert tokens_of(replies)[len(own) :] == [oracle.tokens(case, {"block_length": 32}) for case in others]
    assert {n["exactness"] for n in took} == {"exact"}
    assert sum(n["accepted"] for n in took) > 0
    assert streamed(client, own[0]) == own[0].expected(oracle)[0]
    # Without an option it is the model's rule, at its published threshold.
    plain = complete(client, own[1], extra_body={"vllm_xargs": {}})
    assert tokens_of([plain]) == [dataclasses.replace(own[1], **PUBLISHED).expected(oracle)[0]]


def test_chats_and_canvases_of_llada22_are_those_of_its_completions(
    llada22: tuple[openai.OpenAI, LLaDA2Oracle],
) -> None:
    """The denoising canvas shows deletions and insertions as they are; what it ends in is the reply."""
    client, oracle = llada22
    messages: Any = [{"role": "user", "content": "61 + 27 = ?"}]
    body = {"return_token_ids": True, "ignore_eos": True}
    reply = client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=40, temperature=0, extra_body=body
    )
    prompt: Any = reply.prompt_token_ids  # type: ignore[attr-defined]
    case = llada22_cases.IndelCase(tuple(prompt), 40, **PUBLISHED)
    assert reply.choices[0].token_ids == case.expected(oracle)[0]  # type: ignore[attr-defined]
    chunks = list(complete(client, case, stream=True, extra_body=CANVASES))
    assert [token for chunk in chunks for choice in chunk.choices for token in choice.token_ids or ()] == (
        case.expected(oracle)[0]
    )
    canvases = [chunk.model_dump()["dllm_canvas"] for chunk in chunks if chunk.model_extra.get("dllm_canvas")]
    changes = [
        (one, other)
        for before, after in itertools.pairwise(canvases)
        if before["start"] == after["start"]
        for one, other in zip(before["token_ids"], after["token_ids"], strict=True)
        if one not in (None, other)
    ]
    assert any(other is not None for _, other in changes), "no token was replaced"
    assert any(other is None for _, other in changes), "none was masked again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dllm_cfg_scale": 1}, "dllm_cfg_scale is 1"),
        ({"dllm_indel_delete": 9999}, "allowed are two other ids up to 375"),
        ({"dllm_indel_split": 3}, "dllm_policy is 'indel', which deletes and inserts by the tokens"),
    ],
)
def test_what_llada22_cannot_do_is_a_400(
    llada22: tuple[openai.OpenAI, LLaDA2Oracle], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        complete(llada22[0], Case((5,), 8), extra_body={"vllm_xargs": options})
    with pytest.raises(openai.BadRequestError, match="logprobs is 2, but the request's policy 'indel'"):
        complete(llada22[0], Case((5,), 8), logprobs=2, extra_body={"vllm_xargs": {}})


def test_policies_in_torch_code_equal_their_statements(mild: Path, mild_oracle: Oracle, tmp_path: Path) -> None:
    """Of different kinds in one batch, one of them a user's, beside native ones."""
    write_package(tmp_path)
    own, native = handful(3), mixed_cases(8, seed=7)[:3]
    with server(tmp_path / "log", SETTINGS, *SPIFFY, checkpoint=mild, PYTHONPATH=str(tmp_path)) as client:
        replies = ask_all(client, [*own, *native])
        assert streamed(client, own[-1]) == own[-1].expected(mild_oracle)[0]
    tokens = tokens_of(replies)
    took = [reply.kv_transfer_params["dllm"] for reply in replies]
    assert check_own(mild_oracle, own, list(zip(tokens, took, strict=True))[: len(own)]) > 0
    assert tokens[len(own) :] == [mild_oracle.tokens(case, SETTINGS) for case in native]
