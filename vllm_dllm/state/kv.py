"""Which cached K/V a step recomputes, decided on the host from what the scheduler told it.

The block's rows are in flight in every step and attend to the cache of everything else. A refresh is a forward over
the positions [begin, row_len) of a request that stores their K/V before the step:

- every policy refreshes the whole row when a block begins;
- `dual` with `refresh_every=n` does so again before every n-th step of the block (Fast-dLLM's dual cache for None,
  no cache at all for 1);
- `prefix` recomputes the block and what follows before every step (Fast-dLLM's prefix cache).

With plain `dual` a refresh is the forward of a block's first step, as in Fast-dLLM: its own logits decide it. Elsewhere
its logits are dropped, and the block's rows see the same canvas again.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dllm.config import KvPolicyName

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RefreshPlan:
    """Who refreshes before a step, and from where."""

    index: IntArray  # [num_refreshed], into the batch
    begin: IntArray  # [num_refreshed], first position recomputed


class RefreshSchedule:
    """The refresh rule and what it must remember of each slot, host arrays only."""

    def __init__(self, name: KvPolicyName, refresh_every: int | None, max_num_reqs: int) -> None:
        self.name = name
        self.refresh_every = refresh_every
        self._block_start = np.full(max_num_reqs, -1, dtype=np.int64)
        self._step = np.zeros(max_num_reqs, dtype=np.int64)

    @property
    def decides_step(self) -> bool:
        """Tell whether a refresh decides the step of the canvas that it saw."""
        return self.name == "dual" and self.refresh_every is None

    def add_request(self, slot: int) -> None:
        """Forget the slot's previous request."""
        self._block_start[slot] = -1

    def plan(self, slots: IntArray, block_start: IntArray) -> RefreshPlan:
        """Take note of a step and decide its refreshes.

        Args:
            slots: [num_reqs], the requests that take a denoising step.
            block_start: [num_reqs], where each one's block begins, as the scheduler counts.
        """
        begins_block = self._block_start[slots] != block_start
        step = np.where(begins_block, 0, self._step[slots] + 1)
        self._block_start[slots] = block_start
        self._step[slots] = step
        if self.name == "prefix":
            return RefreshPlan(np.arange(len(slots)), np.where(begins_block, 0, block_start))
        needs = begins_block if self.refresh_every is None else step % self.refresh_every == 0
        index = np.flatnonzero(needs)
        return RefreshPlan(index, np.zeros_like(index))
