"""`vllm serve` over HTTP: the same tokens, streaming by block, stops, usage, and refusals that disturb nobody."""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.http import MODEL, complete, server
from tests.e2e.rig import MAX_MODEL_LEN, Case, Oracle, mixed_cases

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

SETTINGS = {"block_length": 8}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    with server(tmp_path_factory.mktemp("server") / "log", SETTINGS) as client:
        yield client


def questions(client: openai.OpenAI) -> list[tuple[int, ...]]:
    """The token ids of some questions, as the server's chat template puts them."""
    texts = ["61 + 27 = ?", "Sort 8 0 5 3", "Count 9 from 14", "Reverse cat dog sam", "JSON name bob, age 42"]
    url = str(client.base_url).replace("/v1/", "/tokenize")
    replies = [
        client._client.post(url, json={"model": MODEL, "messages": [{"role": "user", "content": text}]})
        for text in texts
    ]
    return [tuple(reply.json()["tokens"]) for reply in replies]


def test_sixteen_mixed_requests_at_once_equal_reference(client: openai.OpenAI, trained: Oracle) -> None:
    prompts = questions(client)
    cases = [
        dataclasses.replace(case, prompt=prompts[i % len(prompts)] if i % 3 else case.prompt)
        for i, case in enumerate(mixed_cases(8, seed=1))
    ]
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda case: complete(client, case), cases))
    assert [reply.choices[0].token_ids for reply in replies] == [trained.tokens(case, SETTINGS) for case in cases]
    for case, reply in zip(cases, replies, strict=True):
        assert reply.choices[0].finish_reason == "length"
        usage = (reply.usage.prompt_tokens, reply.usage.completion_tokens)
        assert usage == (len(case.prompt), case.max_tokens)


def test_streams_one_chunk_per_block(client: openai.OpenAI, trained: Oracle) -> None:
    case = Case(prompt=(5, 6, 7), max_tokens=21)
    chunks = [chunk.choices[0].token_ids for chunk in complete(client, case, stream=True) if chunk.choices]
    chunks = [chunk for chunk in chunks if chunk]
    tokens = trained.tokens(case, SETTINGS)
    assert chunks == [tokens[0:8], tokens[8:16], tokens[16:21]]


def test_chat_uses_the_template_and_stops_by_itself(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Sort 3 1 7 2"}], max_tokens=32
    )
    assert reply.choices[0].message.content == "1 2 3 7"
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None
    assert reply.usage.completion_tokens < 32


def test_stop_string_trims_inside_a_block(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Sort 3 1 7 2"}], max_tokens=32, stop=[" 3"]
    )
    assert reply.choices[0].message.content == "1 2"
    assert reply.choices[0].finish_reason == "stop"


def test_temperature_zero_is_the_default_of_the_checkpoint(client: openai.OpenAI, trained: Oracle) -> None:
    case = Case(prompt=(5, 6, 7), max_tokens=16)
    reply = complete(client, case, temperature=openai.NOT_GIVEN, seed=openai.NOT_GIVEN)
    assert reply.choices[0].token_ids == trained.tokens(case, SETTINGS)


def test_n_completions_have_their_own_seeds(client: openai.OpenAI, trained: Oracle) -> None:
    case = Case(prompt=questions(client)[2], max_tokens=16, temperature=2.0, seed=3)
    choices = complete(client, case, n=3).choices
    expected = [trained.tokens(dataclasses.replace(case, seed=3 + i), SETTINGS) for i in range(3)]
    assert [choice.token_ids for choice in choices] == expected


def test_a_client_that_leaves_disturbs_nobody(client: openai.OpenAI, trained: Oracle) -> None:
    stream = complete(client, Case(prompt=(5, 6, 7), max_tokens=100), stream=True)
    next(iter(stream))
    stream.close()
    case = Case(prompt=(8, 9), max_tokens=20, temperature=0.7, seed=2)
    assert complete(client, case).choices[0].token_ids == trained.tokens(case, SETTINGS)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"extra_body": {"vllm_xargs": {"dllm_polcy": "static"}}}, "dllm_polcy is not known; allowed are dllm_policy"),
    ({"extra_body": {"vllm_xargs": {"dllm_policy": "greedy"}}}, "dllm_policy is 'greedy'"),
    ({"extra_body": {"vllm_xargs": {"dllm_threshold": 1.5}}}, "dllm_threshold is 1.5"),
    ({"extra_body": {"vllm_xargs": {"dllm_threshold": "0.9"}}}, "dllm_threshold is '0.9'"),
    ({"extra_body": {"vllm_xargs": {"dllm_factor": 0}}}, "dllm_factor is 0"),
    ({"extra_body": {"vllm_xargs": {"dllm_steps": 3}}}, "dllm_steps is 3, but 16 positions in 2 blocks"),
    ({"extra_body": {"vllm_xargs": {"dllm_steps": 2.5}}}, "dllm_steps is 2.5"),
    (
        {"extra_body": {"vllm_xargs": {"dllm_policy": "static", "dllm_threshold": 0.5}}},
        "dllm_threshold is 0.5, but the request's policy 'static' does not use it",
    ),
    ({"extra_body": {"vllm_xargs": {"diffusion_max_steps": 4}}}, "diffusion_max_steps is an option of another"),
    ({"extra_body": {"min_p": 0.1}, "temperature": 0.7}, "min_p is 0.1"),
    ({"extra_body": {"min_tokens": 4}}, "min_tokens is 4"),
    ({"extra_body": {"repetition_penalty": 1.2}}, "repetition_penalty is 1.2"),
    ({"presence_penalty": 0.5}, "presence_penalty is 0.5"),
    ({"frequency_penalty": 0.5}, "frequency_penalty is 0.5"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias is"),
    ({"extra_body": {"bad_words": ["cat"]}}, "bad_words is"),
    ({"extra_body": {"allowed_token_ids": [5, 6]}}, "allowed_token_ids is"),
    ({"logprobs": 1}, "logprobs is 1"),
    ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs is 1"),
    ({"extra_body": {"structured_outputs": {"regex": "a+"}}}, "structured_outputs is"),
    ({"prompt": [5] * (MAX_MODEL_LEN - 7), "max_tokens": 4}, "the prompt has 121 tokens and leaves 7"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_refusals_name_parameter_value_and_allowed_values(
    client: openai.OpenAI, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, Case(prompt=(5, 6, 7), max_tokens=16), **changes)
    assert message in str(refused.value)
    assert "allowed" in str(refused.value) or "need" in str(refused.value)


def test_the_server_lives_on_after_refusals(client: openai.OpenAI, trained: Oracle) -> None:
    case = Case(prompt=(5, 6, 7), max_tokens=16)
    for changes, _ in REFUSED[:3]:
        with pytest.raises(openai.BadRequestError):
            complete(client, case, **changes)
    assert complete(client, case).choices[0].token_ids == trained.tokens(case, SETTINGS)


def test_metrics_count_steps_and_tokens(client: openai.OpenAI) -> None:
    def steps() -> float:
        text = client._client.get(str(client.base_url).replace("/v1/", "/metrics")).text
        lines = [line for line in text.splitlines() if line.startswith("vllm:diffusion_num_denoising_steps_total")]
        return sum(float(line.split()[-1]) for line in lines)

    before = steps()
    complete(client, Case(prompt=(5, 6, 7), max_tokens=16))
    deadline = time.monotonic() + 10
    while steps() - before < 14 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert steps() - before == 14  # two blocks of eight steps, the first of each decided by the refresh
