"""Free text with calls in it, as an automaton over bytes: what begins like a call is one.

An expression for text in which some words do not occur is long; automata for it are small (Aho and Corasick, 1975).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dllm.constraint.automaton import BoolArray, IntArray
from vllm_dllm.constraint.regex import MAX_BYTE_STATES, ByteAutomaton, ConstraintError, smallest

_NUM_BYTES = 256
_BEFORE, _CALL, _BETWEEN, _BEHIND = range(4)
"""Where a text is: before its first call, in one, between two, and behind the last one that it may have."""

_Place = tuple[int, int]


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
    machine = _Machine(_without(words), calls.step[:, calls.class_of], calls, has_one)
    alike = np.concatenate([machine.text, machine.call])
    _, some, class_of = np.unique(alike, axis=1, return_index=True, return_inverse=True)
    number = {machine.closed({(_BEFORE, 0)}): 0}
    rows, left = [], deque(number)
    while left:
        places = left.popleft()
        row = [machine.after(places, byte) for byte in some.tolist()]
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
    """Goes on byte by byte, in all places that a text may be at."""

    text: IntArray  # [num_states, 256], around calls; -1: a word is complete
    call: IntArray  # [num_states, 256], of `calls`
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

    def after(self, places: frozenset[_Place], byte: int) -> frozenset[_Place]:
        """Return where a text is behind one more byte."""
        there = {
            (where, int((self.call if where == _CALL else self.text)[state, byte]))
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
