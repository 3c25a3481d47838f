"""Structured output as clients ask for it, over HTTP: response formats, forced tools, structured_outputs."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.e2e import client_matrix
from tests.e2e.http import MODEL, server

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("structured server")]

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "size": {"enum": ["S", "M", "L"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 4}, "maxItems": 2},
    },
    "required": ["name", "size", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA, "strict": True}}
TOOL = {"type": "function", "function": {"name": "order", "parameters": SCHEMA, "strict": True}}
MESSAGES = [{"role": "user", "content": "JSON name bob, age 42"}]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    more = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with server(tmp_path_factory.mktemp("server") / "log", {"block_length": 8}, *more) as client:
        yield client


def chat(client: openai.OpenAI, **asked: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, **{"max_tokens": 72, **asked})


def test_replies_meet_a_json_schema(client: openai.OpenAI) -> None:
    def ask(number: int) -> list[str]:
        policy = ("static", "threshold", "random", "factor")[number % 4]
        reply = chat(
            client,
            response_format=FORMAT,
            temperature=number % 2 * 0.8,
            seed=number,
            n=1 + number % 2,
            presence_penalty=number % 3 * 0.5,
            logit_bias={"40": -50.0} if number % 3 == 1 else {},
            extra_body={"vllm_xargs": {"dllm_policy": policy}},
        )
        return [choice.message.content for choice in reply.choices]

    with ThreadPoolExecutor(8) as pool:
        replies = [text for texts in pool.map(ask, range(12)) for text in texts]
    assert len(replies) == 18
    for reply in replies:
        jsonschema.validate(json.loads(reply), SCHEMA)
    assert len(set(replies)) > 6


def test_a_stream_is_the_reply(client: openai.OpenAI) -> None:
    whole = chat(client, response_format=FORMAT, seed=1).choices[0].message.content
    parts = [
        chunk.choices[0].delta.content or "" for chunk in chat(client, response_format=FORMAT, seed=1, stream=True)
    ]
    assert "".join(parts) == whole
    assert len(parts) > 2


def test_any_object_and_no_format_beside_it(client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(2) as pool:
        shaped = pool.submit(chat, client, response_format={"type": "json_object"})
        free = pool.submit(chat, client)
    assert isinstance(json.loads(shaped.result().choices[0].message.content), dict)
    assert free.result().choices[0].message.content == chat(client).choices[0].message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "order"}}])
def test_a_forced_tool_is_called_with_its_parameters(client: openai.OpenAI, choice: Any) -> None:
    message = chat(client, tools=[TOOL], tool_choice=choice, max_tokens=80).choices[0].message
    assert message.tool_calls
    for call in message.tool_calls:
        assert call.function.name == "order"
        jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_a_strict_tool_is_called_by_its_parameters_or_not_at_all(client: openai.OpenAI) -> None:
    """The model is pushed to what begins a call, behind which it would write anything."""
    (less,) = client._client.post(
        str(client.base_url).replace("/v1/", "/tokenize"), json={"prompt": "<", "add_special_tokens": False}
    ).json()["tokens"]

    def ask(seed: int) -> Any:
        asked = {"tools": [TOOL], "logit_bias": {str(less): 100.0}, "temperature": 1.0, "seed": seed, "max_tokens": 90}
        return chat(client, **asked).choices[0].message

    with ThreadPoolExecutor(8) as pool:
        messages = list(pool.map(ask, range(24)))
    for message in messages:
        assert "<tool_call>" not in (message.content or "")
        for call in message.tool_calls or ():
            assert call.function.name == "order"
            jsonschema.validate(json.loads(call.function.arguments), SCHEMA)
    assert any("<" in (message.content or "") or message.tool_calls for message in messages)


@pytest.mark.parametrize(
    ("asked", "allowed"),
    [({"choice": ["yes", "no"]}, {"yes", "no"}), ({"regex": "[ab]{2}"}, {"aa", "ab", "ba", "bb"})],
)
def test_completions_take_structured_outputs(client: openai.OpenAI, asked: dict[str, Any], allowed: set[str]) -> None:
    body = {"structured_outputs": asked}
    reply = client.completions.create(model=MODEL, prompt="61 + 27 = ?", max_tokens=16, extra_body=body)
    assert reply.choices[0].text in allowed


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"response_format": FORMAT, "max_tokens": 5}, "allowed are 1"),  # so many tokens has the shortest answer
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "at # of the schema stands 'not', which cannot be enforced there; known are",
        ),
        (
            {"extra_body": {"structured_outputs": {"regex": "(a|b)*a(a|b){15}"}}},
            "shorten repetitions of bounded length",
        ),
        (
            {"extra_body": {"vllm_xargs": {"vllm_dllm_automaton": "x"}}},
            "vllm_dllm_automaton is set, which the front end sets itself",
        ),
    ],
)
def test_what_cannot_be_enforced_is_a_400(client: openai.OpenAI, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        chat(client, **asked)
    assert message in str(refused.value)
    assert chat(client, max_tokens=8).choices


def test_the_page_says_what_a_client_can_ask_for(client: openai.OpenAI) -> None:
    page = (Path(__file__).parents[2] / "docs/openai.md").read_text()
    tables = "\n".join(client_matrix.lines(client_matrix.Server(client, MODEL)))
    assert page.endswith(tables + "\n")
