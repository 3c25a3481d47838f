"""`vllm serve` over HTTP: the same tokens, streaming by block, stops, usage, and refusals that disturb nobody."""

import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.e2e import busy_loop
from tests.e2e.http import (
    DEADLINE_S,
    MODEL,
    assert_all_end,
    assert_streamed,
    complete,
    lines_we_cause,
    server,
    wait_until,
)
from tests.e2e.rig import MAX_MODEL_LEN, Case, Oracle, mixed_cases

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]

SETTINGS = {"block_length": 8}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the server writes its log."""
    return tmp_path_factory.mktemp("server") / "log"


@pytest.fixture(scope="module")
def client(log: Path) -> Iterator[openai.OpenAI]:
    more = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--enable-scale-out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        with server(log, SETTINGS, *more, "--middleware", "tests.e2e.busy_loop.BusyLoop") as client:
            yield client


def post(client: openai.OpenAI, path: str, body: dict[str, Any]) -> Any:
    return client._client.post(str(client.base_url).replace("/v1/", path), json={"model": MODEL, **body})


def test_the_start_warns_of_nothing_that_this_plugin_set(client: openai.OpenAI, log: Path) -> None:
    assert lines_we_cause(log) == []
    assert "Serving LLaDAModelLM by block diffusion" in log.read_text()
    assert "oneDNN keeps 256 compiled products" in log.read_text()


def questions(client: openai.OpenAI) -> list[tuple[int, ...]]:
    """The token ids of some questions, as the server's chat template puts them."""
    texts = ["61 + 27 = ?", "Sort 8 0 5 3", "Count 9 from 14", "Reverse cat dog sam", "JSON name bob, age 42"]
    replies = [post(client, "/tokenize", {"messages": [{"role": "user", "content": text}]}) for text in texts]
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


def test_streams_block_by_block(client: openai.OpenAI, trained: Oracle) -> None:
    case = Case(prompt=(5, 6, 7), max_tokens=101)
    tokens = trained.tokens(case, SETTINGS)
    assert_streamed(client, case, [tokens[i : i + 8] for i in range(0, 101, 8)])


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
    ({"extra_body": {"vllm_xargs": {"dllm_steps": 3}}}, "dllm_steps is 3, but max_tokens 16 in 2 blocks"),
    ({"extra_body": {"vllm_xargs": {"dllm_steps": 2.5}}}, "dllm_steps is 2.5"),
    (
        {"extra_body": {"vllm_xargs": {"dllm_policy": "static", "dllm_threshold": 0.5}}},
        "dllm_threshold is 0.5, but the request's policy 'static' does not use it",
    ),
    ({"extra_body": {"vllm_xargs": {"diffusion_max_steps": 4}}}, "diffusion_max_steps is an option of another"),
    ({"extra_body": {"allowed_token_ids": [3]}}, "allowed_token_ids is [3], all of which are the mask token"),
    ({"extra_body": {"thinking_token_budget": 5}}, "thinking_token_budget is 5"),
    ({"logprobs": 21}, "logprobs is 21, allowed are null and whole numbers from 0 to 20"),
    ({"logprobs": 1, "echo": True}, "echo is True beside logprobs, but tokens of a prompt are unmasked by no step"),
    ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs is 1"),
    ({"extra_body": {"structured_outputs": {"grammar": "a"}}}, "a grammar is no regular language, allowed are json"),
    ({"prompt": [5] * (MAX_MODEL_LEN - 7), "max_tokens": 4}, "the prompt has 121 tokens, but a block needs 8"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:24] for _, message in REFUSED])
def test_refusals_name_parameter_value_and_allowed_values(
    client: openai.OpenAI, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, Case(prompt=(5, 6, 7), max_tokens=16), **changes)
    assert message in str(refused.value)
    assert "allowed" in str(refused.value) or "need" in str(refused.value)


CHAT = {"messages": [{"role": "user", "content": "Sort 3 1 2"}]}
LONG_CHAT = {"messages": [{"role": "user", "content": "1 2 3 4 " * 40}]}
IMAGE = {"role": "user", "content": [{"type": "image", "source": {"type": "base64", "data": "AAAA"}}]}
TOOL = {"name": "f", "parameters": {"type": "object", "properties": {}}}
CHAT_TOOL = {"type": "function", "function": TOOL}
TOO_LONG = "the prompt has at least 121 tokens, but a block needs 8 of max_model_len 128"
BAD_STEPS = {"vllm_xargs": {"dllm_steps": 3}}
TOO_SHORT = "(a structural tag, as of a forced or strict tool call) has"
STEPS = "dllm_steps is 3, but max_tokens 16 in 2 blocks of 8 need a multiple of 2"
REFUSED_BY_API: list[tuple[str, dict[str, Any], str]] = [
    ("/v1/completions", {"prompt": [5, 6], "max_tokens": 16, **BAD_STEPS}, STEPS),
    ("/v1/completions", {"prompt": [5, 6], "max_tokens": 16, "n": 2, "temperature": 1, **BAD_STEPS}, STEPS),
    ("/v1/completions", {"prompt": [[5, 6], [5] * 121]}, "the prompt has 121 tokens"),
    ("/v1/completions", {"prompt": [5] * 128}, "the prompt has 128 tokens"),
    ("/v1/completions", {"prompt": "1 2 3 4 " * 40}, TOO_LONG),
    (
        "/v1/completions",
        {"prompt": [5] * 128, "truncate_prompt_tokens": 125},
        "truncate_prompt_tokens is 125, allowed are",
    ),
    ("/v1/completions", {"prompt": [5] * 9, "truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0, allowed are"),
    ("/v1/completions", {"prompt": [5, 6], "extra_body": BAD_STEPS}, "extra_body is {'vllm_xargs': {'dllm_steps': 3}}"),
    ("/v1/completions", {"prompt": [5, 6], "stop_token_ids": [10**6]}, "stop_token_ids"),
    ("/v1/completions", {"prompt": [5, 6], "temperature": 1e38}, "temperature must be in [0, 2]"),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 16, **BAD_STEPS}, STEPS),
    ("/v1/chat/completions", LONG_CHAT, TOO_LONG),
    (
        "/v1/chat/completions",
        {**CHAT, "max_tokens": 1, "response_format": {"type": "json_object"}},
        "max_tokens is 1 (as far as max_model_len has room), but the shortest answer",
    ),
    ("/v1/chat/completions", {**CHAT, "max_tokens": 4, "tools": [CHAT_TOOL], "tool_choice": "required"}, TOO_SHORT),
    ("/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 21}, "top_logprobs is 21"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 0}, "max_output_tokens is 0, allowed are"),
    ("/generative_scoring", {"query": "a", "items": ["b"], "label_token_ids": [5, 6]}, "label_token_ids is [5, 6]"),
    ("/v1/responses", {"input": "a", "max_output_tokens": 16, **BAD_STEPS}, STEPS),
    ("/v1/responses", {"input": "1 2 3 4 " * 40}, TOO_LONG),
    ("/v1/responses", {"input": "a", "text": {"format": {"type": "grammar"}}}, "text.format is {'type': 'grammar'}"),
    ("/v1/messages", {**LONG_CHAT, "max_tokens": 8}, TOO_LONG),
    ("/v1/messages", {"messages": [IMAGE], "max_tokens": 8}, "messages[0].content[0].type is 'image', allowed are"),
    ("/v1/messages/count_tokens", {"messages": [IMAGE]}, "messages[0].content[0].type is 'image', allowed are"),
    ("/v1/messages", {**CHAT, "max_tokens": 5000}, "max_tokens=5000 cannot be greater than max_model_len=128"),
    ("/v1/messages", {**CHAT, "max_tokens": 8, "stop_sequences": [""]}, "stop_sequences cannot contain an empty"),
    ("/v1/messages", {**CHAT, "max_tokens": 8, "stop_sequences": ["a"] * 9}, "stop_sequences is ['a', 'a', 'a', 'a', "),
    ("/v1/messages", {**CHAT, "max_tokens": 8, "dllm_steps": 2}, "dllm_steps is 2 at the top of the request"),
    ("/v1/messages", {**CHAT, "max_tokens": 8, "presence_penalty": 0.5}, "presence_penalty is 0.5"),
    (
        "/v1/messages",
        {**CHAT, "max_tokens": 1, "tools": [{"name": "f", "input_schema": {}}], "tool_choice": {"type": "any"}},
        "as of a forced or strict tool call",
    ),
    (
        "/inference/v1/generate",
        {"token_ids": [5], "sampling_params": {"thinking_token_budget": 5}},
        "thinking_token_budget is 5",
    ),
    (
        "/inference/v1/generate",
        {"token_ids": [5], "sampling_params": {}, **BAD_STEPS},
        "vllm_xargs is {'dllm_steps': 3}",
    ),
    (
        "/inference/v1/generate",
        {"token_ids": [5] * 121, "sampling_params": {"max_tokens": 4}},
        "the prompt has 121 tokens",
    ),
]


@pytest.mark.parametrize("stream", [False, True], ids=["at once", "streamed"])
@pytest.mark.parametrize(
    ("path", "body", "message"), REFUSED_BY_API, ids=[f"{a} {c[:24]}" for a, _, c in REFUSED_BY_API]
)
def test_every_api_refuses_before_its_stream_begins(
    client: openai.OpenAI, log: Path, path: str, body: dict[str, Any], message: str, stream: bool
) -> None:
    before = log.stat().st_size
    reply = post(client, path, {**body, "stream": stream})
    assert (reply.status_code, reply.headers["content-type"]) == (400, "application/json")
    assert message in reply.json()["error"]["message"]
    assert ("type" in reply.json()) == path.startswith("/v1/messages")
    post(
        client, "/v1/completions", {"prompt": [5], "max_tokens": 1, "vllm_xargs": {"dllm_steps": 1}}
    ).raise_for_status()
    with log.open() as lines:
        lines.seek(before)
        new = lines.read()
    assert "200 OK" in new, "the log is written behind the reply of a later request"
    assert "Traceback" not in new
    assert len([line for line in new.splitlines() if "ERROR" in line or "WARNING" in line]) <= 1, new


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": [5, 6], "max_tokens": 4, "echo": True}),
        ("/v1/chat/completions", {**CHAT, "max_tokens": 4, "tools": [CHAT_TOOL]}),
        ("/v1/responses", {"input": "a", "max_output_tokens": 4}),
        ("/v1/messages", {**CHAT, "max_tokens": 4}),
        ("/inference/v1/generate", {"token_ids": [5], "sampling_params": {"max_tokens": 4}}),
    ],
)
def test_every_api_streams(client: openai.OpenAI, path: str, body: dict[str, Any]) -> None:
    reply = post(client, path, {**body, "stream": True})
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert '"error"' not in reply.text


def test_a_prompt_that_is_too_long_is_cut_to_the_longest_that_is_served(client: openai.OpenAI) -> None:
    for cut, prompt_tokens in ((-1, 120), (120, 120), (5, 5)):
        body = {"prompt": [5] * 128, "max_tokens": 16, "ignore_eos": True, "truncate_prompt_tokens": cut}
        usage = post(client, "/v1/completions", body).raise_for_status().json()["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (prompt_tokens, min(16, 128 - prompt_tokens))
    reply = post(client, "/v1/responses", {"input": "1 2 3 4 " * 40, "truncation": "auto"})
    assert reply.raise_for_status().json()["usage"]["input_tokens"] == 120


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"5", b"\xff"])
def test_a_body_that_is_no_object_is_refused(client: openai.OpenAI, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    for path in ("/v1/completions", "/v1/messages"):
        url = str(client.base_url).replace("/v1/", path)
        assert client._client.post(url, content=content, headers=headers).status_code == 400


def test_a_prompt_is_counted_that_is_too_long_to_be_served(client: openai.OpenAI) -> None:
    tokens = post(client, "/tokenize", LONG_CHAT).raise_for_status().json()["tokens"]
    assert len(tokens) > MAX_MODEL_LEN
    reply = post(client, "/v1/messages/count_tokens", LONG_CHAT)
    assert reply.raise_for_status().json()["input_tokens"] == len(tokens)


def test_logprobs_that_are_off_are_served(client: openai.OpenAI) -> None:
    for path, prompt in (("/v1/completions", {"prompt": [5, 6]}), ("/v1/chat/completions", CHAT)):
        reply = post(client, path, {**prompt, "max_tokens": 4, "logprobs": False}).raise_for_status()
        assert reply.json()["choices"][0]["logprobs"] is None


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
    while steps() - before < 18 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert steps() - before == 18  # two blocks of eight steps, and a commit of each, as vLLM counts


def test_every_client_of_a_server_that_is_terminated_hears_of_it(client: openai.OpenAI) -> None:
    """The last of this file: it ends the server."""
    (process,) = [child for child in psutil.Process().children() if str(client.base_url.port) in child.cmdline()]
    processes = [process, *process.children(recursive=True)]
    answered: list[int] = []
    with ThreadPoolExecutor(8) as pool:
        ends = [pool.submit(ask_until_error, client, i, answered) for i in range(8)]
        client._client.get(str(client.base_url).replace("/v1/", busy_loop.PATH))
        wait_until(lambda: len(answered) >= 8)
        process.terminate()
        assert_all_end(processes)
        errors = [type(end.result(timeout=DEADLINE_S)) for end in ends]
    assert {openai.InternalServerError, openai.APIError} & set(errors), errors


def ask_until_error(client: openai.OpenAI, index: int, answered: list[int]) -> openai.APIError:
    case = Case(prompt=(5, 6, 7 + index), max_tokens=96)
    while True:
        try:
            reply = complete(client, case, stream=index % 2 == 0)
            assert index % 2 or list(reply)
        except openai.APIError as error:
            return error
        answered.append(index)
