"""Any JSON object, as deep as the automaton has states for: nesting is what a regular language cannot count."""

import functools
from dataclasses import dataclass, replace

import numpy as np

from vllm_dllm.constraint.regex import ByteAutomaton, byte_automaton, smallest
from vllm_dllm.constraint.schema import NUMBER, STRING

MAX_DEPTH = 4
"""Objects and arrays within each other, the outermost one counted."""

_SPACE, _COLON, _COMMA, _QUOTE = b' :,"'
_OPEN, _CLOSE = {ord("{"): "{", ord("["): "["}, {ord("}"): "{", ord("]"): "["}


@dataclass(frozen=True, slots=True)
class _State:
    """Where a text is: what is expected, how far a string or number is, what is open; one space may stand there."""

    mode: str
    open: str
    inner: int = 0
    may_space: bool = True


@functools.cache
def json_object_automaton() -> ByteAutomaton:
    """Build it: objects of JSON with up to one space between parts."""
    start, end = _State("value", "", may_space=False), _State("end", "", may_space=False)
    regexes = {"string": STRING, "number": NUMBER, "word": "true|false|null"}
    lexers = {kind: byte_automaton(regex) for kind, regex in regexes.items()}
    number, left = {start: 0, end: 1}, [start]
    rows: dict[int, list[tuple[int, int]]] = {}
    while left:
        state = left.pop()
        moves = [(byte, after) for byte in range(256) if (after := _after(state, byte, lexers))]
        for _, after in moves:
            if after not in number:
                number[after] = len(number)
                left.append(after)
        rows[number[state]] = [(byte, number[after]) for byte, after in moves]
    step = np.full((len(number) + 1, 256), len(number), dtype=np.int32)
    for row, moves_of in rows.items():
        for byte, target in moves_of:
            step[row, byte] = target
    return smallest(step, np.arange(len(step)) == 1)


def _after(state: _State, byte: int, lexers: dict[str, ByteAutomaton]) -> _State | None:
    """Return where a text is after one byte more; None where no object goes on so."""
    kind = "string" if state.mode == "key" else state.mode
    if kind in lexers:
        return _within(state, byte, lexers, lexers[kind])
    if byte == _SPACE:
        return replace(state, may_space=False) if state.may_space else None
    is_open = state.open
    if state.mode == "next" and byte == _COMMA:
        return _State("name" if is_open[-1] == "{" else "value", is_open)
    if state.mode in ("next", "first") and _CLOSE.get(byte) == is_open[-1]:
        return _State("next", is_open[:-1]) if len(is_open) > 1 else _State("end", "", may_space=False)
    return _begun(state, byte, lexers)


def _within(state: _State, byte: int, lexers: dict[str, ByteAutomaton], lexer: ByteAutomaton) -> _State | None:
    """Go on in a string, number or word; a number ends with what follows it."""
    inner = int(lexer.step[state.inner, lexer.class_of[byte]])
    if inner == lexer.dead:
        return _after(_State("next", state.open), byte, lexers) if lexer.is_accepting[state.inner] else None
    if lexer.is_accepting[inner] and state.mode != "number":
        return _State("colon" if state.mode == "key" else "next", state.open)
    return _State(state.mode, state.open, inner)


def _begun(state: _State, byte: int, lexers: dict[str, ByteAutomaton]) -> _State | None:
    """Begin a name, what follows it, or a value, where one is expected."""
    mode, is_open = state.mode, state.open
    if mode == "colon":
        return _State("value", is_open) if byte == _COLON else None
    if mode == "name" or (mode == "first" and is_open[-1] == "{"):
        return _after(_State("key", is_open), byte, lexers) if byte == _QUOTE else None
    if mode not in ("value", "first"):
        return None
    if byte in _OPEN and len(is_open) < MAX_DEPTH:
        return _State("first", is_open + _OPEN[byte]) if is_open or byte == ord("{") else None
    kinds = ("string", "number", "word") if is_open else ()
    begun = (_after(_State(kind, is_open), byte, lexers) for kind in kinds)
    return next((after for after in begun if after), None)
