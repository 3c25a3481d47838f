"""What judges thousands of generated answers finds those that are wrong; without an engine."""

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.constraint_fuzz import Fuzz, draw, fitted, judge, requests_of
from benchmarks.fuzz.asked import KINDS, Asked, draw_asked, is_one_of, matches, meets
from benchmarks.fuzz.bad import COMPLETIONS
from benchmarks.fuzz.calls import Call, draw_calls, read_answer
from benchmarks.fuzz.requests import POLICIES, Drawn, Shape
from benchmarks.soak import ANSWERED, REFUSED, WRONG, Soak

SHAPE = Shape(376, range(4, 200), 8)


def output(tokens: list[int], text: str) -> Any:
    numbers = {"dllm": {"accepted": 2}}
    return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tokens, text=text)], kv_transfer_params=numbers)


def judged(on: Any, off: Any, asked: Asked | None) -> Fuzz:
    fuzz = Fuzz()
    judge(fuzz, 7, Drawn([5], {"max_tokens": 4}, {"dllm_policy": "static"}, asked), {"on": on, "off": off})
    return fuzz


def test_what_is_wrong_is_a_fault_and_what_is_right_is_none() -> None:
    asked = Asked("regex", {"regex": "a+"}, matches("a+"))
    right = judged(output([5, 1], "aa"), output([5, 1], "aa"), asked)
    assert (right.faults, dict(right.outcomes)) == ([], {"regex": 1, "drafts that came true": 2})
    (violated,) = judged(output([5, 1], "ab"), output([5, 1], "ab"), asked).faults
    assert violated.startswith("violated: request 7, ")
    (unequal,) = judged(output([5, 1], "a"), output([5, 6], "a"), asked).faults
    assert unequal.startswith("unequal: request 7, ")
    (other,) = judged(output([5, 1], "a"), ValueError("no"), asked).faults
    assert other.startswith("unequal")
    refused = judged(ValueError("x is 3"), ValueError("x is 3"), asked)
    assert (refused.faults, dict(refused.outcomes)) == ([], {"regex refused": 1})


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (matches("(a|ab)c"), ["ac", "abc"], ["a", "abcc", ""]),
        (is_one_of(["yes", "no"]), ["yes"], ["ye", "yesno"]),
        (meets({"type": "object"}), ["{}", '{"a": [1]}'], ["[]", "{", ""]),
        (meets({"type": "string", "format": "time"}), ['"10:00:00Z"'], ['"10:00:00"', '"25:00:00Z"']),
        (meets({"type": "string", "format": "date"}), ['"2024-02-28"'], ['"2024-02-30"', '"0000-01-01"']),
        (meets({"type": "string", "format": "date-time"}), ['"2024-02-28T10:00:00Z"'], ['"2024-02-28"', '"x"']),
        (meets({"type": "string", "format": "ipv4"}), ['"1.2.3.4"'], ['"1.2.3.256"']),
        (meets({"type": "array", "maxItems": 1, "items": {"minimum": 2}}), ["[]", "[2]"], ["[1]", "[2, 2]"]),
    ],
)
def test_checks_tell_right_from_wrong(check: Any, right: list[str], wrong: list[str]) -> None:
    for text in right:
        check(text)
    for text in wrong:
        with pytest.raises(ValueError):  # noqa: PT011 - of any words
            check(text)


def test_a_run_has_every_kind_and_is_the_same_again() -> None:
    drawn = [draw(3, number, SHAPE, []) for number in range(1200)]
    assert {each.asked.kind if each.asked else "free" for each in drawn} == {"free", *KINDS}
    assert {each.options["dllm_policy"] for each in drawn} == {*POLICIES}
    again = draw(3, 17, SHAPE, [])
    assert (again.prompt, again.sampling, again.options) == (drawn[17].prompt, drawn[17].sampling, drawn[17].options)
    names = [name for name, _, _ in requests_of(range(1200), drawn, random.Random(0))]
    assert {name for name in names if not name.startswith("abort")} == {
        f"{k} {i}" for k in ("on", "off") for i in range(1200)
    }


def test_what_is_too_short_is_sent_again_with_what_is_needed() -> None:
    drawn = Drawn([5], {"max_tokens": 4, "seed": 1}, {"dllm_policy": "static", "dllm_steps": 4}, None)
    again = fitted(drawn, "max_tokens is 4, but ...; allowed are 11 and more; raise max_tokens")
    assert again is not None
    assert (again.sampling, again.options) == ({"max_tokens": 11, "seed": 1}, {"dllm_policy": "static"})
    assert fitted(drawn, "another refusal") is None


def test_answers_are_read_whole_and_from_chunks() -> None:
    call = Call(COMPLETIONS, {"n": 2}, matches("ab?"))
    chunks = [
        {"choices": [{"index": 1, "text": "a", "token_ids": [7], "finish_reason": None}]},
        {"choices": [], "dllm_canvas": {"index": 0}},
        {"choices": [{"index": 0, "text": "a", "token_ids": [7], "finish_reason": "stop"}]},
        {"choices": [{"index": 1, "text": "b", "token_ids": [8], "finish_reason": "length"}]},
    ]
    assert read_answer(call, [json.dumps(chunk) for chunk in chunks]) == [[7], [7, 8]]
    with pytest.raises(RuntimeError, match="not whole"):
        read_answer(call, [json.dumps(chunk) for chunk in chunks[:3]])
    with pytest.raises(RuntimeError, match="violated"):
        read_answer(call, [json.dumps(chunk) for chunk in [*chunks, *chunks[3:]]])


def test_an_answer_is_compared_with_that_alone() -> None:
    calls = draw_calls(0, 3, SHAPE, POLICIES)
    soak = Soak(calls, 9, alone=[[[7]], "refused", [[8]]])
    assert [soak.judge(0, [[7]]), soak.judge(1, "refused"), soak.judge(2, [[7]])] == [ANSWERED, REFUSED, WRONG]
    assert "gave [[8]] alone, then [[7]]" in soak.messages[0]
    assert soak.judge(1, [[7]]) == WRONG


def test_constraints_are_drawn_from_a_seed_alone() -> None:
    assert [draw_asked(random.Random(5)).params for _ in range(2)] == [draw_asked(random.Random(5)).params] * 2
