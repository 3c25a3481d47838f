"""Structured output as clients ask for it, over HTTP: response formats, forced tools, structured_outputs."""

import json
import re
import runpy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from transformers import AutoTokenizer

from tests.e2e import client_matrix
from tests.e2e.http import MODEL, server
from tests.e2e.rig import CHECKPOINT, EXAMPLES, Case, Oracle

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("structured server"), pytest.mark.slow("servers")]

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
IDS = {"return_token_ids": True, "ignore_eos": True}
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


def test_a_suffix_is_filled_up_to(client: openai.OpenAI, trained: Oracle) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    prompt, behind = (tuple(tokenizer.encode(text, add_special_tokens=False)) for text in ("61 + 27 = ", ", so it is"))
    case = Case(prompt=prompt, max_tokens=5, given=(*[None] * 5, *behind))
    options = {"suffix": ", so it is", "temperature": 0}
    reply = client.completions.create(model=MODEL, prompt=list(prompt), max_tokens=5, **options, extra_body=IDS)
    expected = trained.tokens(case, {"block_length": 8})
    assert reply.choices[0].token_ids == expected
    assert reply.choices[0].finish_reason == "length"
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 5)
    chunks = client.completions.create(
        model=MODEL, prompt=list(prompt), max_tokens=5, **options, extra_body=IDS, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == reply.choices[0].text
    many = client.completions.create(
        model=MODEL, prompt=["a", list(prompt)][1:], max_tokens=5, n=3, seed=4, suffix=", so it is", temperature=0.9
    )
    assert len({choice.text for choice in many.choices}) > 1
    assert client.completions.create(model=MODEL, prompt="a", suffix="", max_tokens=4, echo=True).choices


def test_a_canvas_is_filled_in(client: openai.OpenAI) -> None:
    text = '{"name": "<|mdm_mask*2|>", "age": <|mdm_mask|><|mdm_mask|>}'
    for canvas in (text, ids_of(text)):
        reply = chat(client, max_tokens=None, extra_body={"vllm_xargs": {"dllm_canvas": canvas}, "ignore_eos": True})
        assert re.fullmatch(r'\{"name": ".*", "age": .*\}', reply.choices[0].message.content)
        assert reply.usage.completion_tokens == len(ids_of(text))
        completed = client.completions.create(
            model=MODEL, prompt="a", extra_body={"vllm_xargs": {"dllm_canvas": canvas}, "ignore_eos": True}
        )
        assert completed.usage.completion_tokens == len(ids_of(text))
    asked = {"structured_outputs": {"regex": '\\{"name": "[a-z]+", "age": [0-9]+\\}'}}
    reply = chat(client, max_tokens=None, extra_body={"vllm_xargs": {"dllm_canvas": text}, **asked})
    assert json.loads(reply.choices[0].message.content)["age"] >= 0


def ids_of(text: str) -> list[int | None]:
    """Tokenize a canvas as a client may do it."""
    tokenizer, ids = AutoTokenizer.from_pretrained(CHECKPOINT), []
    for part in re.split(r"(<\|mdm_mask(?:\*2)?\|>)", text):
        is_mark = part.startswith("<|mdm")
        ids += [None] * (1 + ("*2" in part)) if is_mark else tokenizer.encode(part, add_special_tokens=False)
    return ids


def test_the_example_fills_in_a_scaffold(client: openai.OpenAI) -> None:
    example = runpy.run_path(str(EXAMPLES / "scaffold.py"))
    canvas = example["scaffold"](["name:text:3", "age:number:2"], "<|mdm_mask|>")
    reply = example["fill"](client, "JSON name bob, age 42", canvas)
    assert re.fullmatch(r'\{"name": ".*", "age": .*\}', reply)


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("chat/completions", {"messages": MESSAGES, "suffix": "a"}, "suffix is 'a', allowed are null here, and text"),
        ("completions", {"prompt": "a", "suffix": "b", "echo": True}, "echo is True, allowed are false beside suffix"),
        ("completions", {"prompt": "a", "suffix": 3}, "suffix is 3, allowed are null and text"),
        ("completions", {"prompt": "a", "suffix": "b" * 500}, "whole blocks of"),
        (
            "completions",
            {"prompt": "a", "suffix": "b", "vllm_xargs": {"dllm_canvas": "a"}},
            "dllm_canvas is set too, and says what lies behind the reply",
        ),
        (
            "completions",
            {"prompt": "a", "max_tokens": 4, "vllm_xargs": {"dllm_canvas": [None, 5]}},
            "max_tokens is 4, but dllm_canvas has 2 tokens; allowed are 2 and none",
        ),
    ],
)
def test_what_cannot_be_filled_in_is_a_400(
    client: openai.OpenAI, path: str, body: dict[str, Any], message: str
) -> None:
    for is_streamed in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.post(f"/{path}", body={"model": MODEL, "stream": is_streamed, **body}, cast_to=object)
        assert message in str(refused.value)
    assert chat(client, max_tokens=8).choices


def test_the_page_says_what_a_client_can_ask_for(client: openai.OpenAI) -> None:
    page = (Path(__file__).parents[2] / "docs/openai.md").read_text()
    tables = "\n".join(client_matrix.lines(client_matrix.Server(client, MODEL)))
    assert page.endswith(tables + "\n")
