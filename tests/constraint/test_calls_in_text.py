"""Free text with calls in it: the automaton against a scan of the text."""

import random
import re
import subprocess

import pytest

from vllm_dllm.constraint import calls_in_text as module
from vllm_dllm.constraint.calls_in_text import calls_in_text
from vllm_dllm.constraint.regex import ByteAutomaton, ConstraintError, build_table, parse_table
from vllm_dllm.constraint.tags import tag_automaton


def automaton(regex: str) -> ByteAutomaton:
    return parse_table(build_table(regex))


def accepted(text: bytes, call: str, words: list[bytes], needs_one: bool, has_one: bool) -> bool:
    """Split a text into free parts and calls in all ways."""
    whole = re.compile(call.encode())
    seen: dict[tuple[int, int], bool] = {}

    def from_(begin: int, num_calls: int) -> bool:
        key = (begin, min(num_calls, 1))
        if key not in seen:
            seen[key] = found(begin, num_calls)
        return seen[key]

    def found(begin: int, num_calls: int) -> bool:
        if has_one and num_calls:
            return begin == len(text)
        for end in range(begin, len(text) + 1):
            free = text[begin:end]
            if any(word in free for word in words):
                return False
            if end == len(text) and (num_calls or not needs_one):
                return True
            for stop in range(end + 1, len(text) + 1):
                if whole.fullmatch(text[end:stop]) and from_(stop, num_calls + 1):
                    return True
        return False

    return from_(0, 0)


CASES: list[tuple[str, list[bytes]]] = [
    ("<c>(?:1|22)</c>", [b"<c>"]),
    ("<c>1</c>|<c>x</c>", [b"<c>", b"x</"]),
    ("aabx", [b"aab"]),
    ("ab(?:cc)?x", [b"ab"]),
    ("<<c>1", [b"<<c", b"1<"]),
]


@pytest.mark.parametrize(("call", "words"), CASES, ids=lambda each: str(each))
@pytest.mark.parametrize("flags", [{}, {"needs_one": True}, {"has_one": True}, {"needs_one": True, "has_one": True}])
def test_accepts_what_splits_into_text_and_calls(call: str, words: list[bytes], flags: dict[str, bool]) -> None:
    found = calls_in_text(automaton(call), words, **flags)
    rng, pieces = (
        random.Random(1),
        ["<c>1</c>", "<c>22</c>", "<c>", "</c>", "aab", "ab", "cc", "<<c>1", "<", "x", "1", "a", "é"],
    )
    both = [0, 0]
    for _ in range(1500):
        text = "".join(rng.choices(pieces, k=rng.randrange(6))).encode()
        text = text[: rng.randrange(len(text) + 1)] if rng.random() < 0.3 else text
        expected = accepted(text, call, words, flags.get("needs_one", False), flags.get("has_one", False))
        assert found.accepts(text) == expected, text
        both[expected] += 1
    assert min(both) > 3


def test_what_no_text_is_has_no_state() -> None:
    found = calls_in_text(automaton("<c>1"), [b"<c>"])
    assert not found.is_accepting[found.dead]
    assert (found.step[found.dead] == found.dead).all()


def test_too_many_states_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, words = automaton("<c>1{20}"), [b"<c>"]
    monkeypatch.setattr(module, "MAX_BYTE_STATES", 40)
    assert calls_in_text(calls, words).accepts(b"<c>" + b"1" * 20)
    monkeypatch.setattr(module, "MAX_BYTE_STATES", 20)
    with pytest.raises(ConstraintError, match=r"^its automaton has more than 20 states; use fewer tools"):
        calls_in_text(calls, words)


def of_tag(argument: str, trigger: str = "<c>") -> ByteAutomaton:
    call = {"type": "tag", "begin": "<c>", "content": {"type": "const_string", "value": argument}, "end": "é"}
    return tag_automaton(
        {"type": "structural_tag", "format": {"type": "triggered_tags", "triggers": [trigger], "tags": [call]}}, ""
    )


def test_a_process_of_its_own_builds_it_within_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "calls_in_text", None)
    found = of_tag("1")
    assert found.accepts("a<c>1é<c".encode())
    assert not found.accepts(b"a<c>2")
    # By its states, or on a slow machine by its time.
    with pytest.raises(ConstraintError, match=r"has more than 20000 states[;,] .*use fewer tools"):
        of_tag("x" * 17_500, "y" * 3_000)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], -24, b"", b""))
    with pytest.raises(ConstraintError, match=r"takes more than 5 s to build: .* or use fewer tools"):
        of_tag("1")
