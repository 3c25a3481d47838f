"""Expressions as automata: what they accept, what is refused, and within which bounds."""

import errno
import os
import random
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.constraint.brute import END, TEXTS, VOCAB, automaton_of, random_regex
from vllm_dllm.constraint import compile as token_compile
from vllm_dllm.constraint.compile import TokenBytes, compile_tokens
from vllm_dllm.constraint.regex import (
    ConstraintError,
    UnfinishedError,
    build_table,
    built_apart,
    byte_automaton,
    parse_table,
)


def test_accepts_what_the_expression_does():
    for number in range(100):
        rng = random.Random(number)
        regex = random_regex(rng)
        found = parse_table(build_table(regex))
        for _ in range(50):
            text = bytes(rng.choice(b"ab") for _ in range(rng.randint(0, 8)))
            assert found.accepts(text) == (re.fullmatch(regex.encode(), text) is not None), (regex, text)


@pytest.mark.parametrize(("regex", "text", "other"), [("é|x", "é", "e"), ("[^a]", "日", "a"), ("a.c", "a日c", "a\nc")])
def test_texts_are_utf_8(regex: str, text: str, other: str):
    found = byte_automaton(regex)
    assert found.accepts(text.encode())
    assert not found.accepts(other.encode())


def test_has_no_more_states_than_it_needs():
    assert len(byte_automaton("(?:ab|cb)(?:ab|cb)").step) == 6  # two of each, the last one and the dead one
    assert len(byte_automaton("[a-c]{3}").step) == 5


def test_a_distance_is_the_fewest_tokens_to_an_end():
    automaton = automaton_of("aab(?:ab){2}")
    assert automaton.distance[0] == 3  # aab ab ab
    assert automaton.distance[automaton.done] == 0


def test_equal_tokens_are_one_class():
    automaton = automaton_of("[ab]+")
    assert len(set(automaton.class_of[[*TEXTS]].tolist())) == 1
    assert automaton.class_of[END] == automaton.end_class
    assert automaton.bits(np.ones(automaton.step.shape[1], dtype=bool)).dtype == np.int32


@pytest.mark.parametrize("regex", ["(", "a)|(b", r"(a)\1", "(?=a)a", "^ab$"])
def test_what_is_no_regular_expression_says_so(regex: str):
    with pytest.raises(ConstraintError, match="no regular expression that can be built"):
        byte_automaton(regex)


@pytest.mark.parametrize("regex", ["(a|b)*a(a|b){14}", "(?:(?:(?:[a-z]{0,100}){0,100}){0,100}){0,100}"])
def test_too_many_states_are_refused_within_bounds(regex: str):
    with pytest.raises(ConstraintError, match="has more than 20000 states, or takes more than 5 s"):
        byte_automaton(regex)


def test_a_refusal_is_found_once(monkeypatch: pytest.MonkeyPatch):
    runs = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: runs.append(args) or run(*args, **kwargs))
    for _ in range(3):
        with pytest.raises(ConstraintError, match="no regular expression that can be built"):
            byte_automaton("(found once")
    assert len(runs) == 1


def test_what_was_not_built_in_time_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    def busy(*_args: object, **_options: object) -> None:
        raise subprocess.TimeoutExpired("build", 60)

    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", busy)
        with pytest.raises(ConstraintError, match="not built within 60 s of a busy machine; try it again"):
            byte_automaton("late|later")
    assert byte_automaton("late|later").accepts(b"later")


def test_what_the_server_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "outlines_core.py").write_text("raise ImportError('not here')")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
        with pytest.raises(
            UnfinishedError, match=r"the server cannot load outlines_core, .* \(not here\); pip install outlines_core$"
        ):
            byte_automaton("lacking")
    assert byte_automaton("lacking").accepts(b"lacking")


@pytest.mark.parametrize(
    ("status", "stderr", "error", "said"),
    [
        (1, b"Traceback\nRecursionError: too deep\n", ConstraintError, "with RecursionError: too deep; simplify it"),
        (1, b"Traceback\nMemoryError\n", ConstraintError, "has more than 20000 states, or takes more than 5 s"),
        (
            -6,
            b"memory allocation of 99 bytes failed",
            ConstraintError,
            "has more than 20000 states, or takes more than",
        ),
        (-signal.SIGXCPU, b"", ConstraintError, "has more than 20000 states, or takes more than 5 s"),
        (
            1,
            b"Traceback\nBlockingIOError: busy\n",
            UnfinishedError,
            "ended with BlockingIOError: busy, .* try it again",
        ),
        (1, b"Traceback\nImportError: no\n", UnfinishedError, "ended with ImportError: no, .* try it again"),
        (
            127,
            b"error while loading shared libraries",
            UnfinishedError,
            "ended with error while loading .* try it again",
        ),
        (1, b"", UnfinishedError, "ended with status 1, .* try it again"),
        (-signal.SIGSEGV, b"", ConstraintError, "ended with signal 11; simplify it"),
        (-signal.SIGABRT, b"thread has overflowed its stack", ConstraintError, "overflowed its stack; simplify it"),
        (1, b"Traceback\nRuntimeError: can't start new thread", UnfinishedError, "new thread, .* try it again"),
        (-9, b"", UnfinishedError, "ended with signal 9, .* try it again, and see that the server has memory left"),
        (0, b"", UnfinishedError, "wrote b'' and no table; try it again"),
    ],
)
def test_how_the_process_ended_is_told(
    status: int, stderr: bytes, error: type[ConstraintError], said: str, monkeypatch: pytest.MonkeyPatch
):
    done = subprocess.CompletedProcess([], status, b"", stderr)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(ConstraintError, match=said) as caught:
        built_apart("module", "", "")
    assert type(caught.value) is error


@pytest.mark.parametrize("fault", [OSError(errno.EAGAIN, "busy"), OSError(errno.ENOMEM, "none left"), MemoryError()])
def test_a_process_that_is_not_started_is_tried_again(fault: Exception, monkeypatch: pytest.MonkeyPatch):
    def fail(*_args: object, **_options: object) -> None:
        raise fault

    regex = f"not (yet|at once){type(fault).__name__}{fault}".replace("[", "").replace("]", "")
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", fail)
        with pytest.raises(UnfinishedError, match=r"could not be run \((.*busy|.*none left|no memory)\); try it again"):
            byte_automaton(regex)
    assert byte_automaton(regex).accepts(regex.replace("(yet|at once)", "yet").encode())


def test_a_process_that_is_killed_is_tried_again(monkeypatch: pytest.MonkeyPatch):
    run = subprocess.run
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", lambda _, **options: run(["sh", "-c", "kill -9 $$"], **options))
        with pytest.raises(UnfinishedError, match=r"ended with signal 9, .* try it again"):
            byte_automaton("killed|slain")
    assert byte_automaton("killed|slain").accepts(b"slain")


def test_a_long_expression_is_refused():
    with pytest.raises(
        ConstraintError, match="has 200000 characters as a regular expression, allowed are 131072; shorten it"
    ):
        byte_automaton("a" * 200_000)


def test_a_large_table_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(token_compile, "MAX_CELLS", 100)
    with pytest.raises(ConstraintError, match="allowed are 100 cells"):
        automaton_of("(?:ab|ba){20}")


def test_what_no_token_can_say_is_refused():
    with pytest.raises(ConstraintError, match="no text of this model's tokens meets it"):
        compile_tokens(parse_table(build_table("c")), TokenBytes.of(TEXTS, VOCAB, [END]))


def test_a_text_that_another_does_not_accept():
    inner, outer = byte_automaton("ab|b"), byte_automaton("[ab]+")
    assert not inner.escapes(outer)
    assert outer.escapes(inner)
