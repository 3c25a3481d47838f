"""The log-probabilities of a block's tokens, by slot, from the step that unmasks them to the one that emits the block.

A token that no step unmasked, as one that the request gave, has log-probability 0 and nothing beside it. What a void
step leaves is at masked positions, which are written again before anybody reads them.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import to_device
from vllm_dllm.unmask.logprobs import MAX_LOGPROBS, TokenLogprobs, Unmasked

NO_LOGPROBS = -1
"""Of a request that asks for none; 0 asks for those of its tokens alone."""


@dataclass(frozen=True, slots=True)
class Asking:
    """The requests of a batch that ask for log-probabilities."""

    place_np: np.ndarray  # [num_asking] int64, in the batch
    place: Tensor  # the same on the device
    is_new: Tensor  # [num_asking] bool, those of which nothing is recorded yet
    keeps_mask: Tensor  # [num_asking] bool, in whose distributions the mask token stays
    slots: Tensor  # [num_asking] int64
    num_top: int  # what any of them asks for, at most


@dataclass(frozen=True, slots=True)
class EmittedLogprobs:
    """What a step emits besides tokens; of a block that it does not emit it says nothing."""

    place_np: np.ndarray  # [num_asking] int64, the requests in the batch
    tokens: TokenLogprobs  # [num_asking, block_length, 1 + num_top], in the order of `Emission.sampled`


class LogprobRecords:
    """Records of up to `max_num_reqs` requests; memory is taken when the first of them asks for any.

    Args:
        max_num_reqs: slots.
        block_length: positions per block.
        device: of the records.
    """

    def __init__(self, max_num_reqs: int, block_length: int, device: torch.device) -> None:
        self._num_top_np = np.full(max_num_reqs, NO_LOGPROBS)
        self._is_new_np = np.ones(max_num_reqs, dtype=bool)
        self._keeps_mask_np = np.zeros(max_num_reqs, dtype=bool)
        self._shape, self._device = (max_num_reqs, block_length), device
        self._tokens: TokenLogprobs | None = None  # of rank 0 where no step unmasked a position

    def put(self, slot: int, num_top: int, *, keeps_mask: bool = False) -> None:
        """Note how many a slot's request asks for, of which nothing is recorded; `keeps_mask` as in `Asking`."""
        self._num_top_np[slot], self._is_new_np[slot], self._keeps_mask_np[slot] = num_top, True, keeps_mask

    def asking(self, slots: Tensor, slots_np: np.ndarray) -> Asking | None:
        """Return who asks among the requests of a batch [num_reqs]; None: nobody. Nobody is new the next time."""
        place_np = np.flatnonzero(self._num_top_np[slots_np] != NO_LOGPROBS)
        if not len(place_np):
            return None
        asking_np = slots_np[place_np]
        columns = np.stack([place_np, self._is_new_np[asking_np], self._keeps_mask_np[asking_np]])
        place, is_new, keeps_mask = to_device(columns, slots.device)
        self._is_new_np[asking_np] = False
        num_top = int(self._num_top_np[asking_np].max())
        return Asking(place_np, place, is_new.bool(), keeps_mask.bool(), slots[place], num_top)

    def kept(self, slots: Tensor) -> Tensor:
        """Return those of the tokens that steps unmasked in the blocks under way; [num_reqs, block_length] float32.

        NaN is of a position that no step unmasked. What is said of a slot whose request asks for none means nothing.
        """
        if self._tokens is None:
            return torch.full((len(slots), self._shape[1]), torch.nan, device=self._device)
        return self._tokens.log_probs[slots, :, 0].masked_fill(self._tokens.ranks[slots] == 0, torch.nan)

    def take(
        self, asking: Asking, unmasked: Unmasked, found: TokenLogprobs, first: Tensor, is_finished: Tensor
    ) -> EmittedLogprobs:
        """Keep what a step found of blocks, and return what it emits if it emits them.

        Args:
            asking: whose blocks.
            unmasked: what the step unmasked of them.
            found: of these.
            first: [num_reqs] int64, positions of the block that were known when it began, which are not emitted.
            is_finished: [num_reqs] bool, whether it is emitted.
        """
        num_slots, block_length = self._shape
        if self._tokens is None:
            self._tokens = TokenLogprobs.empty(num_slots, block_length, 1 + MAX_LOGPROBS, device=self._device)
        first, is_finished, width = first[asking.place], is_finished[asking.place, None], 1 + asking.num_top
        request = torch.arange(len(first), device=first.device)[:, None]
        column = torch.arange(block_length, device=first.device).expand(len(first), -1)
        here = asking.slots[:, None], column
        kept = self._tokens.of(here, width).cleared(asking.is_new[:, None])
        kept = found.of((request, 0, column), width).where(unmasked.is_new[:, 0], kept)
        emitted = kept.given(unmasked.token_ids[:, 0]).of(
            (request, (column + first[:, None]).clamp(max=block_length - 1)), width
        )
        kept = kept.cleared(is_finished)
        if unmasked.is_new.shape[1] > 1:
            kept = found.of((request, 1, column), width).where(unmasked.is_new[:, 1], kept)
        self._tokens.put(here, kept)
        return EmittedLogprobs(asking.place_np, emitted)
