"""Where answers end, by slot: what a block has behind its answer's end is nobody's, and needs no further steps."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import to_device

NEVER = 2**62
"""A position that no sequence has."""

_NO_ID = -1


@dataclass(frozen=True, slots=True)
class Ends:
    """What ends a request's answer: an end token, or its length. By default nothing does before its last block."""

    ids: tuple[int, ...] = ()
    first: int = NEVER  # absolute position from which one of them ends it
    limit: int = NEVER  # absolute position behind the last one that may be emitted


NO_ENDS = Ends()


class EndState:
    """Ends of up to `max_num_reqs` requests.

    Args:
        max_num_reqs: slots.
        device: of all tensors.
    """

    def __init__(self, max_num_reqs: int, device: torch.device) -> None:
        self._device = device
        self._ids_np = np.full((max_num_reqs, 1), _NO_ID, dtype=np.int64)
        self._bounds_np = np.full((2, max_num_reqs), NEVER, dtype=np.int64)
        self._is_staged = True
        self.apply_staged_writes()

    def put(self, slot: int, ends: Ends) -> None:
        """Stage a request's ends."""
        missing = len(ends.ids) - self._ids_np.shape[1]
        if missing > 0:
            self._ids_np = np.pad(self._ids_np, ((0, 0), (0, missing)), constant_values=_NO_ID)
        self._ids_np[slot] = _NO_ID
        self._ids_np[slot, : len(ends.ids)] = ends.ids
        self._bounds_np[:, slot] = ends.first, ends.limit
        self._is_staged = True

    def apply_staged_writes(self) -> None:
        """Copy what was staged to the device."""
        if self._is_staged:
            # Copies, since the arrays change and a CPU shares them.
            self._ids, self._bounds = (to_device(its.copy(), self._device) for its in (self._ids_np, self._bounds_np))
            self._is_staged = False

    @property
    def tensors(self) -> list[Tensor]:
        """Of all slots the ids, [max_num_reqs, num_ids] int64, -1 for none; and first and limit, [2, max_num_reqs]."""
        return [self._ids, self._bounds]

    def reached(self, slots: Tensor, position: Tensor, canvas: Tensor, mask_token_id: int) -> Tensor:
        """Tell of whom all is known that may be emitted: there is an end that nothing before it is masked of.

        Args:
            slots: [num_reqs] int64.
            position: [num_reqs, block_length] int64, absolute.
            canvas: [num_reqs, block_length] int64.
            mask_token_id: what stands for masked.

        Returns: [num_reqs] bool.
        """
        first, limit = self._bounds[:, slots, None]
        is_end = (canvas[:, :, None] == self._ids[slots, None]).any(2) & (position >= first)
        is_known = (canvas != mask_token_id).long().cumprod(1).bool()
        is_over: Tensor = (is_known & (is_end | (position == limit - 1))).any(1)
        return is_over
