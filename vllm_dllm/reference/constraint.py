"""Structured output in any order (ours): which tokens a masked position may have, and which of several it takes.

An answer is a text that a deterministic automaton over tokens accepts, and end tokens behind it, none where the text
fills all positions. A token is allowed at a masked position if some answer has it there and has all that is known.
Where a step would unmask several positions, they take their tokens one after another, in the order of the unmasking
policy, each if there still is an answer then; the others stay masked.

Sources: constrained decoding of diffusion models by reachable states is DINGO (arXiv:2505.23061), within a block and
from left to right; completable canvases with gaps are in eth-sri/constrained-diffusion (arXiv:2508.10111), a token a
step.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_ENDED = -1  # the state behind an end token

Known = Sequence[int | None]
"""Tokens of an answer from its first position on; None is masked."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """An automaton over tokens, from state 0.

    Attributes:
        step: of each state, the states that tokens lead to; of others none is accepted.
        accepting: states in which a text may end.
        end_ids: end tokens.
        length: positions of the answer; the reply is cut behind them.
    """

    step: Sequence[dict[int, int]]
    accepting: frozenset[int]
    end_ids: tuple[int, ...]
    length: int

    def allowed(self, known: Known) -> list[set[int]]:
        """Return which tokens each position of an answer may have."""
        before, behind = self._reached(known), [self._open(len(known))]
        for place in reversed(range(len(known))):
            states = self._open(place)
            behind.append({each for each in states if self._next({each}, known[place]) & behind[-1]})
        behind.reverse()
        return [
            {its for state in before[place] for its, to in self._moves({state}, token) if to in behind[place + 1]}
            for place, token in enumerate(known)
        ]

    def of_block(self, before: Sequence[int], num_prompt: int = 0, behind: Known = ()) -> "BlockConstraint":
        """Return it as a block sees it; arguments as the fields."""
        return BlockConstraint(self, before, num_prompt, behind)

    def is_completable(self, known: Known) -> bool:
        """Say whether some answer has all that is known."""
        return bool(self._reached(known)[-1])

    def _reached(self, known: Known) -> list[set[int]]:
        """Return the states that what is known may lead to, before each position and behind the last."""
        reached = [{0} & self._open(0)]
        for place, token in enumerate(known):
            reached.append(self._next(reached[-1], token) & self._open(place + 1))
        return reached

    def _open(self, place: int) -> set[int]:
        """Return the states that an answer may be in before a position: where it ends, those in which it may end."""
        if place < self.length:
            return {*range(len(self.step)), _ENDED}
        return {_ENDED, *(self.accepting if place == self.length else ())}

    def _next(self, states: set[int], token: int | None) -> set[int]:
        return {state for _, state in self._moves(states, token)}

    def _moves(self, states: set[int], token: int | None) -> list[tuple[int, int]]:
        moves = [move for state in states - {_ENDED} for move in self.step[state].items()]
        if states & (self.accepting | {_ENDED}):
            moves += [(end_id, _ENDED) for end_id in self.end_ids]
        return moves if token is None else [move for move in moves if move[0] == token]


@dataclass(frozen=True, slots=True)
class BlockConstraint:
    """A constraint as a block sees it."""

    constraint: Constraint
    before: Sequence[int]  # the answer before the block
    num_prompt: int  # positions of the block that are prompt
    behind: Known = ()  # what is given of the answer behind the block

    def allowed(self, canvas: Known) -> list[set[int]]:
        """Return which tokens the positions of the block may have; what is prompt or behind the answer, none."""
        allowed = self.constraint.allowed(self._answer(canvas))
        of_prompt: list[set[int]] = [set() for _ in range(self.num_prompt)]
        return (of_prompt + allowed[len(self.before) :])[: len(canvas)]

    def remove_forbidden(self, logits: Tensor, canvas: Known) -> Tensor:
        """Return the block's logits [len(canvas), vocab], those of masked positions at -inf where not allowed."""
        logits = logits.clone()
        for place, allowed in enumerate(self.allowed(canvas)):
            if canvas[place] is None:
                others = torch.ones_like(logits[place], dtype=torch.bool)
                others[list(allowed)] = False
                logits[place, others] = -torch.inf
        return logits

    def taken(self, canvas: Known, places: Sequence[int], tokens: Sequence[int]) -> list[bool]:
        """Return which of some places of the block take their tokens, in this order."""
        canvas, taken = list(canvas), []
        for place, token in zip(places, tokens, strict=True):
            tried = [*canvas[:place], token, *canvas[place + 1 :]]
            taken.append(self.constraint.is_completable(self._answer(tried)))
            canvas = tried if taken[-1] else canvas
        return taken

    def _answer(self, canvas: Known) -> Known:
        answer = [*self.before, *canvas[self.num_prompt :], *self.behind]
        return [*answer, *[None] * (self.constraint.length - len(answer))]


def known(tokens: Tensor, is_masked: Tensor) -> Known:
    """Return what is known of a canvas [len] int64, where masked [len] bool nothing."""
    pairs = zip(tokens.tolist(), is_masked.tolist(), strict=True)
    return [None if masked else token for token, masked in pairs]
