"""What a canvas with masked positions can still become, by a constraint's automaton.

From the left, which states the tokens so far may have led to; from the right, from which states the rest can still be
met. A token is allowed at a masked position if it leads from one of the former to one of the latter. So a token is
allowed if and only if some text that meets the constraint has it there, and has what is known of the canvas.

Canvases are evaluated 64 at a time, each one bit of the numbers here.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dllm.constraint.automaton import Automaton, BoolArray

Lanes = NDArray[np.uint64]
MASKED = -1
"""In a canvas: what is not known."""
_NUM_LANES = 64
_NONE, _ALL = np.uint64(0), np.uint64(2**64 - 1)


@dataclass(frozen=True, slots=True)
class BlockConstraint:
    """The positions of an answer that a canvas has, and what lies around them."""

    automaton: Automaton
    start: int  # the state before the first one
    fits: BoolArray  # [num_states], from which states the positions behind can be filled
    # Positions from the first on after which the answer ends: the reply is cut there, so it has to be complete.
    limit: int

    def completable(self, canvases: NDArray[np.int64]) -> BoolArray:
        """Tell which of some canvases [num_canvases, length] can be completed; [num_canvases] bool."""
        found = [self._completable(part) for part in _parts(canvases)]
        return np.concatenate(found) if found else np.zeros(0, dtype=bool)

    def allowed(self, canvases: NDArray[np.int64]) -> BoolArray:
        """Say which tokens each position may have.

        Args:
            canvases: [num_canvases, length], token ids and `MASKED`.

        Returns: [num_canvases, length, num_classes] bool, what masked positions may become, by classes of tokens; to
            positions of a canvas that cannot be completed nothing is allowed.
        """
        return np.concatenate([self._allowed(part) for part in _parts(canvases)])

    def fits_along(self, canvas: NDArray[np.int64]) -> list[BoolArray]:
        """Tell from which states the rest of a canvas [length] and what is behind it can be filled: before each of its
        positions, and behind the last; [num_states] each.
        """
        return [_lanes_of(lanes, 1)[:, 0] for lanes in self._backward(canvas[None])]

    def keep(self, canvas: NDArray[np.int64], positions: list[int], tokens: list[int]) -> list[bool]:
        """Choose which of some positions take their tokens: one after another, each if the whole stays completable.

        Args:
            canvas: [length], completable.
            positions: masked ones, in the order of the unmasking policy.
            tokens: of the positions.

        Returns: of each position.
        """
        kept = [False] * len(positions)
        canvas, first = canvas.copy(), 0
        while first < len(positions):
            # What a canvas cannot have, none with more tokens can: so the longest run of the rest is found at once.
            runs = np.repeat(canvas[None], len(positions) - first, axis=0)
            for place in range(first, len(positions)):
                runs[place - first :, positions[place]] = tokens[place]
            num_kept = int(self.completable(runs).sum())
            kept[first : first + num_kept] = [True] * num_kept
            if num_kept:
                canvas = runs[num_kept - 1]
            first += num_kept + 1
        return kept

    def _completable(self, canvases: NDArray[np.int64]) -> BoolArray:
        last = self._forward(canvases)[-1]
        return _lanes_of(np.bitwise_or.reduce(last[self.fits], initial=_NONE), len(canvases))

    def _allowed(self, canvases: NDArray[np.int64]) -> BoolArray:
        num_canvases, length = canvases.shape
        automaton = self.automaton
        forward, backward = self._forward(canvases), self._backward(canvases)
        allowed = np.zeros((num_canvases, length, automaton.step.shape[1]), dtype=bool)
        for place in range(length):
            masked = canvases[:, place] == MASKED
            if masked.any():
                joined = _join(automaton, forward[place], backward[place + 1])
                allowed[:, place] = _lanes_of(joined, num_canvases).T & masked[:, None]
        return allowed

    def _backward(self, canvases: NDArray[np.int64]) -> list[Lanes]:
        """Return from which states canvases can be completed, before each position and behind the last: [num_states]
        each.
        """
        automaton, length = self.automaton, canvases.shape[1]
        lanes = [np.where(self.fits, _ALL, _NONE)]
        self._end(lanes[0], length)
        source, target = automaton.moves_back
        for place in reversed(range(length)):
            behind = lanes[-1]
            before = _spread(behind, source, target, automaton.num_states) & _masked_lanes(canvases[:, place])
            for token_class, its in self._known(canvases[:, place]):
                before |= behind[automaton.step[:, token_class]] & its
            before[automaton.dead] = _NONE
            self._end(before, place)
            lanes.append(before)
        return lanes[::-1]

    def _forward(self, canvases: NDArray[np.int64]) -> list[Lanes]:
        """Return what states canvases may lead to, before each position and behind the last: [num_states] each."""
        automaton, length = self.automaton, canvases.shape[1]
        lanes = [np.zeros(automaton.num_states, dtype=np.uint64)]
        lanes[0][self.start] = _ALL
        self._end(lanes[0], 0)
        source, target = automaton.moves
        for place in range(length):
            before = lanes[-1]
            behind = _spread(before & _masked_lanes(canvases[:, place]), target, source, automaton.num_states)
            for token_class, its in self._known(canvases[:, place]):
                states = np.flatnonzero(before & its)
                np.bitwise_or.at(behind, automaton.step[states, token_class], before[states] & its)
            behind[automaton.dead] = _NONE
            self._end(behind, place + 1)
            lanes.append(behind)
        return lanes

    def _end(self, lanes: Lanes, place: int) -> None:
        """Leave only final states where the answer ends, and behind that only the state behind an end token."""
        if place == self.limit:
            lanes[~self.automaton.is_final] = _NONE
        elif place > self.limit:
            lanes[: self.automaton.done] = _NONE

    def _known(self, column: NDArray[np.int64]) -> Iterator[tuple[int, np.uint64]]:
        """Yield each class of tokens that canvases have at a position, and which canvases."""
        is_known = column != MASKED
        in_vocabulary = is_known & (column < len(self.automaton.class_of))
        classes = np.where(in_vocabulary, self.automaton.class_of[np.where(in_vocabulary, column, 0)], 0)
        for token_class in np.unique(classes[is_known]):
            yield int(token_class), _lanes(is_known & (classes == token_class))


def _parts(canvases: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    return (canvases[begin : begin + _NUM_LANES] for begin in range(0, len(canvases), _NUM_LANES))


def _spread(lanes: Lanes, to: NDArray[np.int32], of: NDArray[np.int32], num_states: int) -> Lanes:
    """Join the lanes of the states `of` at the states `to`, which are sorted; [num_states]."""
    spread = np.zeros(num_states, dtype=np.uint64)
    if len(to) and lanes.any():
        first = np.flatnonzero(np.diff(to, prepend=-1))
        spread[to[first]] = np.bitwise_or.reduceat(lanes[of], first)
    return spread


def _join(automaton: Automaton, before: Lanes, behind: Lanes) -> Lanes:
    """Return by which classes of tokens states before lead to states behind; [num_classes]."""
    num_classes = automaton.step.shape[1]
    states = np.flatnonzero(before)
    classes, source, target, first = automaton.edges
    if len(states) * num_classes < len(source):
        few: Lanes = np.bitwise_or.reduce(behind[automaton.step[states]] & before[states, None], axis=0, initial=_NONE)
        return few
    joined = np.zeros(num_classes, dtype=np.uint64)
    if len(source):
        joined[classes[first]] = np.bitwise_or.reduceat(before[source] & behind[target], first)
    return joined


def _lanes(where: BoolArray) -> np.uint64:
    """Pack [num_canvases] bool, lane by lane."""
    bits = np.zeros(_NUM_LANES, dtype=bool)
    bits[: len(where)] = where
    return np.uint64(np.packbits(bits, bitorder="little").view(np.uint64)[0])


def _masked_lanes(column: NDArray[np.int64]) -> np.uint64:
    return _lanes(column == MASKED)


def _lanes_of(lanes: Lanes | np.uint64, num_canvases: int) -> BoolArray:
    """Unpack lanes [...] to [..., num_canvases] bool."""
    return (np.asarray(lanes)[..., None] >> np.arange(num_canvases, dtype=np.uint64) & np.uint64(1)).astype(bool)
