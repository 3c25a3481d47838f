"""How many rows of a forward the requests of a step need, as the scheduler counts them before the step."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from vllm.logger import init_logger
from vllm.v1.request import Request

from vllm_dllm.config import DllmConfig
from vllm_dllm.engine.pins import pins_of
from vllm_dllm.engine.targets import blocks_of
from vllm_dllm.state.kv import KvStep
from vllm_dllm.state.windows import make_schedule

logger = init_logger("vllm.dllm")


def most_drafts(request: Request) -> int:
    """Return how many drafts a request lets a step evaluate for it."""
    args = _extra_args(request)
    if args.get("dllm_speculation") is not None:  # false, which vLLM's server makes 0
        return 0
    budget = args.get("dllm_budget")
    return sys.maxsize if budget is None else int(budget)


class StepRows:
    """What each request has of a step's rows, and what is left of them; what a request needs, without drafts.

    What it stores is decided by `kv`, which is told what steps came to; the worker plans by the same (`engine.plan`).

    Args:
        settings: of the server.
        max_model_len: positions of a request.
        max_rows: of a step.
        stores_alone, logit_shift: as of `KvSchedule`.
    """

    def __init__(
        self,
        settings: DllmConfig,
        max_model_len: int,
        max_rows: int,
        *,
        stores_alone: bool = False,
        logit_shift: bool = False,
    ) -> None:
        self.settings = settings
        self.block_length = settings.block_length
        self.is_causal = settings.is_block_causal
        self.max_model_len = max_model_len
        self.max_rows = max_rows
        self.kv = make_schedule(settings, stores_alone=stores_alone, logit_shift=logit_shift)
        self._row_ends: dict[str, int] = {}
        self.given: dict[str, int] = {}
        self.free = 0

    def drafts_within(self, request: Request, budget: int) -> int:
        """Return how many of so many drafts a request has room for: vLLM counts each as a position."""
        return min(budget, self.max_model_len - request.num_computed_tokens - self.block_length)

    def begin_step(self) -> None:
        """Take all rows back."""
        self.given, self.free = {}, self.max_rows

    def give(self, request: Request, num_rows: int) -> bool:
        """Let a request, which may have some already, have so many more rows, if they are left; tells whether."""
        if num_rows > self.free:
            return False
        self.free -= num_rows
        self.given[request.request_id] = self.given.get(request.request_id, 0) + num_rows
        return True

    def given_to(self, requests: Iterable[str]) -> int:
        """Return how many rows some requests have, who all were given some."""
        return sum(self.given[req_id] for req_id in requests)

    def total(self, scheduled: Mapping[str, int], least: int = 0) -> int:
        """Return how many rows those have whom vLLM scheduled, as it is told; never fewer than it counts tokens.

        Args:
            scheduled: tokens that it counts, by request.
            least: rows that the step counts as, if it has not more.

        Raises: RuntimeError for more rows than a step may have.
        """
        total = max(self.given_to(scheduled), sum(scheduled.values()), least)
        if total > self.max_rows:
            raise RuntimeError(f"a step has {total} rows, max_num_batched_tokens is {self.max_rows}")
        return total

    def admit(self, request: Request, num_hit: int) -> None:
        """Begin a request, or begin it anew after a preemption; it finds so many positions in the prefix cache."""
        pins = pins_of(request.sampling_params, request.num_prompt_tokens)
        self.kv.add(request.request_id, num_hit, request.num_prompt_tokens, pins)
        if self.settings.kv_policy in ("freecache", "dkv_pd") and request.num_tokens > request.num_prompt_tokens:
            logger.warning(
                "Request %s was preempted behind its first block: kv_policy %r keeps what earlier steps "
                "computed, which is lost, so its further tokens may be others than without",
                request.request_id,
                self.settings.kv_policy,
            )

    def step(self, requests: Sequence[Request]) -> KvStep:
        """Decide what a step of some requests stores."""
        num_known = np.array([request.num_tokens for request in requests], dtype=np.int64)
        has_ends = not self.settings.is_aligned
        end = np.array([self.seq_end(r) for r in requests], dtype=np.int64) if has_ends else num_known
        return self.kv.step([request.request_id for request in requests], num_known, end)

    def needed(self, requests: Sequence[Request]) -> tuple[list[int], list[bool], list[int]]:
        """Return how many rows running requests need, who has no drafts, since nothing of a block is known, and how
        many rows a draft has.
        """
        step, twins = self.step(requests), np.array([self.num_sequences(request) for request in requests])
        num_rows, num_span_rows = self.kv.num_rows(step) * twins, step.num_span_rows * twins
        return num_rows.tolist(), step.is_undrafted.tolist(), num_span_rows.tolist()

    def num_sequences(self, request: Request) -> int:
        """Return how many sequences a request is evaluated as: with guidance it has a twin."""
        if self.settings.cfg_scale is None:
            return 1
        scale = _extra_args(request).get("dllm_cfg_scale")
        return 1 + bool(self.settings.cfg_scale if scale is None else scale)

    @property
    def longest(self) -> int:
        """Rows that the first step of a request may need."""
        return self.max_model_len * (1 + (self.settings.cfg_scale is not None))

    def for_drafts(self, *, is_waiting: bool) -> int:
        """Return how many rows are left, beside the longest prompt if any waits; below 0 where that has no room."""
        return self.free - self.longest * is_waiting

    def num_first(self, request: Request) -> int:
        """Positions of a request's first block; with self-speculation that is a window of one, its last token."""
        if self.settings.has_windows:
            return min(self.block_length, self.row_end(request) - request.num_tokens)
        return 1 if self.settings.mode == "self_speculation" else self.block_length

    def first(self, request: Request, num_hit: int) -> int:
        """Return the rows of the step that admits a request: of its prompt, behind a cache hit, and of its block."""
        if not self.is_causal:  # vLLM counts a whole block, where a short one ends with the row
            end = max(self.seq_end(request), request.num_tokens + self.block_length)
            return end * self.num_sequences(request)
        # Of a partial block vLLM counts the known tokens twice.
        return request.num_tokens - num_hit + self.num_first(request)

    def may_be_short(self, request: Request) -> bool:
        """Tell whether a request's next step may have a short block, wherever the steps under way lead it."""
        if self.settings.kv_policy != "causal":
            return False
        return request.num_tokens + 2 * self.block_length > self.row_end(request)

    def seq_end(self, request: Request) -> int:
        """Return where a request's sequence ends in the steps of its block: with its row, or a horizon before that."""
        own, end = _extra_args(request).get("dllm_horizon"), self.row_end(request)
        horizon = self.settings.horizon if own is None else int(own)
        return end if horizon is None else min(end, request.num_tokens + horizon * self.block_length)

    def row_end(self, request: Request) -> int:
        """Return where a request's row ends."""
        end = self._row_ends.get(request.request_id)
        if end is None:
            args = (request.sampling_params, request.num_prompt_tokens, request.max_tokens)
            end = blocks_of(*args, self.settings, self.max_model_len).end
            self._row_ends[request.request_id] = end
        return end

    @property
    def known(self) -> set[str]:
        """Requests of which anything is remembered."""
        return {str(request) for request in self.kv.known} | self._row_ends.keys()

    def forget(self, request: Request) -> None:
        """Forget a preempted or freed request."""
        self.kv.forget(request.request_id)
        self._row_ends.pop(request.request_id, None)


def _extra_args(request: Request) -> Mapping[str, Any]:
    return (request.sampling_params and request.sampling_params.extra_args) or {}


def leave_out(request: Request, current_step: int) -> None:
    """Let vLLM's next `schedule` pass a running request over; it counts the step before it compares."""
    request.next_decode_eligible_step = current_step + 2
