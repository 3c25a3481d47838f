"""vLLM's scheduler with what block diffusion asks of it: whole rows of pages, a budget of drafts, reports of steps."""

import time
from collections import defaultdict
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_dllm.blocks import row_blocks
from vllm_dllm.draft.budget import BudgetRule
from vllm_dllm.draft.look_ahead import smallest_budget
from vllm_dllm.engine import costs
from vllm_dllm.engine.config_hook import settings_of, spiffy_of
from vllm_dllm.engine.parent import end_with_parent
from vllm_dllm.engine.telemetry import RequestTotals, StepStats
from vllm_dllm.state.counters import Column


class DllmScheduler(Scheduler):
    """Gives requests the pages that their K/V need, and each step a budget of drafts.

    A bidirectional model stores K/V for the masked positions of the whole generation, so a request takes all its
    pages when it is admitted and never needs another. A block-causal model stores finished blocks alone, so a request
    takes pages as its blocks begin, and a page is cached for other requests once all its positions are stored, as the
    worker reports. What is left of the token budget and of `max_model_len` is always enough for whole blocks, so that a
    running request is never cut.

    With speculation a denoising request has the rows of 1 + K canvases, K the same for all in the batch but those
    which begin a block behind one that is not stored yet: they have the rows of both blocks. The worker reports what
    became of them (`state.counters`) where vLLM would report the NaNs of its logits.
    """

    least_canvases = 1
    """Canvases that a denoising request has rows for at least."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()
        self.settings = settings_of(self.vllm_config)
        self.block_length = self.settings.block_length
        self._is_causal = self.settings.kv_policy == "block_causal"
        self._stored: dict[str, int] = {}  # of running requests of a block-causal model: positions with K/V
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self._cache_blocks = self.kv_cache_manager.cache_blocks
        self.kv_cache_manager.allocate_slots = self._allocate_pages
        self.kv_cache_manager.cache_blocks = _cache_nothing
        self._spiffy = spiffy_of(self.vllm_config)
        if self._spiffy and self._spiffy.budget is None:
            costs.measure_at_start()
        is_async = bool(self.vllm_config.scheduler_config.async_scheduling)
        look_ahead_from = smallest_budget(self.settings, is_async=is_async)
        self.rule = (
            BudgetRule(self._spiffy.graph, self.block_length, self._spiffy.budget, look_ahead_from)
            if self._spiffy
            else None
        )
        self._totals: defaultdict[str, RequestTotals] = defaultdict(RequestTotals)
        self._stats: StepStats | None = None
        self._scheduled_at_s = 0.0
        self._updated_at_s: float | None = None  # None: the engine had no work then
        self._host_ms: float | None = None

    @property
    def wants_cost_curve(self) -> bool:
        """Whether the budget is chosen by what steps cost."""
        return self.rule is not None and self.rule.fixed is None and self.max_budget > 0

    @property
    def max_budget(self) -> int:
        """The largest budget of any step."""
        return self._spiffy.max_nodes if self._spiffy else 0

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Choose the rows of the requests, then schedule as vLLM does."""
        self._choose_rows()
        output = super().schedule(*args, **kwargs)
        self._scheduled_at_s = time.perf_counter()
        if self._updated_at_s is not None:
            self._host_ms = (self._scheduled_at_s - self._updated_at_s) * 1e3
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take the step's report, then go on as vLLM does; an emitted block tells what its request took so far."""
        updated_at_s = time.perf_counter()
        reports, model_runner_output.num_nans_in_logits = model_runner_output.num_nans_in_logits, None
        rows = scheduler_output.scheduled_spec_decode_tokens
        if reports and rows:
            self._take_reports(scheduler_output, {req_id: reports[req_id] for req_id in rows}, updated_at_s)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.request_id in self._totals:  # else it finished, see _free_request
                    output.kv_transfer_params = self._as_output(self._totals[output.request_id])
        self._updated_at_s = updated_at_s if self.running else None
        self._host_ms = None
        return outputs

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: SpecDecodingStats | None,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> SpecDecodingStats | None:
        """Count as vLLM does, but not by draft position, which says nothing here."""
        if not self.log_stats:
            return None
        stats = spec_decoding_stats or SpecDecodingStats(self.num_spec_tokens)
        stats.num_drafts += 1
        stats.num_draft_tokens += self.block_length  # vLLM's canvas positions: those of the root, not of drafts
        stats.num_accepted_tokens += num_accepted_tokens
        return stats

    def make_stats(
        self, spec_decoding_stats: SpecDecodingStats | None = None, *args: Any, **kwargs: Any
    ) -> SchedulerStats | None:
        """Make vLLM's statistics; those of a step with a report carry ours."""
        if self._stats is not None and spec_decoding_stats is not None:
            spec_decoding_stats.num_accepted_tokens_per_pos = self._stats.encode()
        self._stats = None
        return super().make_stats(spec_decoding_stats, *args, **kwargs)

    def _choose_rows(self) -> None:
        """Leave each request that takes a denoising step the rows of its canvases.

        There is room for a budget if all rows fit the token budget beside the longest prompt, and if none lies behind
        `max_model_len`, where vLLM would cut them.
        """
        denoising = self._denoising()
        committing = [request for request in denoising if self._commits(request)]
        drafting = [request for request in denoising if not self._commits(request)]
        _trim(committing, 2 * self.block_length)
        if not drafting:
            return
        budget = 0
        if self.rule is not None:
            tokens = self.max_num_scheduled_tokens - (self.max_model_len if self.waiting else 0)
            rows = min(
                (tokens - 2 * self.block_length * len(committing)) // len(drafting),
                self.max_model_len - max(request.num_computed_tokens for request in drafting),
                min(len(request.spec_token_ids) for request in drafting),
            )
            budget = self.rule.choose(len(drafting), max(0, rows // self.block_length - 1), len(committing))
        _trim(drafting, self.block_length * max(1 + budget, self.least_canvases))

    def _denoising(self) -> list[Request]:
        """Return the running requests that take a denoising step."""
        return [request for request in self.running if request.spec_token_ids]

    def _commits(self, request: Request) -> bool:
        """Tell whether a request's next step stores a block that it emitted."""
        stored = self._stored.get(request.request_id)
        return stored is not None and request.num_computed_tokens >= stored + self.block_length

    def _take_reports(self, output: SchedulerOutput, reports: dict[str, list[int]], updated_at_s: float) -> None:
        """Add up what the step did and tell the rule.

        A step's time counts only if it did nothing but denoise: no refresh or prefill, nobody new, resumed or
        preempted.
        """
        drafting = {req_id: row for req_id, row in reports.items() if not row[Column.COMMITS]}
        num_rows = len(output.scheduled_spec_decode_tokens[next(iter(drafting))]) if drafting else self.block_length
        budget = min(num_rows // self.block_length - 1, self.max_budget)
        self._stats = stats = StepStats.of_step(budget, list(reports.values()))
        for req_id, row in reports.items():
            if req_id in self.requests:  # it may have been aborted meanwhile
                self._totals[req_id].add(row)
        has_prefill = self._is_causal and not reports.keys() <= self._stored.keys()
        if self._is_causal:
            self._cache_stored(reports)
        forwards = sum(row[Column.FORWARDS] for row in drafting.values())
        if self.rule is None or forwards == 0:
            return
        is_pure = not (
            has_prefill
            or stats.refreshes
            or output.scheduled_new_reqs
            or output.scheduled_cached_reqs.resumed_req_ids
            or output.preempted_req_ids
        )
        ms, host_ms = self._step_ms(updated_at_s) if is_pure else (None, None)
        num_begins = len(reports) - len(drafting)
        self.rule.observe(len(drafting), budget, stats.total_accepted / forwards, ms, host_ms, num_begins)

    def _step_ms(self, updated_at_s: float) -> tuple[float | None, float | None]:
        """Return what the step took, and what passed between the step before and this one; None if unknown."""
        return (updated_at_s - self._scheduled_at_s) * 1e3, self._host_ms

    def _cache_stored(self, reports: dict[str, list[int]]) -> None:
        """Offer the pages whose positions are all stored to other requests, before a finished one gives them back."""
        for req_id, row in reports.items():
            request = self.requests.get(req_id)
            if request is None or request.num_stale_output_tokens:  # it was aborted or preempted: the pages are gone
                continue
            self._stored[req_id] = row[Column.STORED]
            # A block that a look-ahead stored is cached a step later: its tokens are not the request's yet.
            self._cache_blocks(request, min(row[Column.STORED], request.num_tokens))

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Preempt a request; when it comes back, all that it knows is its prompt."""
        self._stored.pop(request.request_id, None)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Free a request; its last output says what it took."""
        kv_transfer_params, ec_transfer_params = super()._free_request(request, *args, **kwargs)
        self._stored.pop(request.request_id, None)
        totals = self._totals.pop(request.request_id, None)
        if totals is not None:
            kv_transfer_params = self._as_output(totals)
        return kv_transfer_params, ec_transfer_params

    def _as_output(self, totals: RequestTotals) -> dict[str, Any]:
        return totals.as_output(self._spiffy.exactness if self._spiffy else None)

    def _allocate_pages(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """Call `KVCacheManager.allocate_slots` for the positions that get K/V.

        The difference from the scheduled tokens is vLLM's number of lookahead tokens, which may be negative.
        vLLM would cache what it takes for computed now.
        """
        scheduled = request.num_computed_tokens + kwargs.get("num_new_computed_tokens", 0) + num_new_tokens
        kwargs["num_lookahead_tokens"] = self._paged_end(request) - scheduled
        kwargs["delay_cache_blocks"] = True
        return self._allocate_slots(request, num_new_tokens, *args, **kwargs)

    def _paged_end(self, request: Request) -> int:
        """Return up to where a request has pages: to the end of its row, or of its block in a block-causal model."""
        if not self._is_causal:
            return row_blocks(request.num_prompt_tokens, request.max_tokens, self.settings, self.max_model_len).end
        return request.num_tokens - request.num_tokens % self.block_length + self.block_length


class DllmAsyncScheduler(DllmScheduler, AsyncScheduler):
    """Schedules a step of a block-causal model while the step before is under way.

    It does not know which requests begin a block in the step, so all have room for a block to commit. vLLM's counts
    take what is under way for accepted until it is known.
    """

    least_canvases = 2

    def _denoising(self) -> list[Request]:
        """Leave a request out of the step where its count comes too near to `max_model_len`, until it is known."""
        denoising = super()._denoising()
        last = self.max_model_len - self.least_canvases * self.block_length
        for request in denoising:
            if request.num_computed_tokens > last:
                request.next_decode_eligible_step = self.current_step + 2  # `schedule` counts before it compares
        return [request for request in denoising if request.num_computed_tokens <= last]

    def _commits(self, request: Request) -> bool:
        return False

    def _paged_end(self, request: Request) -> int:
        """Add a block to what is known, if the step before may end one."""
        return super()._paged_end(request) + (self.block_length if request.num_output_placeholders else 0)

    def _step_ms(self, updated_at_s: float) -> tuple[float | None, float | None]:
        """Return the time from one step's end to the next, in which the host does its part meanwhile."""
        return None if self._updated_at_s is None else (updated_at_s - self._updated_at_s) * 1e3, None


def _trim(requests: list[Request], num_rows: int) -> None:
    for request in requests:
        request.spec_token_ids = request.spec_token_ids[:num_rows]


def _cache_nothing(request: Request, num_computed_tokens: int) -> None:
    """Stand for `KVCacheManager.cache_blocks` where vLLM calls it: it does not know what is stored."""
