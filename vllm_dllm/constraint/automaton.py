"""The automaton of a constraint over the tokens of a vocabulary.

Its states are few and tokens many, but most tokens are alike to all states: they fall into *classes*. Behind an
accepted text there are end tokens alone.
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
BoolArray = NDArray[np.bool_]

WORD = 32
NEVER = np.iinfo(np.int32).max
"""A distance: there is no way."""
_MAX_KEPT = 512  # sets of classes whose bits are kept, of 16 KB each at a vocabulary of 126,000


@dataclass(frozen=True)
class Automaton:
    """A deterministic automaton over token ids, from state 0; its last state is that from which nothing is accepted.

    All other states can reach an accepting one. The last state but one is behind an end token.
    """

    step: IntArray  # [num_states, num_classes], the next state; class 0 is dead from everywhere
    class_of: IntArray  # [vocab_size], of each token id
    is_final: BoolArray  # [num_states], where a text may end: accepting states, and that behind an end token
    end_class: int  # of the end tokens

    @property
    def num_states(self) -> int:
        """States, the dead one among them."""
        return len(self.step)

    @property
    def dead(self) -> int:
        """The last state."""
        return len(self.step) - 1

    @property
    def done(self) -> int:
        """The state behind an end token."""
        return len(self.step) - 2

    @cached_property
    def distance(self) -> IntArray:
        """[num_states], fewest tokens from each state to a final one; `NEVER` from the dead one."""
        source, target = (part.astype(np.int64) for part in self.moves)
        distance = np.where(self.is_final, 0, NEVER).astype(np.int32)
        reached, length = self.is_final, 0
        while reached.any():
            length += 1
            found = np.zeros_like(reached)
            found[source[reached[target]]] = True
            reached = found & (distance == NEVER)
            distance[reached] = length
        return distance

    @cached_property
    def edges(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """All live transitions in the order of classes: class, state before and behind, each [num_edges]; and
        [num_live_classes], where each class begins that has any.
        """
        classes, source = np.nonzero(np.not_equal(self.step.T, self.dead))
        first = np.flatnonzero(np.diff(classes, prepend=-1))
        target = self.step[source, classes]
        return classes.astype(np.int32), source.astype(np.int32), target, first.astype(np.int32)

    @cached_property
    def moves(self) -> tuple[IntArray, IntArray]:
        """States before and behind any token at all, each [num_moves], in the order of those behind."""
        _, source, target, _ = self.edges
        pairs = np.unique(target.astype(np.int64) * self.num_states + source)
        return (pairs % self.num_states).astype(np.int32), (pairs // self.num_states).astype(np.int32)

    @cached_property
    def moves_back(self) -> tuple[IntArray, IntArray]:
        """The same in the order of those before."""
        source, target = self.moves
        order = np.argsort(source, kind="stable")
        return source[order], target[order]

    def run(self, tokens: Iterable[int], state: int = 0) -> int:
        """Return the state behind tokens; those that are no ids of the vocabulary are dead."""
        for token in tokens:
            is_known = 0 <= token < len(self.class_of)
            state = int(self.step[state, self.class_of[token]]) if is_known else self.dead
        return state

    def bits(self, allowed: BoolArray) -> IntArray:
        """Return the token ids of some classes [num_classes] as bits, [ceil(vocab_size / WORD)] int32; see `RowIds`."""
        key = allowed.tobytes()
        words = self._kept.get(key)
        if words is None:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            packed = np.packbits(allowed[self.class_of], bitorder="little")
            words = np.zeros(-(-len(self.class_of) // WORD), dtype=np.int32)
            words.view(np.uint8)[: len(packed)] = packed
            self._kept[key] = words
        return words

    @cached_property
    def _kept(self) -> dict[bytes, IntArray]:
        return {}

    def to_bytes(self) -> bytes:
        """Return it packed, for another process."""
        file = io.BytesIO()
        step, class_of = _narrow(self.step), _narrow(self.class_of)
        np.savez_compressed(
            file, step=step, class_of=class_of, is_final=self.is_final, end_class=np.array(self.end_class)
        )
        return file.getvalue()

    @classmethod
    def from_bytes(cls, packed: bytes) -> "Automaton":
        """Unpack what `to_bytes` made."""
        with np.load(io.BytesIO(packed), allow_pickle=False) as parts:
            step, class_of = (parts[name].astype(np.int32) for name in ("step", "class_of"))
            return cls(step, class_of, parts["is_final"], int(parts["end_class"]))


def _narrow(array: IntArray) -> NDArray[np.uint16] | IntArray:
    return array.astype(np.uint16) if array.max(initial=0) < 1 << 16 else array
