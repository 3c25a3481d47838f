"""The constraint of a request, and how far its answer is."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vllm_dllm.constraint.automaton import Automaton, BoolArray
from vllm_dllm.constraint.reach import BlockConstraint
from vllm_dllm.state.pins import Pins


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
    block_start: int  # absolute, of the block under way
    block_length: int
    state: int = 0  # before what the block under way has of the answer
    pins: Pins | None = None  # what is given of it
    # From which states the positions from the beginnings of blocks on can be filled with what is given of them.
    _kept: dict[int, BoolArray] = field(default_factory=dict, init=False, repr=False)

    @property
    def part(self) -> slice:
        """Which positions of the block under way belong to the answer."""
        return self.part_of(self.block_start)

    def part_of(self, block_start: int) -> slice:
        """Return which positions of a block, counted from its start, belong to the answer."""
        first = min(max(self.begin - block_start, 0), self.block_length)
        return slice(first, max(first, min(self.end - block_start, self.block_length)))

    def take(self, block: Sequence[int]) -> None:
        """Go on to the next block.

        Args:
            block: [block_length] token ids of the one under way.
        """
        self.state = self.automaton.run(block[self.part], self.state)
        self.block_start += self.block_length

    def constraint(self) -> BlockConstraint:
        """Return what surrounds the part of the block under way that belongs to the answer."""
        return self._constraint(self.block_start, self.state)

    def next_constraint(self, block: Sequence[int]) -> BlockConstraint:
        """Return the same of the next block, if the one under way becomes `block`."""
        return self._constraint(self.block_start + self.block_length, self.automaton.run(block[self.part], self.state))

    def _constraint(self, block_start: int, state: int) -> BlockConstraint:
        part = self.part_of(block_start)
        first = block_start + part.start
        return BlockConstraint(self.automaton, state, self._fits(block_start + part.stop), self.limit - first)

    def _fits(self, position: int) -> BoolArray:
        """Tell from which states the positions from one on can be filled; [num_states]."""
        if self.pins is None or position >= self.pins.end:
            return self._fits_open(position)
        if position not in self._kept:
            behind = BlockConstraint(self.automaton, 0, self._fits_open(self.pins.end), self.limit - position)
            along = behind.fits_along(self.pins.of(position, self.pins.end - position))
            self._kept = {position + place: along[place] for place in range(0, len(along), self.block_length)}
        return self._kept[position]

    def _fits_open(self, position: int) -> BoolArray:
        automaton = self.automaton
        left = self.limit - position
        fits: BoolArray = np.less_equal(automaton.distance, left) if left >= 0 else np.zeros_like(automaton.is_final)
        fits[automaton.done] = True
        return fits
