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
  - `freecache` refreshes the whole row once, then from the block that ended on, which is full by now and never
    computed again (FlashDLM);
  - `dkv` refreshes the whole row at every n-th step of a block, too, and recomputes the block and what follows at the
    others, but for tokens that were known before the step before, whose K/V stay (dKV-Cache; `state.delayed`);
  - `dkv_pd` does the same, but refreshes the prompt once, and then from the prompt's end on (its variant PD);
  - `vicinity` refreshes the whole row when a block begins, and in the warm-up steps of a request's first one (dInfer);
- under `block_causal` the *prefill* of a new request: the whole blocks of its prompt behind the prefix-cache hit; under
  `causal` all of its prompt. A block that ended is stored by its *commit*, one more node in the first step of the next
  block, unless a look-ahead (`draft.look_ahead`) stored it before.

The block's rows may have neighbours in flight, which store nothing either: a canvas is evaluated over its *span*. That
reaches to the end of the row under `freecache`, some positions to both sides under `vicinity`, over the whole row with
`refresh_every=1`, else it is the block. What a draft's span sees is frozen, so its forward is the one that the decoder
would make.

Where what is stored predicts a block's first position (`stores_alone`), the step in which a block begins stores and
nothing else: its last row decides that position, and the block's rows are in flight from the next step on.
"""

from collections.abc import Collection, Hashable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dllm.arrays import BoolArray, IntArray
from vllm_dllm.names import BIDIRECTIONAL, DELAYED, KvPolicyName
from vllm_dllm.state.pins import Pins


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
    span_begin: IntArray  # first position that a canvas is evaluated with, where it is not part of a refresh
    span_end: IntArray  # behind the last one
    is_wide: BoolArray  # whose canvases have neighbours in flight
    is_delayed: BoolArray  # whose refresh leaves the K/V of some of its positions as they are

    @property
    def is_long(self) -> BoolArray:
        """Who refreshes, prefills, has neighbours in flight or a short block, [num_reqs]: as no captured CUDA graph."""
        return (self.end > self.begin) | self.is_short | self.is_wide

    @property
    def num_span_rows(self) -> IntArray:
        """Rows of a canvas, [num_reqs]."""
        return self.span_end - self.span_begin

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
        refresh_every: of `dual`, `dkv` and `dkv_pd`.
        block_length: positions of a block.
        stores_alone: whether what is stored predicts a block's first position.
        vicinity: of `vicinity`: positions before and behind the block that are in flight with it, warm-up steps.
        logit_shift: whether a position is predicted by the row on its left.
    """

    def __init__(
        self,
        name: KvPolicyName,
        refresh_every: int | None,
        block_length: int,
        *,
        stores_alone: bool = False,
        vicinity: tuple[int, int, int] = (0, 0, 0),
        logit_shift: bool = False,
    ) -> None:
        self.name = name
        self.stores_alone = stores_alone
        self.refresh_every = refresh_every
        self.block_length = block_length
        self.vicinity = vicinity
        self.logit_shift = logit_shift
        # Where the block of the last decided step begins, -1 for none; how many the block had; what the cache had;
        # where the first block begins.
        self._requests: dict[Hashable, tuple[int, int, int, int]] = {}
        self.pins: dict[Hashable, Pins] = {}  # what is given of their answers, of those of which anything is

    @property
    def is_causal(self) -> bool:
        """Tell whether stored K/V never change."""
        return self.name not in BIDIRECTIONAL

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

    def may_store(self, start: int, end: int, prompt_len: int, *, begins_block: bool) -> tuple[int, ...]:
        """Return how many positions a bidirectional request's step may store, of a block at `start`, a row to `end`."""
        if self.name == "freecache":
            return (end, end - start + self.block_length + self.logit_shift) if begins_block else (0,)
        if self.name in DELAYED:
            refreshed = end - prompt_len + self.logit_shift if self.name == "dkv_pd" else end
            return (end, refreshed) if begins_block else (refreshed, end - start + self.logit_shift)
        return (end,) if begins_block else (0, end, end - start)

    def add(self, request: Hashable, num_hit: int, prompt_len: int = 0, pins: Pins | None = None) -> None:
        """Begin a request, or begin it anew.

        Args:
            request: its name.
            num_hit: positions that it finds in the prefix cache.
            prompt_len: of the prompt that it came with.
            pins: what is given of its answer.
        """
        self.forget(request)
        self._requests[request] = -1, 0, num_hit, prompt_len
        if pins is not None:
            self.pins[request] = pins

    def forget(self, request: Hashable) -> None:
        """Forget a request, which may be unknown."""
        self._requests.pop(request, None)
        self.pins.pop(request, None)

    def note(self, request: Hashable, block_start: int) -> None:
        """Take note of a decided step; of one that began the next block, where that begins."""
        before, num_steps, num_hit, prompt_len = self._requests[request]
        num_steps = num_steps + 1 if block_start == before else 1
        self._requests[request] = block_start, num_steps, num_hit, prompt_len

    def step(self, requests: Sequence[Hashable], num_known: IntArray, seq_len: IntArray) -> KvStep:
        """Decide what the next step stores.

        Args:
            requests: that take it, [num_reqs].
            num_known: [num_reqs], tokens of each.
            seq_len: [num_reqs], end of each one's row; under `block_causal` anything.
        """
        block_start = self.block_start(num_known)
        remembered = np.array([self._requests[request] for request in requests], dtype=np.int64)
        before, num_steps, num_hit, prompt_len = remembered.reshape(-1, 4).T
        is_new, begins_block = before < 0, before != block_start
        step = np.where(begins_block, 0, num_steps)
        is_warming = begins_block
        if self.name == "vicinity":
            is_warming = begins_block | ((block_start == prompt_len) & (step <= self.vicinity[2]))
        is_delayed = np.zeros_like(is_new)
        if self.name in DELAYED:  # the published loop of LLaDA takes two whole steps, that of Dream one
            is_delayed = ~is_warming & (step % (self.refresh_every or 1) > 0) & ((step > 1) | self.logit_shift)
        if self.is_causal:
            begin, end = np.where(is_new, num_hit, block_start), block_start
        else:
            begin, end = self._refreshed(is_new, is_warming, step, block_start, prompt_len, seq_len)
            begin = np.where(is_delayed, block_start - self.logit_shift, begin)
            end = np.where(is_delayed, seq_len, end)
            end = np.where(self._is_given(requests, block_start), begin, end)
        span_begin, span_end = self._span(block_start, seq_len)
        comes_alone = (block_start == num_known) & self.stores_alone
        return KvStep(
            num_known=num_known,
            begin=begin,
            end=end,
            commits=begins_block & ~is_new & self.is_causal,
            is_new=is_new,
            stores_alone=begins_block & comes_alone,
            is_undrafted=is_warming | (comes_alone & (num_steps == 1)),
            is_short=self._is_short(block_start, seq_len),
            span_begin=span_begin,
            span_end=span_end,
            is_wide=span_end - span_begin > self.block_length,
            is_delayed=is_delayed,
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
            return np.where(stored > 0, stored, step.num_span_rows)
        return stored + self.block_length * (step.commits.astype(np.int64) + ~step.stores_alone)

    def _refreshed(
        self,
        is_new: BoolArray,
        is_warming: BoolArray,
        step: IntArray,
        block_start: IntArray,
        prompt_len: IntArray,
        seq_len: IntArray,
    ) -> tuple[IntArray, IntArray]:
        """Return which positions [begin, end) of bidirectional requests a step refreshes; empty ones for none.

        Args:
            is_new: [num_reqs], who has no decided step yet.
            is_warming: [num_reqs], whose block has none, or is in its warm-up steps.
            step: [num_reqs], decided steps of the block.
            block_start, prompt_len, seq_len: [num_reqs].
        """
        if self.name == "prefix":
            # Nothing follows the last block, and nobody reads its own K/V: its steps are no refreshes.
            is_due = is_warming | (block_start + self.block_length < seq_len)
            return np.where(is_warming, 0, block_start), np.where(is_due, seq_len, block_start)
        if self.name == "freecache":
            begin = np.where(is_new, 0, block_start - self.block_length - self.logit_shift)
            return begin, np.where(is_warming, np.maximum(seq_len, begin), begin)
        is_due = is_warming if self.refresh_every is None else step % self.refresh_every == 0
        is_due |= (step == 1) & (self.name in DELAYED)
        keeps_prompt = ~is_new & (self.name == "dkv_pd")
        begin = np.where(keeps_prompt, prompt_len - self.logit_shift, 0)
        return begin, np.where(is_due, seq_len, begin)

    def _span(self, block_start: IntArray, seq_len: IntArray) -> tuple[IntArray, IntArray]:
        """Return the positions [begin, end) that a canvas is evaluated with; arguments as of `_refreshed`.

        Under a logit shift `freecache` begins with the row that predicts the block's first position.
        """
        begin, end = block_start, block_start + self.block_length
        if self.name == "freecache":
            return begin - self.logit_shift, np.maximum(seq_len, end)
        if self.refresh_every == 1:
            return np.zeros_like(begin), np.maximum(seq_len, end)
        if self.name == "vicinity":
            before, behind, _ = self.vicinity
            return (begin - before).clip(0), np.maximum(np.minimum(end + behind, seq_len), end)
        return begin, end
