"""A step of requests under a constraint: which tokens their rows may take, and which positions take theirs.

Both are made on the host, from the canvases, so a step with such a request waits for the device: for its canvases,
and for each decision of its walk. Requests without a constraint are decided as ever.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vllm_dllm.constraint.answer import Answer
from vllm_dllm.constraint.automaton import WORD
from vllm_dllm.constraint.reach import MASKED, BlockConstraint
from vllm_dllm.state.report import Failed

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class ConstrainedStep:
    """The requests of a step that have a constraint, and their canvases on the host."""

    answers: Sequence[Answer]
    request: Ints  # [num_constrained], which of the step's requests
    canvas: Ints  # [num_constrained, num_nodes, block_length], with `MASKED`
    end: Ints | None  # [num_constrained, block_length] of a look-ahead, whose next root is the last node
    # Which of the step's requests have to end, found as the step is decided. What it comes to for these means nothing.
    failed: dict[int, Failed] = field(default_factory=dict, init=False)

    @classmethod
    def read(
        cls,
        answers: Mapping[int, Answer],
        slots: Ints,
        canvas: Tensor,
        end: Tensor | None,
        mask_token_id: int,
    ) -> "ConstrainedStep | None":
        """Read a step's canvases; None where no request has a constraint.

        Args:
            answers: by slot.
            slots: [num_reqs].
            canvas: [num_reqs, num_nodes, block_length] int64.
            end: [num_reqs, block_length] int64 of a look-ahead.
            mask_token_id: what stands for masked there.
        """
        request = np.flatnonzero([slot in answers for slot in slots.tolist()]) if answers else np.zeros(0, dtype=int)
        if not len(request):
            return None
        canvases = canvas if end is None else torch.cat([canvas, end[:, None]], 1)
        on_host = canvases[torch.from_numpy(request).to(canvas.device)].cpu().numpy()
        on_host = np.where(on_host == mask_token_id, MASKED, on_host)
        own = [answers[slot] for slot in slots[request].tolist()]
        return cls(own, request, on_host[:, : canvas.shape[1]], None if end is None else on_host[:, -1])

    @cached_property
    def constraints(self) -> list[list[BlockConstraint | None]]:
        """[num_constrained][num_nodes], what surrounds each canvas; None where that is nothing: of a draft that means
        nothing, and behind the sequence's end.
        """
        return [self._constraints(place) for place in range(len(self.answers))]

    def _constraints(self, place: int) -> list[BlockConstraint | None]:
        answer, canvas = self.answers[place], self.canvas[place]
        own: list[BlockConstraint | None] = [None] * len(canvas)
        part = answer.part
        num_in_block = len(canvas) - (self.end is not None)
        if part.start < part.stop:
            constraint = answer.constraint()
            is_completable = constraint.completable(canvas[:num_in_block, part])
            if not is_completable[0]:
                self._fail(place, Failed.CANVAS)
                return own
            own[:num_in_block] = [constraint if ok else None for ok in is_completable]
        if self.end is not None and answer.block_start + answer.block_length < answer.end:
            end = self.end[place]
            if own[0] is not None and own[0].completable(end[None, part])[0]:
                own[-1] = answer.next_constraint(end.tolist())
        return own

    def allowed(self) -> tuple[Ints, NDArray[np.int32]]:
        """Say which tokens the rows may take.

        Returns: [num_constrained, num_nodes, block_length], of each row its place in the second, of which the first
            allows all; and [num_sets, num_words] as in `RowIds.allowed`.
        """
        place = np.zeros(self.canvas.shape, dtype=np.int64)
        automaton = self.answers[0].automaton
        sets = {b"": np.full(-(-len(automaton.class_of) // WORD), -1, dtype=np.int32)}
        numbers: dict[bytes, int] = {b"": 0}
        for number, answer in enumerate(self.answers):
            for node, constraint, part in self._distinct_constraints(number):
                allowed = constraint.allowed(self.canvas[number, node][:, part])
                for at, its in zip(np.argwhere(allowed.any(2)), allowed[allowed.any(2)], strict=True):
                    words = answer.automaton.bits(its)
                    key = words.tobytes()
                    sets.setdefault(key, words)
                    place[number, node[at[0]], part.start + at[1]] = numbers.setdefault(key, len(numbers))
        return place, np.stack(list(sets.values()))

    def _distinct_constraints(self, number: int) -> list[tuple[Ints, BlockConstraint, slice]]:
        """Return the constraints of a request, each with its canvases and the part of them that it surrounds."""
        answer, own = self.answers[number], self.constraints[number]
        found = []
        for constraint in {id(constraint): constraint for constraint in own if constraint is not None}.values():
            node = np.flatnonzero([its is constraint for its in own])
            is_next = self.end is not None and node[0] == len(own) - 1
            part = answer.part_of(answer.block_start + answer.block_length * is_next)
            found.append((node, constraint, part))
        return found

    def row_bits(self, num_reqs: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Do the same for the rows of all requests: [num_reqs, num_nodes, block_length] int64, and the sets."""
        place, sets = self.allowed()
        of_all = np.zeros((num_reqs, *place.shape[1:]), dtype=np.int64)
        of_all[self.request] = place
        return torch.from_numpy(of_all).to(device), torch.from_numpy(sets).to(device)

    def keep(self, node: Tensor, chosen: Tensor, score: Tensor, token_ids: Tensor) -> Tensor:
        """Return which of the positions that a policy chose take their tokens; `unmask.walk.Keep`.

        Args:
            node: [num_constrained] int64, the canvas of each.
            chosen: [num_constrained, block_length] bool.
            score: [num_constrained, block_length] float64, by which the policy ordered them.
            token_ids: [num_constrained, block_length] int64.
        """
        order = score.masked_fill(~chosen, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        count = chosen.sum(1)
        packed = torch.cat([node[:, None], count[:, None], order, token_ids.view_as(order)], 1).cpu().numpy()
        block_length = chosen.shape[1]
        kept = np.zeros(chosen.shape, dtype=bool)
        for number, (own, num, *rest) in enumerate(packed.tolist()):
            places, tokens = rest[:num], rest[block_length:]
            constraint = self.constraints[number][own]
            kept[number, places] = True if constraint is None else self._kept(number, own, constraint, (places, tokens))
        return torch.from_numpy(kept).to(chosen.device)

    def _kept(
        self, number: int, node: int, constraint: BlockConstraint, wanted: tuple[list[int], list[int]]
    ) -> list[bool]:
        places, tokens = wanted
        answer = self.answers[number]
        # Where no logit is above -inf an op may have the id -1, which would be `MASKED` here.
        unknown = len(answer.automaton.class_of)
        tokens = [token if token >= 0 else unknown for token in tokens]
        is_next = self.end is not None and node == self.canvas.shape[1] - 1
        part = answer.part_of(answer.block_start + answer.block_length * is_next)
        kept = constraint.keep(
            self.canvas[number, node, part], [place - part.start for place in places], [tokens[p] for p in places]
        )
        # A next root that was not evaluated has the rows of others; nobody comes over to it.
        if places and not kept[0] and not is_next:
            self._fail(number, Failed.TOKEN)
        return kept

    def _fail(self, number: int, why: Failed) -> None:
        self.failed[int(self.request[number])] = why

    def take(self, canvas: Tensor, is_finished: Tensor, is_emitted: Tensor) -> Ints:
        """Go on to the next block where the one under way is finished.

        Args:
            canvas: [num_reqs, block_length] int64, of all requests of the step.
            is_finished: [num_reqs] bool.
            is_emitted: [num_reqs] bool, whose block is emitted, which it is unfinished where the answer ends in it.

        Returns: requests of the step whose answer has ended so: a step behind, as is scheduled where that is not known
            yet, has nothing to meet.
        """
        index = torch.from_numpy(self.request).to(canvas.device)
        columns = [is_finished[index, None].long(), is_emitted[index, None].long(), canvas[index]]
        packed = torch.cat(columns, 1).cpu().numpy()
        for answer, (finished, _, *block) in zip(self.answers, packed.tolist(), strict=True):
            if finished:
                answer.take(block)
        return self.request[packed[:, 0] < packed[:, 1]]
