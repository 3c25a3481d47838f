"""The constraint of a request, and how far its answer is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dllm.constraint.automaton import Automaton, BoolArray
from vllm_dllm.constraint.reach import Window


@dataclass(slots=True)
class Answer:
    """A request's answer under a constraint: the positions from `begin` on.

    It has to be complete before `limit`, where the reply is cut. Where it is complete earlier, an end token follows;
    where it fills all positions, none does. The state behind the blocks that are finished is kept here, on the host.
    """

    automaton: Automaton
    begin: int  # absolute position behind the prompt
    limit: int  # absolute
    end: int  # absolute position where the sequence ends, `limit` or behind
    position: int = 0  # behind the finished blocks
    state: int = 0

    def __post_init__(self) -> None:
        """Begin behind the prompt."""
        self.position = self.begin

    def take(self, tokens: Sequence[int]) -> None:
        """Go on by tokens that are final."""
        self.state = self.automaton.run(tokens, self.state)
        self.position += len(tokens)

    def part(self, block_start: int, block_length: int) -> slice:
        """Return which positions of a block, counted from its start, belong to the answer."""
        first = min(max(self.begin - block_start, 0), block_length)
        return slice(first, max(first, min(self.end - block_start, block_length)))

    def window(self, block_start: int, block_length: int, state: int) -> Window:
        """Return what surrounds the part of a block that belongs to the answer.

        Args:
            block_start: absolute position.
            block_length: positions.
            state: the one before that part.
        """
        part = self.part(block_start, block_length)
        return Window(self.automaton, state, self._fits(block_start + part.stop), self.limit - block_start - part.start)

    def _fits(self, position: int) -> BoolArray:
        """Tell from which states the positions from one on can be filled; [num_states]."""
        automaton = self.automaton
        left = self.limit - position
        if left >= 0:
            fits: BoolArray = automaton.distance <= left
        else:
            fits = np.arange(automaton.num_states) == automaton.done
        return fits
