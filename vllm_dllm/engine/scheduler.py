"""vLLM's scheduler with what block diffusion asks of it: whole rows of pages, a budget of drafts, reports of steps."""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
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
from vllm_dllm.engine import stats_way
from vllm_dllm.engine.configs import settings_of, spiffy_of
from vllm_dllm.engine.pages import DllmPages
from vllm_dllm.engine.parent import end_with_parent
from vllm_dllm.engine.report import RequestReport, StepReport, take_report
from vllm_dllm.engine.state_check import StateCheck
from vllm_dllm.engine.telemetry import RequestTotals, StepStats
from vllm_dllm.engine.worker_check import CheckLevel, check_level
from vllm_dllm.errors import UnsupportedVllmError


class DllmScheduler(Scheduler):
    """Gives requests the pages that their K/V need, and each step a budget of drafts.

    A bidirectional model stores K/V for the masked positions of the whole generation, so a request takes all its
    pages when it is admitted and never needs another. A block-causal model stores finished blocks alone, so a request
    takes pages as its blocks begin, and a page is cached for other requests once all its positions are stored, as the
    worker reports. What is left of the token budget and of `max_model_len` is always enough for whole blocks, so that a
    running request is never cut.

    With speculation a denoising request has the rows of 1 + K canvases, K the same for all in the batch but those
    which begin a block behind one that is not stored yet: they have the rows of both blocks. The worker reports what
    became of them (`engine.report`).
    """

    least_canvases = 1
    """Canvases that a denoising request has rows for at least."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        end_with_parent()
        self.settings = settings_of(self.vllm_config)
        self.block_length = self.settings.block_length
        self.is_causal = self.settings.is_block_causal
        self._stored: dict[str, int] = {}  # of running requests of a block-causal model: positions with K/V
        self.pages = DllmPages.take_over(self.kv_cache_manager, self._paged_end)
        self._spiffy = spiffy_of(self.vllm_config)
        self._level = check_level()
        self._check = StateCheck(self) if self._level else None
        stats_way.check_way()
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
        if self._check and (self._level == CheckLevel.STEP or not output.total_num_scheduled_tokens):
            output.aux_output_connector_metadata = self._check.roster(self.running)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Take the step's report, then go on as vLLM does; an emitted block tells what its request took so far."""
        updated_at_s = time.perf_counter()
        reports = self._reports_of(scheduler_output, take_report(model_runner_output))
        if self._check:
            self._account(self._check, scheduler_output, model_runner_output, reports)
        if reports:
            self._take_reports(scheduler_output, reports, updated_at_s)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.request_id in self._totals:  # else it finished, see _free_request
                    output.kv_transfer_params = self._as_output(self._totals[output.request_id])
        self._updated_at_s = updated_at_s if self.running else None
        self._host_ms = None
        if self._check:
            self._compare(self._check)
        return outputs

    def _reports_of(self, output: SchedulerOutput, report: StepReport | None) -> dict[str, RequestReport]:
        """Return the reports of the requests that took a denoising step."""
        if report is None:
            if output.scheduled_spec_decode_tokens:
                raise UnsupportedVllmError(
                    "A step came back without its report: the installed vLLM's runner does not ask its connector for "
                    "auxiliary outputs for one; install vLLM 0.32 or 0.33"
                )
            return {}
        if report.costs is not None and self.rule is not None:
            self.rule.curve = report.costs
        return {req_id: report.requests[req_id] for req_id in output.scheduled_spec_decode_tokens}

    def _account(
        self,
        check: StateCheck,
        output: SchedulerOutput,
        model_output: ModelRunnerOutput,
        reports: dict[str, RequestReport],
    ) -> None:
        """Enter a step into the accounts of its requests."""
        for new in output.scheduled_new_reqs:
            if new.req_id in self.requests:
                check.admit(new.req_id, new.num_computed_tokens)
        for req_id, report in reports.items():
            if req_id in self.requests:  # it may have been aborted meanwhile
                emitted = model_output.sampled_token_ids[model_output.req_id_to_index[req_id]]
                check.take(self.requests[req_id], report, len(emitted))

    def _compare(self, check: StateCheck) -> None:
        """Compare the accounts with what the scheduler knows behind a step, as far as the level of checks asks."""
        if self._level == CheckLevel.STEP:
            check.compare_totals(self._totals)
            check.compare_pages(self.running)
        if self.requests:
            return
        of_pages = self.pages.coordinator.single_type_managers[0].req_to_blocks
        check.compare_idle({"the counts": self._totals, "the stored positions": self._stored, "the pages": of_pages})

    def row_end(self, request: Request) -> int:
        """Return the end of a bidirectional request's row."""
        return row_blocks(request.num_prompt_tokens, request.max_tokens, self.settings, self.max_model_len).end

    @property
    def page_size(self) -> int:
        """Positions per page."""
        size: int = self.pages.coordinator.single_type_managers[0].block_size
        return size

    def pages_of(self, request_id: str) -> Sequence[KVCacheBlock]:
        """Return a request's pages."""
        pages: Sequence[KVCacheBlock] = self.pages.coordinator.get_blocks(request_id)[0]
        return pages

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
            stats_way.put(self._stats, spec_decoding_stats)
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

    def _take_reports(self, output: SchedulerOutput, reports: dict[str, RequestReport], updated_at_s: float) -> None:
        """Add up what the step did and tell the rule.

        A step's time counts only if it did nothing but denoise: no refresh or prefill, nobody new, resumed or
        preempted.
        """
        drafting = {req_id: report for req_id, report in reports.items() if not report.commits}
        num_rows = len(output.scheduled_spec_decode_tokens[next(iter(drafting))]) if drafting else self.block_length
        budget = min(num_rows // self.block_length - 1, self.max_budget)
        self._stats = stats = StepStats.of_step(budget, list(reports.values()))
        for req_id, report in reports.items():
            if req_id in self.requests:  # it may have been aborted meanwhile
                self._totals[req_id].add(report)
        has_prefill = self.is_causal and not reports.keys() <= self._stored.keys()
        if self.is_causal:
            self._cache_stored(reports)
        forwards = sum(report.forwards for report in drafting.values())
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

    def _cache_stored(self, reports: dict[str, RequestReport]) -> None:
        """Offer the pages whose positions are all stored to other requests, before a finished one gives them back."""
        for req_id, report in reports.items():
            request = self.requests.get(req_id)
            if request is None or request.num_stale_output_tokens:  # it was aborted or preempted: the pages are gone
                continue
            self._stored[req_id] = report.stored
            # A block that a look-ahead stored is cached a step later: its tokens are not the request's yet.
            self.pages.cache_stored(request, min(report.stored, request.num_tokens))

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
        if self._check:
            self._check.free(request.request_id)
        totals = self._totals.pop(request.request_id, None)
        if totals is not None:
            kv_transfer_params = self._as_output(totals)
        return kv_transfer_params, ec_transfer_params

    def _as_output(self, totals: RequestTotals) -> dict[str, Any]:
        return totals.as_output(self._spiffy.exactness if self._spiffy else None)

    def _paged_end(self, request: Request) -> int:
        """Return up to where a request has pages: to the end of its row, or of its block in a block-causal model."""
        if not self.is_causal:
            return self.row_end(request)
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
