"""vLLM's scheduler with what block diffusion asks of it: whole rows of pages, a budget of drafts, reports of steps."""

import time
from collections import defaultdict
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_dllm.config import row_blocks
from vllm_dllm.draft.budget import BudgetRule
from vllm_dllm.engine import costs
from vllm_dllm.engine.config_hook import settings_of, spiffy_of
from vllm_dllm.engine.telemetry import RequestTotals, StepStats


class DllmScheduler(Scheduler):
    """Reserves the pages of a request's whole generation, and gives each step a budget of drafts.

    A bidirectional model stores K/V for the masked positions of the whole generation, so a request takes all its
    pages when it is admitted and never needs another. What is left of the token budget and of `max_model_len` is
    always enough for whole blocks, so that a running request is never cut.

    With speculation a denoising request has the rows of 1 + K canvases, K the same for the whole batch. The worker
    reports what became of them (`state.counters`) where vLLM would report the NaNs of its logits.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings = settings_of(self.vllm_config)
        self.block_length = self.settings.block_length
        self._allocate_slots = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_row
        self._spiffy = spiffy_of(self.vllm_config)
        if self._spiffy and self._spiffy.budget is None:
            costs.measure_at_start()
        self.rule = BudgetRule(self._spiffy.graph, self.block_length, self._spiffy.budget) if self._spiffy else None
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
        """Choose the budget, then schedule as vLLM does."""
        if self.rule is not None:
            self._trim_drafts(self.rule)
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

    def _trim_drafts(self, rule: BudgetRule) -> None:
        """Leave each request that takes a denoising step the rows of the step's budget.

        There is room for a budget if all rows fit the token budget beside the longest prompt, and if none lies behind
        `max_model_len`, where vLLM would cut them.
        """
        denoising = [request for request in self.running if request.spec_token_ids]
        if not denoising:
            return
        tokens = self.max_num_scheduled_tokens - (self.max_model_len if self.waiting else 0)
        rows = min(
            tokens // len(denoising),
            self.max_model_len - max(request.num_computed_tokens for request in denoising),
            min(len(request.spec_token_ids) for request in denoising),
        )
        budget = rule.choose(len(denoising), max(0, rows // self.block_length - 1))
        for request in denoising:
            request.spec_token_ids = request.spec_token_ids[: self.block_length * (1 + budget)]

    def _take_reports(self, output: SchedulerOutput, reports: dict[str, list[int]], updated_at_s: float) -> None:
        """Add up what the step did and tell the rule.

        A step's time counts only if it did nothing but denoise: no refresh, nobody new, resumed or preempted.
        """
        num_rows = len(next(iter(output.scheduled_spec_decode_tokens.values())))
        budget = num_rows // self.block_length - 1
        self._stats = stats = StepStats.of_step(budget, list(reports.values()))
        for req_id, row in reports.items():
            if req_id in self.requests:  # it may have been aborted meanwhile
                self._totals[req_id].add(row)
        if self.rule is None or stats.forwards == 0:
            return
        is_pure = not (
            stats.refreshes
            or output.scheduled_new_reqs
            or output.scheduled_cached_reqs.resumed_req_ids
            or output.preempted_req_ids
        )
        self.rule.observe(
            len(reports),
            budget,
            stats.total_accepted / stats.forwards,
            ms=(updated_at_s - self._scheduled_at_s) * 1e3 if is_pure else None,
            host_ms=self._host_ms if is_pure else None,
        )

    def _free_request(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Free a request; its last output says what it took."""
        kv_transfer_params, ec_transfer_params = super()._free_request(request, *args, **kwargs)
        totals = self._totals.pop(request.request_id, None)
        if totals is not None:
            kv_transfer_params = self._as_output(totals)
        return kv_transfer_params, ec_transfer_params

    def _as_output(self, totals: RequestTotals) -> dict[str, Any]:
        return totals.as_output(self._spiffy.exactness if self._spiffy else None)

    def _allocate_row(self, request: Request, num_new_tokens: int, *args: Any, **kwargs: Any) -> KVCacheBlocks | None:
        """Call `KVCacheManager.allocate_slots` for the row: the rest of it as look-ahead, and no pages for drafts."""
        row_left = self._row_len(request) - request.num_computed_tokens
        num_new_tokens = min(num_new_tokens, row_left)
        kwargs["num_lookahead_tokens"] = row_left - num_new_tokens
        return self._allocate_slots(request, num_new_tokens, *args, **kwargs)

    def _row_len(self, request: Request) -> int:
        return row_blocks(request.num_prompt_tokens, request.max_tokens, self.settings, self.max_model_len).end
