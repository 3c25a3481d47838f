"""Free text with calls in it, as an automaton over bytes: what begins like a call is one.

An expression for text in which some words do not occur is long; automata for it are small (Aho and Corasick, 1975).
They are built as those of expressions are: in a process of its own, within bounds of time and memory.
"""

import json
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dllm.constraint.automaton import BoolArray, IntArray
from vllm_dllm.constraint.regex import (
    MAX_BYTE_STATES,
    ByteAutomaton,
    ConstraintError,
    bounded_input,
    build_table,
    built_apart,
    parse_table,
    smallest,
    write_table,
)

_NUM_BYTES = 256
_BEFORE, _CALL, _BETWEEN, _BEHIND = range(4)
"""Where a text is: before its first call, in one, between two, and behind the last one that it may have."""

_Place = tuple[int, int]


def text_with_calls(calls: str, words: Sequence[bytes], *, needs_one: bool, has_one: bool) -> ByteAutomaton:
    """Return what `calls_in_text` does, for calls that an expression describes. Raises: ConstraintError."""
    flags = {"needs_one": needs_one, "has_one": has_one}
    return built_apart(__name__, calls, json.dumps([calls, [word.decode() for word in words], flags]))


def _given(calls: str, words: list[str], flags: dict[str, bool]) -> ByteAutomaton:
    return calls_in_text(parse_table(build_table(calls)), [word.encode() for word in words], **flags)


def calls_in_text(
    calls: ByteAutomaton, words: Sequence[bytes], *, needs_one: bool = False, has_one: bool = False
) -> ByteAutomaton:
    """Return the automaton of texts with calls in them.

    Args:
        calls: what a call may be.
        words: that the text around calls does not have; those that calls begin with are among them.
        needs_one: whether there is a call at least.
        has_one: whether the text ends with its first call.

    Raises: ConstraintError for one with too many states.
    """
    text, call = _without(words), calls.step[:, calls.class_of]
    _, some, class_of = np.unique(np.concatenate([text, call]), axis=1, return_index=True, return_inverse=True)
    machine = _Machine(text[:, some].tolist(), call[:, some].tolist(), calls, has_one)
    number = {machine.closed({(_BEFORE, 0)}): 0}
    rows, left = [], deque(number)
    while left:
        places = left.popleft()
        row = [machine.after(places, kind) for kind in range(len(some))]
        for there in row:
            if there not in number:
                number[there] = len(number)
                left.append(there)
        rows.append([number[there] for there in row])
        if len(number) > MAX_BYTE_STATES:
            raise ConstraintError(
                f"its automaton has more than {MAX_BYTE_STATES} states; use fewer tools, or shorter parameters"
            )
    step = np.array(rows, dtype=np.int32)[:, class_of.reshape(-1)]
    return _with_dead_last(step, list(number), needs_one=needs_one)


@dataclass(frozen=True, slots=True)
class _Machine:
    """Goes on byte by byte, in all places that a text may be at; bytes that are alike to it are of one kind."""

    text: list[list[int]]  # [num_states][num_kinds], around calls; -1: a word is complete
    call: list[list[int]]  # [num_states][num_kinds], of `calls`
    calls: ByteAutomaton
    has_one: bool

    def closed(self, places: set[_Place]) -> frozenset[_Place]:
        """Add where a text is, too: a call may begin anywhere around calls, and end where it is whole."""
        found = set(places)
        if any(where == _CALL and self.calls.is_accepting[state] for where, state in places):
            found.add((_BEHIND, 0) if self.has_one else (_BETWEEN, 0))
        if any(where in (_BEFORE, _BETWEEN) for where, _ in found):
            found.add((_CALL, 0))
        return frozenset(found)

    def after(self, places: frozenset[_Place], kind: int) -> frozenset[_Place]:
        """Return where a text is behind one more byte."""
        there = {
            (where, (self.call if where == _CALL else self.text)[state][kind])
            for where, state in places
            if where != _BEHIND
        }
        return self.closed({(where, state) for where, state in there if not self._is_dead(where, state)})

    def _is_dead(self, where: int, state: int) -> bool:
        return state == self.calls.dead if where == _CALL else state < 0


def _with_dead_last(step: IntArray, places: list[frozenset[_Place]], *, needs_one: bool) -> ByteAutomaton:
    accepts = {_BETWEEN, _BEHIND} if needs_one else {_BEFORE, _BETWEEN, _BEHIND}
    is_accepting: BoolArray = np.array([any(where in accepts for where, _ in each) for each in places])
    dead = np.full((1, step.shape[1]), len(step), dtype=np.int32)
    nowhere = next((place for place, each in enumerate(places) if not each), None)
    if nowhere is not None:
        step = np.where(step == nowhere, len(step), step).astype(np.int32)
    return smallest(np.concatenate([step, dead]), np.append(is_accepting, False))


def _without(words: Sequence[bytes]) -> IntArray:
    """Return the automaton of texts without some words; [num_states, 256], -1 where one would be complete."""
    step, fail, is_word = [[-1] * _NUM_BYTES], [0], [False]
    for word in words:
        state = 0
        for byte in word:
            if step[state][byte] < 0:
                step[state][byte] = len(step)
                step.append([-1] * _NUM_BYTES)
                fail.append(0)
                is_word.append(False)
            state = step[state][byte]
        is_word[state] = True
    order = deque([0])
    while order:
        state = order.popleft()
        is_word[state] |= is_word[fail[state]]
        for byte in range(_NUM_BYTES):
            child, other = step[state][byte], step[fail[state]][byte] if state else 0
            if child < 0:
                step[state][byte] = other
            else:
                fail[child] = other
                order.append(child)
    return np.array([[-1 if is_word[each] else each for each in row] for row in step], dtype=np.int32)


if __name__ == "__main__":
    given = json.loads(bounded_input())
    sys.stdout.buffer.write(write_table(lambda: _given(*given)))
