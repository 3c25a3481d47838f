"""Linear self-speculation: windows that diffusion drafts and autoregression verifies (`reference.self_speculation`).

A window begins with the last known token, whose K/V are not stored yet. One step *drafts* it: its other positions are
masked, all see each other and what is stored, and each takes its token. The next step *verifies* it: a causal forward
stores its K/V, and its rows say what follows each position. Drafts are accepted as long as they are that; they and the
token behind them, the *bonus token*, are emitted at once, and the bonus token begins the next window. What was stored
for drafts that were not accepted is written over by the next window, before anybody reads it. A request's first step
verifies a window of one, its prompt's last token, behind the rest of the prompt.

So each request takes steps of two kinds in turn, whatever its neighbours do. The host knows which kind is next and how
long the window is from reports of the steps before.
"""

from collections.abc import Collection, Hashable, Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vllm_dllm.arrays import IntArray
from vllm_dllm.state.canvas import Blocks
from vllm_dllm.state.kv import KvSchedule, KvStep
from vllm_dllm.state.pins import Pins
from vllm_dllm.state.report import StepFacts
from vllm_dllm.state.settle import Emission, Ledger
from vllm_dllm.state.sliding import SlidingSchedule

if TYPE_CHECKING:
    from vllm_dllm.config import DllmConfig

MIN_WINDOW = 8
"""Positions of the first window, and the least that one has but where its reply ends."""


@dataclass(frozen=True, slots=True)
class Window:
    """What is known of a request's next step.

    Attributes:
        start: where the window begins; None before the request's first step.
        length: of its windows, but for one that would reach beyond its row.
        num_hit: positions that it found in the prefix cache.
        is_drafted: whether the window is there, to be verified.
    """

    start: int | None
    length: int
    num_hit: int
    is_drafted: bool = False


class WindowSchedule(KvSchedule):
    """What steps of self-speculation store; `begin` and `end` of its steps are equal where a step drafts.

    Args:
        max_window: positions of a window, at most.
    """

    def __init__(self, max_window: int) -> None:
        super().__init__("causal", None, max_window, stores_alone=True)
        self._windows: dict[Hashable, Window] = {}

    @property
    def known(self) -> Set[Hashable]:
        """Requests of which anything is remembered."""
        return self._windows.keys()

    def block_start(self, num_known: IntArray) -> IntArray:
        """Return where windows begin, of requests with so many known tokens."""
        return num_known - 1

    def stored_behind(self, start: int) -> Collection[int]:
        """Return how many positions may lie before a request's window behind a step, of one that began at `start`."""
        return range(start, start + self.block_length + 1)

    def add(self, request: Hashable, num_hit: int, prompt_len: int = 0, pins: Pins | None = None) -> None:
        """Begin a request, or begin it anew; it finds so many positions in the prefix cache."""
        self._windows[request] = Window(None, min(MIN_WINDOW, self.block_length), num_hit)

    def forget(self, request: Hashable) -> None:
        """Forget a request, which may be unknown."""
        self._windows.pop(request, None)

    def note(self, request: Hashable, stored: int) -> None:
        """Take note of a decided step, behind which so many positions are stored.

        The next window is twice as long after all drafts were accepted, half as long after at most half. One that the
        row's end cut counts as whole: what is left of the row is shorter than any length that may come of it.
        """
        window = self._windows[request]
        length, num_drafts = window.length, window.length - 1
        if window.is_drafted and window.start is not None:
            num_accepted = stored - window.start - 1
            if num_accepted == num_drafts:
                length = min(2 * length, self.block_length)
            elif 2 * num_accepted <= num_drafts:
                length = max(length // 2, min(MIN_WINDOW, self.block_length))
        self._windows[request] = replace(window, start=stored, length=length, is_drafted=stored == window.start)

    def lengths(self, requests: Sequence[Hashable], num_known: IntArray, seq_len: IntArray) -> IntArray:
        """Return the lengths of the windows of the next steps, [num_reqs]; arguments as of `step`.

        A window emits as many tokens as it has positions, at most, so it is no longer than the row has room for.
        """
        windows = [self._windows[request] for request in requests]
        length = np.array([window.length for window in windows], dtype=np.int64)
        is_new = np.array([window.start is None for window in windows], dtype=bool)
        return np.where(is_new, 1, np.minimum(length, seq_len - num_known))

    def num_unstored(self, _requests: Sequence[Hashable], num_known: IntArray) -> IntArray:
        """Return how many rows the next steps have beside their windows, [num_reqs]: none."""
        return np.zeros_like(num_known)

    def step(self, requests: Sequence[Hashable], num_known: IntArray, seq_len: IntArray) -> KvStep:
        """Decide what the next step stores; who stores verifies, the others draft. A window of one has no drafts."""
        windows = [self._windows[request] for request in requests]
        is_new = np.array([window.start is None for window in windows], dtype=bool)
        num_hit = np.array([window.num_hit for window in windows], dtype=np.int64)
        is_drafted = np.array([window.is_drafted for window in windows], dtype=bool)
        start, length = self.block_start(num_known), self.lengths(requests, num_known, seq_len)
        verifies = is_new | is_drafted | (length == 1)
        nobody = np.zeros_like(is_new)
        return KvStep(
            num_known=num_known,
            begin=np.where(is_new, num_hit, start),
            end=start + length * verifies,
            commits=nobody,
            is_new=is_new,
            stores_alone=verifies,
            is_undrafted=~nobody,
            is_short=nobody,
            span_begin=start,
            span_end=start + length,
            is_wide=nobody,
            is_delayed=nobody,
        )


def make_schedule(settings: "DllmConfig", *, stores_alone: bool, logit_shift: bool = False) -> KvSchedule:
    """Make what decides which K/V a server's steps store; arguments as of `KvSchedule`."""
    if settings.has_windows:
        return SlidingSchedule(settings.block_length)
    if settings.mode == "self_speculation":
        return WindowSchedule(settings.block_length)
    return KvSchedule(
        settings.kv_policy,
        settings.interval,
        settings.block_length,
        stores_alone=stores_alone,
        vicinity=settings.vicinity,
        logit_shift=logit_shift,
    )


def settle_windows(
    canvas: Tensor, token_ids: Tensor, blocks: Blocks, ledger: Ledger, mask_token_id: int
) -> tuple[Tensor, Emission]:
    """Settle a step: accept what verified drafts and emit it, or keep what was drafted.

    Args:
        canvas: [num_reqs, block_length] int64, the windows, which fewer positions may belong to.
        token_ids: [num_reqs, block_length] int64, what the rows chose: of windows that were drafted each one's own
            token, of windows that were verified the next position's.
        blocks: where the windows lie.
        ledger: of the step. vLLM counts a window's positions; who verifies is `begun`.
        mask_token_id: what stands for what is to be drafted.

    Returns: the next canvases [num_reqs, block_length] int64, and what the step comes to.
    """
    offset = torch.arange(canvas.shape[1], device=canvas.device)
    length = ledger.num_counted[:, None]
    verifies = torch.zeros_like(blocks.start) if ledger.begun is None else ledger.begun
    is_draft = (offset[1:] < length) & (verifies > 0)[:, None]
    came_true = (token_ids[:, :-1] == canvas[:, 1:]) & is_draft
    num_accepted = came_true.long().cumprod(1).sum(1)
    num_sampled = (num_accepted + 1) * verifies
    bonus = token_ids.gather(1, num_accepted[:, None])
    begun = torch.where(offset == 0, bonus, mask_token_id)
    drafted = torch.where((offset > 0) & (offset < length), token_ids, canvas)
    num_stored = 0 if ledger.planned is None else ledger.planned[2]
    none, one = torch.zeros_like(verifies), torch.ones_like(verifies)
    facts = StepFacts(
        forwards=one,
        refreshes=none,
        unmasked=num_sampled,
        accepted=num_accepted,
        finished=verifies,
        stored=blocks.start + num_sampled,
        wrote=num_stored - (ledger.num_counted * verifies - num_sampled),
        commits=none,
        left=none,
        depth=offset[1:].expand_as(is_draft),
        proposed=is_draft,
    )
    return torch.where((verifies > 0)[:, None], begun, drafted), ledger.emission(token_ids, num_sampled, facts)
