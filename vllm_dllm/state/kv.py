"""Which K/V a step stores, decided on the host from what the scheduler told it.

The block's rows are in flight in every step and attend to what is cached, or to what the same forward stores: a layer
stores before it attends. What must be stored is one more part of the step, over positions [begin, end) of a request:

- in a bidirectional model a *refresh*, up to the end of the row, since every position depends on all others. It spans
  the block, so its own rows decide the step:
  - every policy refreshes the whole row when a block begins;
  - `dual` with `refresh_every=n` does so again at every n-th step of the block (Fast-dLLM's dual cache for None,
    no cache at all for 1);
  - `prefix` recomputes the block and what follows, if anything does, at every step (Fast-dLLM's prefix cache);
- under `block_causal` the *prefill* of a new request: the whole blocks of its prompt behind the prefix-cache hit. A
  block that ended is stored by its *commit*, one more node in the first step of the next block, unless a look-ahead
  (`draft.look_ahead`) stored it before.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dllm.names import KvPolicyName

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class KvStep:
    """What a step stores of each request; arrays [num_reqs]."""

    begin: IntArray  # first position that a refresh or a prefill stores
    end: IntArray  # behind the last one; `begin` where there is neither
    commits: BoolArray  # whose step stores the block before the present one
    begins_block: BoolArray  # whose present block has no decided step yet
    is_new: BoolArray  # whose step is the request's first


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

    def block_start(self, num_known: IntArray) -> IntArray:
        """Return where the active blocks begin, of requests with so many known tokens."""
        return num_known - num_known % self.block_length if self.is_causal else num_known

    def add_request(self, slot: int, num_stored: int) -> None:
        """Forget the slot's previous request; the new one finds so many positions in the prefix cache."""
        self._block_start[slot] = -1
        self._stored[slot] = num_stored

    def came_over(self, slots: IntArray, block_start: IntArray) -> None:
        """Take note of blocks that a step stored and left behind; slots that were given away since do not count.

        Args:
            slots: [num_reqs].
            block_start: [num_reqs], where the blocks began.
        """
        slots = slots[self._block_start[slots] == block_start]
        self._block_start[slots] += self.block_length

    def step(self, slots: IntArray, block_start: IntArray, seq_len: IntArray) -> KvStep:
        """Take note of a step and decide what it stores.

        Args:
            slots: [num_reqs], the requests that take it.
            block_start: [num_reqs], where each one's block begins.
            seq_len: [num_reqs], end of each one's row.
        """
        before = self._block_start[slots]
        is_new, begins_block = before < 0, before != block_start
        step = np.where(begins_block, 0, self._step[slots] + 1)
        self._block_start[slots] = block_start
        self._step[slots] = step
        if self.is_causal:
            begin, end = np.where(is_new, self._stored[slots], block_start), block_start
        else:
            begin, end = refreshed(
                self.name, self.refresh_every, self.block_length, begins_block, step, block_start, seq_len
            )
        return KvStep(begin, end, begins_block & ~is_new & self.is_causal, begins_block, is_new)


def refreshed(
    name: KvPolicyName,
    refresh_every: int | None,
    block_length: int,
    begins_block: BoolArray,
    step: IntArray,
    block_start: IntArray,
    seq_len: IntArray,
) -> tuple[IntArray, IntArray]:
    """Return which positions [begin, end) of bidirectional requests a step refreshes; empty ones for none.

    Args:
        name, refresh_every: the policy.
        block_length: positions of a block.
        begins_block: [num_reqs], whose block has no decided step yet.
        step: [num_reqs], decided steps of the block.
        block_start, seq_len: [num_reqs].
    """
    if name == "prefix":
        # Nothing follows the last block, and nobody reads its own K/V: its steps are no refreshes.
        is_due = begins_block | (block_start + block_length < seq_len)
        return np.where(begins_block, 0, block_start), np.where(is_due, seq_len, block_start)
    is_due = begins_block if refresh_every is None else step % refresh_every == 0
    return np.zeros_like(seq_len), np.where(is_due, seq_len, 0)
