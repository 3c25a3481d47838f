"""Which K/V a step stores, decided on the host from what the scheduler told it.

The block's rows are in flight in every step and attend to what is cached. What must be cached before is stored by a
side forward over positions [begin, end) of a request:

- in a bidirectional model a *refresh*, up to the end of the row, since every position depends on all others:
  - every policy refreshes the whole row when a block begins;
  - `dual` with `refresh_every=n` does so again before every n-th step of the block (Fast-dLLM's dual cache for None,
    no cache at all for 1);
  - `prefix` recomputes the block and what follows before every step (Fast-dLLM's prefix cache);
- under `block_causal` the *prefill* of a new request: the whole blocks of its prompt behind the prefix-cache hit. A
  block that ended is stored by its *commit*, one more node in the first step of the next block, unless a look-ahead
  (`draft.look_ahead`) stored it before.

With plain `dual` a refresh is the forward of a block's first step, as in Fast-dLLM: its own logits decide it. Elsewhere
its logits are dropped, and the block's rows see the same canvas again.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vllm_dllm.config import KvPolicyName

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
_Positions = TypeVar("_Positions", IntArray, Tensor)


@dataclass(frozen=True, slots=True)
class StorePlan:
    """Who stores K/V in a side forward before a step, and at which positions."""

    index: IntArray  # [num_storing], into the batch
    begin: IntArray  # [num_storing], first position
    end: IntArray  # [num_storing]

    def __getitem__(self, part: slice | BoolArray) -> "StorePlan":
        """Return the plan of some of the requests."""
        return StorePlan(self.index[part], self.begin[part], self.end[part])


class KvSchedule:
    """A KV policy and what it must remember of each slot, host arrays only.

    Args:
        name: the policy.
        refresh_every: of `dual`.
        block_length: positions of a block.
        max_num_reqs: slots.
    """

    def __init__(self, name: KvPolicyName, refresh_every: int | None, block_length: int, max_num_reqs: int) -> None:
        self.name = name
        self.refresh_every = refresh_every
        self.block_length = block_length
        self._stored = np.zeros(max_num_reqs, dtype=np.int64)
        self._block_start = np.full(max_num_reqs, -1, dtype=np.int64)
        self._step = np.zeros(max_num_reqs, dtype=np.int64)

    @property
    def is_causal(self) -> bool:
        """Tell whether a position sees its block and the blocks before it alone, and blocks are aligned."""
        return self.name == "block_causal"

    @property
    def decides_step(self) -> bool:
        """Tell whether a refresh decides the step of the canvas that it saw."""
        return self.name == "dual" and self.refresh_every is None

    def block_start(self, num_known: _Positions) -> _Positions:
        """Return where the active blocks begin, of requests with so many known tokens."""
        return num_known - num_known % self.block_length if self.is_causal else num_known

    def visible_end(self, block_start: IntArray, row_len: IntArray) -> IntArray:
        """Return the end of what the blocks see."""
        return block_start + self.block_length if self.is_causal else row_len

    def add_request(self, slot: int, num_stored: int) -> None:
        """Forget the slot's previous request; the new one finds so many positions in the prefix cache."""
        self._block_start[slot] = -1
        self._stored[slot] = num_stored

    def commits(self, slots: IntArray, block_start: IntArray) -> BoolArray:
        """Tell whose step stores the block before the present one, to be asked before `plan`; arguments as there."""
        before = self._block_start[slots]
        commits: BoolArray = (before >= 0) & (before != block_start) & self.is_causal
        return commits

    def come_over(self, slots: IntArray, block_start: IntArray) -> None:
        """Take note of blocks that a step stored and left behind; slots that were given away since do not count.

        Args:
            slots: [num_reqs].
            block_start: [num_reqs], where the blocks began.
        """
        slots = slots[self._block_start[slots] == block_start]
        self._block_start[slots] += self.block_length

    def plan(self, slots: IntArray, block_start: IntArray, row_len: IntArray) -> StorePlan:
        """Take note of a step and decide what is stored before it.

        Args:
            slots: [num_reqs], the requests that take a denoising step.
            block_start: [num_reqs], where each one's block begins.
            row_len: [num_reqs], end of each one's row.
        """
        begins_block = self._block_start[slots] != block_start
        is_new = self._block_start[slots] < 0
        step = np.where(begins_block, 0, self._step[slots] + 1)
        self._block_start[slots] = block_start
        self._step[slots] = step
        if self.is_causal:
            index = np.flatnonzero(is_new)
            return StorePlan(index, self._stored[slots[index]], block_start[index])
        if self.name == "prefix":
            return StorePlan(np.arange(len(slots)), np.where(begins_block, 0, block_start), row_len)
        needs = begins_block if self.refresh_every is None else step % self.refresh_every == 0
        index = np.flatnonzero(needs)
        return StorePlan(index, np.zeros_like(index), row_len[index])
