"""Which K/V a step stores, decided on the host from what the scheduler told it.

The block's rows are in flight in every step and attend to what is cached, or to what the same forward stores: a layer
stores before it attends. What must be stored is one more part of the step, over positions [begin, end) of a request:

- in a bidirectional model a *refresh*, up to the end of the row, since every position depends on all others. It spans
  the block, so its own rows decide the step:
  - every policy refreshes the whole row when a block begins;
  - `dual` with `refresh_every=n` does so again at every n-th step of the block (Fast-dLLM's dual cache for None,
    no cache at all for 1);
  - `prefix` recomputes the block and what follows, if anything does, at every step (Fast-dLLM's prefix cache);
- nothing, when a block begins of which all is given (`state.pins`): it has no step, and is emitted as it is;
- under `block_causal` the *prefill* of a new request: the whole blocks of its prompt behind the prefix-cache hit; under
  `causal` all of its prompt. A block that ended is stored by its *commit*, one more node in the first step of the next
  block, unless a look-ahead (`draft.look_ahead`) stored it before.

Where what is stored predicts a block's first position (`stores_alone`), the step in which a block begins stores and
nothing else: its last row decides that position, and the block's rows are in flight from the next step on.
"""

from collections.abc import Collection, Hashable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dllm.names import KvPolicyName
from vllm_dllm.state.pins import Pins

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class KvStep:
    """What a step stores of each request; arrays [num_reqs]."""

    num_known: IntArray  # tokens before the step
    begin: IntArray  # first position that a refresh or a prefill stores
    end: IntArray  # behind the last one; `begin` where there is neither
    commits: BoolArray  # whose step stores the block before the present one
    is_new: BoolArray  # whose step is the request's first
    stores_alone: BoolArray  # whose step stores and nothing else; its last row decides the block's first position
    is_undrafted: BoolArray  # of whose block nothing is known that drafts could be made from
    is_short: BoolArray  # whose block ends with the row, before its length

    @property
    def is_long(self) -> BoolArray:
        """Who refreshes, prefills or has a short block, [num_reqs]: no captured CUDA graph has such a step's shape."""
        return (self.end > self.begin) | self.is_short

    def of(self, index: Sequence[int]) -> "KvStep":
        """Return the same of some of the requests."""
        taken: Any = [getattr(self, field)[list(index)] for field in self.__slots__]
        return KvStep(*taken)


class KvSchedule:
    """A KV policy, and of each request what it must remember: its last decided step.

    An engine has one that decides: the scheduler's, which knows from reports what the steps before came to. Steps that
    are scheduled ahead of reports are decided by the workers' (`engine.report.StepOrder`).

    Args:
        name: the policy.
        refresh_every: of `dual`.
        block_length: positions of a block.
        stores_alone: whether what is stored predicts a block's first position.
    """

    def __init__(
        self, name: KvPolicyName, refresh_every: int | None, block_length: int, *, stores_alone: bool = False
    ) -> None:
        self.name = name
        self.stores_alone = stores_alone
        self.refresh_every = refresh_every
        self.block_length = block_length
        # Where the block of the last decided step begins, -1 for none; how many the block had; what the cache had.
        self._requests: dict[Hashable, tuple[int, int, int]] = {}
        self.pins: dict[Hashable, Pins] = {}  # what is given of their answers, of those of which anything is

    @property
    def is_causal(self) -> bool:
        """Tell whether stored K/V never change."""
        return self.name in ("block_causal", "causal")

    @property
    def known(self) -> Set[Hashable]:
        """Requests of which anything is remembered."""
        return self._requests.keys()

    def block_start(self, num_known: IntArray) -> IntArray:
        """Return where the active blocks begin, of requests with so many known tokens."""
        return num_known - num_known % self.block_length if self.name == "block_causal" else num_known

    def stored_behind(self, start: int) -> Collection[int]:
        """Return how many positions may lie before a request's block behind a step, of one that began at `start`."""
        return start, start + self.block_length

    def add(self, request: Hashable, num_hit: int, pins: Pins | None = None) -> None:
        """Begin a request, or begin it anew; it finds so many positions in the prefix cache."""
        self.forget(request)
        self._requests[request] = -1, 0, num_hit
        if pins is not None:
            self.pins[request] = pins

    def forget(self, request: Hashable) -> None:
        """Forget a request, which may be unknown."""
        self._requests.pop(request, None)
        self.pins.pop(request, None)

    def note(self, request: Hashable, block_start: int) -> None:
        """Take note of a decided step; of one that began the next block, where that begins."""
        before, num_steps, num_hit = self._requests[request]
        self._requests[request] = block_start, num_steps + 1 if block_start == before else 1, num_hit

    def step(self, requests: Sequence[Hashable], num_known: IntArray, seq_len: IntArray) -> KvStep:
        """Decide what the next step stores.

        Args:
            requests: that take it, [num_reqs].
            num_known: [num_reqs], tokens of each.
            seq_len: [num_reqs], end of each one's row; under `block_causal` anything.
        """
        block_start = self.block_start(num_known)
        remembered = np.array([self._requests[request] for request in requests], dtype=np.int64)
        before, num_steps, num_hit = remembered.reshape(-1, 3).T
        is_new, begins_block = before < 0, before != block_start
        if self.is_causal:
            begin, end = np.where(is_new, num_hit, block_start), block_start
        else:
            step = np.where(begins_block, 0, num_steps)
            begin, end = refreshed(
                self.name, self.refresh_every, self.block_length, begins_block, step, block_start, seq_len
            )
            end = np.where(self._is_given(requests, block_start), begin, end)
        comes_alone = (block_start == num_known) & self.stores_alone
        return KvStep(
            num_known=num_known,
            begin=begin,
            end=end,
            commits=begins_block & ~is_new & self.is_causal,
            is_new=is_new,
            stores_alone=begins_block & comes_alone,
            is_undrafted=begins_block | (comes_alone & (num_steps == 1)),
            is_short=self._is_short(block_start, seq_len),
        )

    def _is_given(self, requests: Sequence[Hashable], block_start: IntArray) -> BoolArray:
        """Tell of whose block nothing is masked when it begins, [num_reqs]."""
        is_given = np.zeros(len(requests), dtype=bool)
        for i, request in enumerate(requests if self.pins else ()):
            pins = self.pins.get(request)
            is_given[i] = pins is not None and not pins.num_masked(int(block_start[i]), self.block_length)
        return is_given

    def _is_short(self, block_start: IntArray, seq_len: IntArray) -> BoolArray:
        """Tell whose block ends with the row, before its length; behind a row's end, where a void step is, is none."""
        is_short = (seq_len < block_start + self.block_length) & (self.name != "block_causal")
        return is_short & (self.is_causal | (block_start < seq_len))

    def num_rows(self, step: KvStep) -> IntArray:
        """Return how many rows a step has without drafts at most, [num_reqs]: a refresh spans the block."""
        stored: IntArray = step.end - step.begin
        if not self.is_causal:
            return stored.clip(self.block_length)
        return stored + self.block_length * (step.commits.astype(np.int64) + ~step.stores_alone)


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
