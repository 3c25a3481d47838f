"""What a request may not ask for, in the client's words; defaults that no request could be served with."""

import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from vllm_dllm.engine.generation_defaults import check_generation_defaults, family_defaults
from vllm_dllm.engine.refusals import (
    REFUSED,
    RequestError,
    refuse_body,
    refuse_strict_tools,
    refuse_token_body,
    refuse_unsupported,
)
from vllm_dllm.errors import ConfigError

MESSAGES = [{"role": "user", "content": "a"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
STRICT = {"type": "function", "function": {**TOOL["function"], "strict": True}}  # type: ignore[dict-item]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
NAMED = {"type": "function", "function": {"name": "f"}}
FLAT_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}


@pytest.mark.parametrize(
    ("body", "parameter", "text"),
    [
        ({"response_format": {"type": "structural_tag"}}, "response_format", "is {'type': 'structural_tag'}"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format", "'text', 'json_object' or 'json_schema'"),
        ({"use_beam_search": True, "n": 2}, "use_beam_search", "is True"),
        ({"best_of": 3}, "best_of", "is 3"),
        ({"logprobs": 21}, "logprobs", "is 21, allowed are null and whole numbers from 0 to 20"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs", "is -1, allowed are null and whole numbers from 0"),
        ({"prompt": "a", "echo": True, "logprobs": 0}, "echo", "is True beside logprobs, but tokens of a prompt"),
        ({"logprob_token_ids": [5]}, "logprob_token_ids", "is [5]"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "is -1"),
        ({"prompt_embeds": "AAAA"}, "prompt_embeds", "is 'AAAA'"),
        ({"messages": MESSAGES, "echo": True}, "echo", "is True"),
        ({"guided_json": {"type": "object"}}, "guided_json", "is {'type': 'object'}"),
        ({"dllm_policy": "factor"}, "dllm_policy", "allowed is {'vllm_xargs': {'dllm_policy': ...}}; move it"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_is_refused_as_its_client_wrote_it(body: dict[str, Any], parameter: str, text: str) -> None:
    with pytest.raises(RequestError) as refused:
        refuse_body(body)
    assert refused.value.parameter == parameter
    assert str(refused.value).startswith(f"{parameter} is ")
    assert text in str(refused.value)
    assert re.search("allowed (is|are) ", str(refused.value))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"vllm_xargs": {"dllm_policy": "zz"}}, "vllm_xargs is {'dllm_policy': 'zz'}, where it has no effect"),
        ({"dllm_policy": "zz"}, "dllm_policy is 'zz', where it has no effect; allowed is {'sampling_params': {'extra"),
        ({"sampling_params": {"vllm_xargs": {"dllm_steps": 1}}}, "sampling_params.vllm_xargs is {'dllm_steps': 1}"),
        ({"sampling_params": {"dllm_steps": 1}}, "sampling_params.dllm_steps is 1, where it has no effect"),
        ({"sampling_params": {"logprobs": 21}}, "sampling_params.logprobs is 21, allowed are null and whole numbers"),
        ({"thinking_token_budget": 5, "sampling_params": {}}, "thinking_token_budget is 5"),
    ],
)
def test_a_body_of_token_ids_is_refused_where_its_client_wrote_it(body: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError, match="^" + re.escape(text)):
        refuse_token_body(body)
    refuse_token_body({"token_ids": [5], "sampling_params": {"extra_args": {"dllm_policy": "factor"}, "min_p": 0.1}})


@pytest.mark.parametrize(
    "body",
    [
        {"tools": [TOOL], "tool_choice": "auto", "response_format": {"type": "text"}, "logprobs": False, "best_of": 1},
        {"tools": [STRICT], "tool_choice": "none"},
        {"prompt": "a", "echo": True},
        {"text": {"format": {"type": "text"}}, "include": []},
        {"tool_choice": {"type": "auto"}, "tools": [{"name": "f", "input_schema": {}}]},
        {"tools": [STRICT], "tool_choice": "required", "response_format": {"type": "json_object"}},
        {"tools": [FLAT_TOOL], "tool_choice": {"type": "any"}},
        {"tools": [TOOL], "tool_choice": NAMED, "structured_outputs": {"regex": "a+"}},
        {"response_format": SCHEMA, "text": {"format": {"name": "a", "type": "json_schema", "schema": {}}}},
    ],
)
def test_what_asks_for_nothing_special_passes(body: dict[str, Any]) -> None:
    refuse_body(body)
    refuse_strict_tools(body, in_text=False, if_forced=True)


@pytest.mark.parametrize(
    ("body", "parameter"),
    [
        ({"tools": [TOOL, STRICT]}, "tools[1].function.strict"),
        ({"tools": [FLAT_TOOL]}, "tools[0].strict"),
        ({"tools": [FLAT_TOOL], "tool_choice": "auto"}, "tools[0].strict"),
        ({"tools": [FLAT_TOOL], "tool_choice": "required"}, "tools[0].strict"),
    ],
)
def test_strict_tools_that_no_parser_writes_down_are_refused(body: dict[str, Any], parameter: str) -> None:
    refuse_body(body)  # nobody knows the parser yet
    with pytest.raises(
        RequestError, match=r"is True where (no|a) tool is forced, but the server's tool parser"
    ) as refused:
        refuse_strict_tools(body, in_text=False, if_forced=False)
    assert refused.value.parameter == parameter
    refuse_strict_tools(body, in_text=True, if_forced=True)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"structured_outputs": "x"}, "structured_outputs is 'x', allowed are null and an object with one"),
        ({"structured_outputs": []}, "structured_outputs is [], allowed are null and an object with one"),
        ({"structured_outputs": {}}, "structured_outputs is {}, allowed are null and an object with one"),
        (
            {"response_format": {"type": ["text"]}},
            "response_format is {'type': ['text']}, allowed are null and an object",
        ),
        ({"tool_choice": [1]}, "tool_choice is [1], allowed are null, a word and an object"),
        ({"best_of": [1]}, "best_of is [1], which"),
        ({"thinking_token_budget": [5]}, "thinking_token_budget is [5], which"),
        ({"guided_json": {}}, "guided_json is {}, allowed are null, and the same as {'json': ...} in structured"),
        ({"dllm_steps": 8}, "dllm_steps is 8 at the top of the request, where it has no effect; allowed is {'vllm_xa"),
        ({"extra_body": {"vllm_xargs": {}}}, "extra_body is {'vllm_xargs': {}} at the top of the request, where"),
        ({"extra_args": {"dllm_steps": 8}}, "extra_args is {'dllm_steps': 8} at the top of the request, where it"),
        ({"sampling_params": {}}, "sampling_params is {} at the top of the request, where it has no effect; allowed"),
        ({"max_completion_tokens": 0}, "max_completion_tokens is 0, allowed are null and whole numbers from 1"),
        ({"max_output_tokens": -1}, "max_output_tokens is -1, allowed are null and whole numbers from 1"),
        ({"label_token_ids": [5, 6]}, "label_token_ids is [5, 6], but scoring needs the logprobs of a next token"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_body_is_refused_as_its_client_wrote_it(body: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError) as refused:
        refuse_body(body)
    assert str(refused.value).startswith(text)
    assert refused.value.parameter == next(iter(body))
    assert refused.value.value is None or refused.value.value in body.values()


def test_a_body_without_wishes_passes() -> None:
    """Null is no wish, whatever a sampling parameter of that name would say to it."""
    refuse_body(dict.fromkeys([*REFUSED, "structured_outputs", "best_of", "extra_body", "max_completion_tokens"]))
    refuse_body({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}, "include": 5, "stop": "a"})
    refuse_body({"logprobs": True, "top_logprobs": 20, "include": ["message.output_text.logprobs"], "prompt": "a"})
    refuse_body(
        {
            "best_of": 1,
            "logprobs": False,
            "echo": True,
            "presence_penalty": 1,
            "logit_bias": {"5": 1},
            "bad_words": ["a"],
        }
    )


def test_no_field_goes_unseen() -> None:
    """What an API's request makes of its fields is refused by the field's name, not by that of vLLM's parameter."""
    with pytest.raises(RequestError, match=r"^structured_outputs is a default of the server"):
        refuse_unsupported(CompletionRequest(prompt="a", response_format={"type": "json_object"}).to_sampling_params(8))
    with pytest.raises(RequestError, match=r"^prompt_logprobs is 4, which"):  # vLLM's own `echo` beside `logprobs`
        refuse_unsupported(CompletionRequest(prompt="a", echo=True, logprobs=4).to_sampling_params(8))


@pytest.mark.parametrize("temperature", [1e-40, 0.009, 2.5, 1e38, -1.0, float("nan"), float("inf"), -float("inf")])
def test_a_temperature_that_was_set_past_vllms_check_is_refused(temperature: float) -> None:
    params = SamplingParams()
    params.temperature = temperature
    with pytest.raises(RequestError, match=r"temperature is .*, allowed are 0 \(greedy\) and 0.01 to 2.0; give one"):
        refuse_unsupported(params)


@pytest.mark.parametrize("top_p", [0.0, 1.5, float("nan")])
def test_a_top_p_that_was_set_past_vllms_check_is_refused(top_p: float) -> None:
    params = SamplingParams()
    params.top_p = top_p
    with pytest.raises(RequestError, match=r"top_p is .*, allowed are numbers above 0 and up to 1"):
        refuse_unsupported(params)


def test_whole_numbers_of_numpy_pass_and_truth_values_do_not() -> None:
    refuse_unsupported(SamplingParams(seed=np.int64(3), max_tokens=np.int32(8), temperature=np.float32(0.5)))  # type: ignore[arg-type]
    for name in ("seed", "max_tokens"):
        for value in (True, np.True_, 1.5):
            params = SamplingParams()
            setattr(params, name, value)
            with pytest.raises(RequestError, match=f"{name} is .*, allowed are whole numbers"):
                refuse_unsupported(params)


@pytest.fixture
def caplog_vllm(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What our logger says; vLLM's configuration of logging decides whether the root logger hears of it."""
    logger = logging.getLogger("vllm.dllm")
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.propagate = propagate


def model_config(in_file: dict[str, Any], override: dict[str, Any], source: str = "auto") -> Any:
    return SimpleNamespace(
        model="some/model",
        architectures=["DreamModel"],
        generation_config=source,
        override_generation_config=override,
        try_get_generation_config=lambda: dict(in_file),
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("repetition_penalty", 0),
            ("repetition_penalty", 1e39),
            ("presence_penalty", 2.5),
            ("frequency_penalty", -3),
            ("min_p", 1.1),
        ),
        *(("temperature", 7.0), ("top_p", 0), ("top_k", 1.5), ("max_new_tokens", 0), ("temperature", "hot")),
        *(("temperature", -1), ("temperature", float("inf")), ("top_k", "x"), ("max_new_tokens", []), ("min_p", True)),
    ],
)
def test_a_checkpoints_default_that_no_request_can_have_is_left_out_with_a_warning(
    name: str, value: object, caplog_vllm: pytest.LogCaptureFixture
) -> None:
    config = model_config({name: value, "eos_token_id": 1}, {})
    check_generation_defaults(config)
    assert config.override_generation_config == {name: None}
    (record,) = caplog_vllm.records
    assert record.levelno == logging.WARNING
    said = record.getMessage()
    assert said.startswith(f"generation_config.json of some/model: {name} is {value!r}, and is left out: ")
    assert "--generation-config vllm" in said
    assert "instance" not in said
    # The family's value, which Dream has for three of them, comes in its place.
    family = {"temperature": 0.2, "top_p": 0.95, "max_new_tokens": 512}
    assert dict(family_defaults(config)) == family
    assert (f"Requests get {family[name]}, the family's" if name in family else "Requests get vLLM's default") in said
    sentence = f"override_generation_config.{name} is {value!r}, but requests without a {name} of their own"
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        check_generation_defaults(model_config({}, {name: value}, "vllm"))


@pytest.mark.parametrize(
    ("name", "value", "todo"),
    [
        *(("min_tokens", 4, "remove it"), ("logprobs", 1, "remove it"), ("n", 2, "remove it")),
        *(
            ("stop", ["a"], "remove it"),
            ("max_tokens", 8, "did you mean 'max_new_tokens'"),
            ("temprature", 0, "did you mean 'temperature'"),
        ),
    ],
)
def test_a_default_of_the_users_that_no_request_would_get_is_refused(name: str, value: object, todo: str) -> None:
    with pytest.raises(ConfigError, match=rf"^override_generation_config.{name} is .*, but no request .*; {todo}"):
        check_generation_defaults(model_config({}, {"temperature": 0.5, "eos_token_id": 1, name: value}))
    check_generation_defaults(model_config({name: value}, {name: None}))


def test_defaults_that_can_be_served_stay(caplog_vllm: pytest.LogCaptureFixture) -> None:
    file = {"repetition_penalty": 1.0, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "max_new_tokens": 512}
    config = model_config(file, {"temperature": 0.5})
    check_generation_defaults(config)
    assert config.override_generation_config == {"temperature": 0.5}
    config = model_config({"repetition_penalty": 1.1}, {}, "vllm")
    check_generation_defaults(config)
    assert config.override_generation_config == {}
    assert not caplog_vllm.records


@pytest.mark.parametrize(
    ("in_file", "override", "source", "expected"),
    [
        ({}, {}, "auto", {"temperature": 0.2, "top_p": 0.95, "max_new_tokens": 512}),
        ({"top_p": 0.8, "max_new_tokens": 9}, {}, "auto", {"temperature": 0.2}),
        ({"top_p": 0.8}, {"temperature": None}, "auto", {"temperature": 0.2, "max_new_tokens": 512}),
        ({}, {}, "vllm", {}),
        ({}, {}, "some/folder", {}),
    ],
)
def test_a_familys_defaults_are_behind_all_others(
    in_file: dict[str, Any], override: dict[str, Any], source: str, expected: dict[str, Any]
) -> None:
    assert family_defaults(model_config(in_file, override, source)) == expected
