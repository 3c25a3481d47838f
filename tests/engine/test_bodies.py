"""What is wrong with the JSON of a request is told in its client's words by the app of one of our models alone."""

import asyncio
import inspect
import json
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from tests.engine.app import PASSED, app_of, arguments, client_of
from vllm_dllm.engine.bodies import check_body, check_in, check_lines

CHAT, COMPLETIONS, RESPONSES, MESSAGES = (
    *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"),
)
TALK = [{"role": "user", "content": "a"}]
COMPLETE: dict[str, dict[str, Any]] = {
    CHAT: {"messages": TALK},
    COMPLETIONS: {"prompt": "a"},
    RESPONSES: {"input": "a"},
    MESSAGES: {"model": "m", "messages": TALK, "max_tokens": 4},
}
"""What each API takes."""


def says(content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = app_of("LLaDAModelLM")
    check_in(app)
    return client_of(app)


def reply_to(client: TestClient, path: str, body: object) -> tuple[int, str]:
    """Status and message of a reply, which has the form of its API."""
    reply = client.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    content = reply.json()
    assert set(content) == ({"type", "error"} if path.startswith(MESSAGES) else {"error"}), content
    return reply.status_code, content["error"]["message"]


MALFORMED: list[tuple[str, dict[str, Any], str]] = [
    *((CHAT, {"messages": value}, "messages is ") for value in (None, [], 5, "a", {})),
    *((MESSAGES, {"messages": value}, "messages is ") for value in (None, 5, "a", {})),
    *((path, {"messages": [5]}, "messages[0] is 5, allowed are objects") for path in (CHAT, MESSAGES)),
    (CHAT, {"messages": [{"role": 5, "content": "a"}]}, "messages[0].role is 5, allowed are 'user', 'assistant'"),
    (MESSAGES, {"messages": [{"role": "x", "content": "a"}]}, "messages[0].role is 'x', allowed are 'user', 'assis"),
    (MESSAGES, {"messages": [{"role": "user"}]}, "messages[0].content is missing; add it to the request"),
    *((path, {"messages": says(5)}, "messages[0].content is 5, allowed are text ") for path in (CHAT, MESSAGES)),
    (CHAT, {"messages": says(None)}, "messages[0].content is None, allowed are text or lists"),
    *((path, {"messages": says([5])}, "messages[0].content[0] is 5, allowed are obj") for path in (CHAT, MESSAGES)),
    *((path, {"messages": says([{"type": "zz"}])}, "messages[0].content[0].type is 'zz'") for path in (CHAT, MESSAGES)),
    (CHAT, {"messages": says([{"type": "text"}])}, "messages[0].content[0].text is None, allowed are text"),
    (
        CHAT,
        {"messages": says([{"type": "image_url"}])},
        "messages[0].content[0].type is 'image_url', allowed are 'text'",
    ),
    (CHAT, {"messages": says([{"image_url": "a"}])}, "messages[0].content[0].type is None, allowed are 'text'"),
    (
        MESSAGES,
        {"messages": says([{"type": "image"}])},
        "messages[0].content[0].type is 'image', allowed are parts of t",
    ),
    (
        MESSAGES,
        {"messages": says([{"type": "tool_result", "content": [{"type": "image"}]}])},
        "messages[0].content[0].content[0].type is 'image'",
    ),
    (RESPONSES, {"input": says([{"type": "input_image"}])}, "input[0].content[0].type is 'input_image', allowed are p"),
    *((RESPONSES, {"input": value}, "input is ") for value in (None, 5, {"a": 1})),
    (RESPONSES, {"input": says(5)}, "input[0].content is 5, allowed are text or lists"),
    (RESPONSES, {"input": says([{"type": "zz"}])}, "input[0].content[0].type is 'zz', allowed are 'input_text', 'out"),
    (RESPONSES, {"tools": 5}, "tools is 5, allowed are lists of objects"),
    (RESPONSES, {"tools": [{"type": "zz"}]}, "tools[0].type is 'zz', allowed are 'function', 'file_search'"),
    (CHAT, {"tools": [{"type": "function"}]}, "tools[0].function is missing; add it"),
    *(
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": value}]},
            f"messages[0].tool_calls{where}, allowed are",
        )
        for value, where in [
            (5, " is 5"),
            ([5], "[0] is 5"),
            ([{"id": 5}], "[0].id is 5"),
            ([{"id": "a"}], "[0].type is None"),
            ([{"id": "a", "type": "function", "function": {"name": "f"}}], "[0].function.arguments is None"),
        ]
    ),
    *((COMPLETIONS, {"prompt": value}, "prompt is ") for value in (None, 5, [], "", {"a": 1})),
    *(
        (COMPLETIONS, {"prompt": value}, f"prompt[{i}] is ")
        for value, i in [
            ([[]], 0),
            ([5, "a"], 1),
            ([[5], "a"], 1),
            (["a", ""], 1),
            ([[None]], 0),
            ([-1], 0),
            ([True], 0),
        ]
    ),
    *((path, {"model": 5}, "model is 5, allowed are text") for path in COMPLETE),
    *((path, {"temperature": "hot"}, "temperature is 'hot', allowed are numbers") for path in COMPLETE),
    *((path, {"user": "a\ud800"}, r"user has '\ud800' at character 1, which is half of a surr") for path in COMPLETE),
    *((path, {"x": [{"y\udfff": 1}]}, r"x[0] has '\udfff' at character 1") for path in COMPLETE),
    (COMPLETIONS, {"stop": 5}, "stop is 5, allowed are text or lists"),
    (
        COMPLETIONS,
        {"stop": ["a"] * 9},
        "stop is ['a', 'a', 'a', 'a', 'a', 'a', ...], allowed are text or at most 4 entries",
    ),
    (COMPLETIONS, {"seed": 2**64}, "seed is 18446744073709551616, allowed are numbers up to 9223372036854775807"),
    (COMPLETIONS, {"truncation_side": "up"}, "truncation_side is 'up', allowed are 'left' or 'right'"),
    (
        COMPLETIONS,
        {"vllm_xargs": {"a": None}},
        "vllm_xargs.a is None, allowed are text, whole numbers, numbers or lists",
    ),
    (MESSAGES, {"max_tokens": None}, "max_tokens is None, allowed are whole numbers"),
    (MESSAGES, {"thinking": {"type": "enabled"}}, "thinking.budget_tokens is missing; add it"),
    *(
        (path, {name: value}, f"{name} is {value!r}, which this API does not hand on")
        for path, name, value in [
            (MESSAGES, "min_p", 0.5),
            (MESSAGES, "bad_words", ["a"]),
            (RESPONSES, "min_tokens", 2),
        ]
    ),
    *((path, {"top_logprobs": 21}, "top_logprobs is 21, allowed are null and whole") for path in (CHAT, RESPONSES)),
    *((MESSAGES, {name: 2}, f"{name} is 2, which this API does not hand on") for name in ("logprobs", "top_logprobs")),
    (CHAT, {"logprob_token_ids": [5]}, "logprob_token_ids is [5], which this server's decoding does not"),
    *(
        (path, {"structured_outputs": {name: value}}, f"structured_outputs.{name} is {value!r}, allowed are")
        for path in (CHAT, COMPLETIONS)
        for name, value in {"regex": 5, "json": 5, "choice": "ab", "json_object": "x", "whitespace_pattern": []}.items()
    ),
    (COMPLETIONS, {"repetition_detection": {}}, "repetition_detection is {}, which this server's decoding does not"),
    (
        COMPLETIONS,
        {"prompt_logprobs": -1, "stream": True},
        "prompt_logprobs is -1, which this server's decoding does not",
    ),
    *((path, {"suffix": "a"}, "suffix is 'a', allowed are null here, and text at") for path in (CHAT, RESPONSES)),
    (COMPLETIONS, {"suffix": 5}, "suffix is 5, allowed are null and text"),
    (COMPLETIONS, {"suffix": "a", "echo": True}, "echo is True, allowed are false beside suffix"),
]


def test_what_is_given_of_an_answer_passes_vllms_classes(client: TestClient) -> None:
    """They know no null in lists, and a suffix of other models; a length that nobody sent is said to be none."""
    for changes in ({"suffix": "a"}, {"suffix": ""}, {"vllm_xargs": {"dllm_canvas": [5, None]}}):
        assert reply_to(client, COMPLETIONS, COMPLETE[COMPLETIONS] | changes) == (418, PASSED)
    body: dict[str, Any] = {"prompt": "b", "suffix": "a", "max_tokens": 3, "vllm_xargs": {"dllm_policy": "random"}}
    check_body(COMPLETIONS, body)
    assert body == {"prompt": "b", "max_tokens": 3, "vllm_xargs": {"dllm_policy": "random", "dllm_suffix": "a"}}
    for length, is_open_ended in (({}, True), ({"max_tokens": None}, True), ({"max_completion_tokens": 2}, False)):
        body = {"messages": TALK, "vllm_xargs": {"dllm_canvas": [5, None]}, **length}
        check_body(CHAT, body)
        assert body["vllm_xargs"] == {"dllm_canvas": [5, -1]} | ({"vllm_dllm_follows": 1} if is_open_ended else {})
    nested = {"token_ids": [5], "sampling_params": {"extra_args": {"dllm_canvas": [None]}}}
    check_body("/inference/v1/generate", nested)
    assert nested["sampling_params"] == {"extra_args": {"dllm_canvas": [-1], "vllm_dllm_follows": 1}}


@pytest.mark.parametrize(("path", "changes", "text"), MALFORMED, ids=[f"{a} {c[:40]}" for a, _, c in MALFORMED])
def test_a_malformed_body_is_refused_by_field(
    client: TestClient, path: str, changes: dict[str, Any], text: str
) -> None:
    status, message = reply_to(client, path, COMPLETE[path] | changes)
    assert status == 400
    assert message.startswith(text)
    assert "allowed " in message or "missing; add it" in message
    for raw in ("validation error", "Input should be", "loc'", "Param", "Union", "iterable", "logprobs must"):
        assert raw not in message
    for refused in ("'image'", "'input_image'"):
        assert refused not in message.partition("allowed ")[2]


@pytest.mark.parametrize("path", COMPLETE)
def test_a_body_that_is_no_object_is_refused_in_the_form_of_its_api(client: TestClient, path: str) -> None:
    for body in ([1], "a", 5, None):
        status, message = reply_to(client, path, body)
        assert (status, message[:7]) == (400, "body is")
    for content in (b"{", b"[" * 10**5, b'{"n": ' + b"9" * 5000 + b"}", b"\xff"):
        reply = client.post(path, content=content, headers={"content-type": "application/json"})
        assert reply.status_code == 400
        assert "the body of the request " in reply.json()["error"]["message"]
    reply = client.post(path, content=b"{}", headers={"content-type": "text/plain"})
    assert "Only 'application/json' is allowed" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        *((path, {}) for path in COMPLETE),
        *((COMPLETIONS, {"prompt": value}) for value in ([5, 6], [[5], [6]], ["a", "b"], "\N{GRINNING FACE}")),
        (CHAT, {"messages": says([{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}])}),
        (CHAT, {"messages": [{"role": "assistant", "content": None}, {"role": "poet", "content": ["a"]}]}),
        (CHAT, {"messages": [{"role": "assistant", "content": "a", "tool_calls": None}]}),
        (MESSAGES, {"messages": says([{"type": "tool_result", "tool_use_id": "a", "content": "b"}])}),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}),
        (RESPONSES, {"input": says([{"type": "input_text", "text": "a"}])}),
        (COMPLETIONS, {"logprobs": False}),
    ],
)
def test_what_is_well_formed_passes(client: TestClient, path: str, changes: dict[str, Any]) -> None:
    assert reply_to(client, path, COMPLETE[path] | changes) == (418, PASSED)


def test_other_apps_notice_nothing() -> None:
    """An app that this plugin has no part in, one of another model, and vLLM's classes of requests."""
    own = FastAPI()
    assert own.dependency_overrides == {}
    assert "vllm_dllm" not in FastAPI.build_middleware_stack.__module__
    client = client_of(app_of("Qwen3ForCausalLM"))
    assert client.app.dependency_overrides == {}  # type: ignore[attr-defined]
    assert "validation error" in reply_to(client, COMPLETIONS, {"prompt": 5})[1]
    assert reply_to(client, COMPLETIONS, {"prompt": "a", "logprobs": 1}) == (418, PASSED)


@pytest.fixture
def batch(monkeypatch: pytest.MonkeyPatch) -> Any:
    from vllm.entrypoints.launchers import run_batch

    monkeypatch.setattr(run_batch, "BatchRequestInput", run_batch.BatchRequestInput)
    return run_batch


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"messages": TALK, "structured_outputs": "x"}, "structured_outputs is 'x', allowed are null and an object"),
        ({"messages": TALK, "top_logprobs": 21}, "top_logprobs is 21, allowed are null and whole numbers"),
        ({"messages": TALK, "dllm_steps": 2}, "dllm_steps is 2 at the top of the request"),
        ({"messages": TALK, "temperature": "hot"}, "temperature is 'hot', allowed are numbers"),
        ({"messages": TALK, "tools": []}, "`tools` must not be an empty array"),
        ({"messages": None}, "messages is None, allowed are lists"),
        ({"messages": says("\ud800")}, "messages[0].content has '\\ud800' at character 0"),
        (5, "body is 5, allowed are objects"),
    ],
)
def test_a_line_of_a_batch_that_is_wrong_leaves_the_others_alone(batch: Any, body: object, text: str) -> None:
    line = {"custom_id": "0", "method": "POST", "url": CHAT, "body": body}
    wrong = wrong_of(batch, json.dumps(line))
    assert wrong.custom_id == "0"
    assert wrong.error.error.message.startswith(text)


@pytest.mark.parametrize(
    ("line", "custom_id", "text"),
    [
        ("{", "", "the line '{' is no JSON (Expecting property name"),
        ("[]", "", "body is [], allowed are objects"),
        ('{"custom_id": "a", "method": "POST"}', "a", "url is missing; add it"),
        ('{"method": "POST", "url": "/v1/chat/completions", "body": {}}', "", "custom_id is missing; add it"),
    ],
)
def test_a_line_that_is_no_request_leaves_the_others_alone(batch: Any, line: str, custom_id: str, text: str) -> None:
    wrong = wrong_of(batch, line)
    assert wrong.custom_id == custom_id
    assert wrong.error.error.message.startswith(text)


def wrong_of(batch: Any, line: str) -> Any:
    """Reply to a line, behind which another one is served."""
    check_lines()
    answered: list[str] = []

    async def serve(request: Any) -> Any:
        answered.append(request.messages[0]["content"])
        return batch.ChatCompletionResponse(model="m", choices=[], usage={"prompt_tokens": 1, "total_tokens": 1})

    async def run() -> list[Any]:
        lines = [line, json.dumps({"custom_id": "1", "method": "POST", "url": CHAT, "body": {"messages": TALK}})]
        requests = [batch.BatchRequestInput.model_validate_json(each) for each in lines]
        takes_tracker = "tracker" in inspect.signature(batch.run_request).parameters  # vLLM 0.32
        more = [batch.BatchProgressTracker()] if takes_tracker else []
        return [await batch.run_request(serve, request, *more) for request in requests]

    wrong, right = asyncio.run(run())
    assert answered == ["a"]
    assert right.error is None
    assert wrong.response.status_code == 400
    return wrong


def test_what_starts_a_server_or_a_batch_is_wrapped_for_our_models_alone(batch: Any) -> None:
    from vllm.entrypoints.launchers.api_server import entry

    from vllm_dllm.engine import serving

    serving.install()
    tasks = ("generate",)
    args, *configs = arguments("Qwen3ForCausalLM", "LLaDAModelLM")
    others, ours = (entry.build_app(args, tasks, config) for config in configs)
    assert (len(others.dependency_overrides), len(ours.dependency_overrides)) == (0, 1)
    inputs = batch.BatchRequestInput
    more = [None] * (len(inspect.signature(batch.run_batch).parameters) - 2)  # the file and its lines in vLLM 0.33
    for config, is_checked in zip(configs, (False, True), strict=True):
        with pytest.raises(AttributeError, match="get_supported_tasks"):  # this engine can do nothing
            asyncio.run(batch.run_batch(SimpleNamespace(model_config=config), args, *more))
        assert (batch.BatchRequestInput is not inputs) == is_checked
