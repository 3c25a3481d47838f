"""From bytes to tokens: what the tokens of a vocabulary do to the states of an automaton over bytes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dllm.constraint.automaton import Automaton, BoolArray, IntArray
from vllm_dllm.constraint.regex import ByteAutomaton, ConstraintError

MAX_CELLS = 1 << 22
"""Of an automaton's table, states times classes: 16 MB, and some 10 ms a step."""


@dataclass(frozen=True, eq=False)
class TokenBytes:
    """The bytes of a vocabulary's tokens, longest first, column by column."""

    ids: IntArray  # [num_tokens]
    columns: tuple[NDArray[np.uint8], ...]  # byte n of the tokens that have one, which are the first ones
    vocab_size: int
    end_ids: tuple[int, ...]  # tokens that end a reply; they have no bytes

    @classmethod
    def of(cls, tokens: Mapping[int, bytes], vocab_size: int, end_ids: Iterable[int]) -> "TokenBytes":
        """Take the bytes of tokens by id; the ids that end a reply, or have no bytes, or are no ids are left out."""
        ends = tuple(dict.fromkeys(end_ids))
        texts = [(token, text) for token, text in tokens.items() if text and token not in ends and token < vocab_size]
        texts.sort(key=lambda each: -len(each[1]))
        lengths = np.array([len(text) for _, text in texts], dtype=np.int64)
        flat = np.frombuffer(b"".join(text for _, text in texts), dtype=np.uint8)
        begin = np.cumsum(lengths) - lengths
        longest = int(lengths.max(initial=0))
        columns = tuple(flat[begin[: int((lengths > place).sum())] + place] for place in range(longest))
        return cls(np.array([token for token, _ in texts], dtype=np.int32), columns, vocab_size, ends)


def compile_tokens(over_bytes: ByteAutomaton, tokens: TokenBytes) -> Automaton:
    """Return the automaton of a constraint over the tokens of a vocabulary.

    Raises: ConstraintError if there are too many states, or if no text of these tokens is accepted.
    """
    step, class_of = _token_steps(over_bytes, tokens)
    live = _live(step, over_bytes.is_accepting)
    if not live[0]:
        raise ConstraintError("no text of this model's tokens meets it; loosen it")
    kept = np.flatnonzero(live)
    number = np.full(len(step), len(kept) + 1, dtype=np.int32)  # done, dead
    number[kept] = np.arange(len(kept))
    done, dead = len(kept), len(kept) + 1
    _check_size(dead + 1, step.shape[1])
    columns, inverse = _distinct(number[step[kept]])
    small = np.full((dead + 1, columns.shape[1] + 1), dead, dtype=np.int32)
    small[:done, :-1] = columns
    end_class = columns.shape[1]
    accepting = over_bytes.is_accepting[kept]
    small[:done, end_class][accepting] = done
    small[done, end_class] = done
    class_of = inverse[class_of]
    class_of[[each for each in tokens.end_ids if each < tokens.vocab_size]] = end_class
    return Automaton(small, class_of, np.concatenate([accepting, [True, False]]), end_class)


def _token_steps(over_bytes: ByteAutomaton, tokens: TokenBytes) -> tuple[IntArray, IntArray]:
    """Run all tokens from all states, byte by byte, equal ones once.

    Returns: what each kind of token does, [num_states, num_kinds], kind 0 nothing but dead; and the kind of each id,
        [vocab_size].
    """
    num_states, num_bytes = over_bytes.step.shape
    dead = np.full(num_states, over_bytes.dead, dtype=np.int32)
    kinds = [dead, np.arange(num_states, dtype=np.int32)]
    known = {kind.tobytes(): number for number, kind in enumerate(kinds)}
    kind_of = np.ones(len(tokens.ids), dtype=np.int64)  # of the bytes read so far; 1: none
    for column in tokens.columns:
        alive = np.flatnonzero(kind_of[: len(column)])
        before = kind_of[alive] * num_bytes + over_bytes.class_of[column[alive]]
        pairs, inverse = np.unique(before, return_inverse=True)
        after = np.empty(len(pairs), dtype=np.int64)
        for place, pair in enumerate(pairs.tolist()):
            kind = over_bytes.step[kinds[pair // num_bytes], pair % num_bytes]
            after[place] = known.setdefault(kind.tobytes(), len(kinds))
            if after[place] == len(kinds):
                kinds.append(kind)
                _check_size(num_states, len(kinds))
        kind_of[alive] = after[inverse.reshape(-1)]
    class_of = np.zeros(tokens.vocab_size, dtype=np.int32)
    class_of[tokens.ids] = kind_of
    used, place_of = np.unique(np.append(0, class_of), return_inverse=True)  # beginnings of tokens are none themselves
    return np.stack([kinds[kind] for kind in used], axis=1), place_of.reshape(-1)[1:].astype(np.int32)


def _live(step: IntArray, is_accepting: BoolArray) -> BoolArray:
    """Tell which states tokens lead to from the start, and from which tokens lead to an accepting one."""
    from_start, reached = np.zeros(len(step), dtype=bool), np.array([0])
    while len(reached):
        from_start[reached] = True
        after = np.unique(step[reached])
        reached = after[~from_start[after]]
    to_end = is_accepting.copy()
    while True:
        more = to_end | to_end[step].any(1)
        if (more == to_end).all():
            return from_start & to_end
        to_end = more


def _distinct(columns: IntArray) -> tuple[IntArray, IntArray]:
    """Number equal columns alike; returns those, and the number of each, in the order of their first places."""
    known: dict[bytes, int] = {}
    order: list[int] = []
    number = np.empty(columns.shape[1], dtype=np.int32)
    for place, column in enumerate(np.ascontiguousarray(columns.T)):
        number[place] = known.setdefault(column.tobytes(), len(order))
        if number[place] == len(order):
            order.append(place)
    return columns[:, order], number


def _check_size(num_states: int, num_classes: int) -> None:
    if num_states * num_classes > MAX_CELLS:
        raise ConstraintError(
            f"it needs a table of {num_states} states by {num_classes} kinds of tokens or more, allowed are "
            f"{MAX_CELLS} cells: shorten repetitions of bounded length, or use fewer of them"
        )
