"""vLLM's scheduler with what block diffusion asks of it: rows of a step, pages, budgets of drafts, reports of steps."""

import time
from collections import defaultdict
from itertools import compress
from typing import Any

import numpy as np
from vllm.config.compilation import CUDAGraphMode
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_dllm.draft.acceptance import RequestAcceptance
from vllm_dllm.draft.budget import BudgetRule
from vllm_dllm.engine import stats_way
from vllm_dllm.engine.canvas_stream import show_canvases, watched
from vllm_dllm.engine.configs import exactness_of, make_drafter, served_family, settings_of, spiffy_of
from vllm_dllm.engine.failed import end_failed
from vllm_dllm.engine.kv_memory import fit_max_model_len
from vllm_dllm.engine.pages import DllmPages
from vllm_dllm.engine.parent import end_with_parent
from vllm_dllm.engine.report import RequestReport, StepOrder, take_report
from vllm_dllm.engine.rows import StepRows, leave_out, most_drafts
from vllm_dllm.engine.state_check import StateCheck
from vllm_dllm.engine.telemetry import RequestTotals, StepStats
from vllm_dllm.engine.worker_check import CheckLevel, check_level
from vllm_dllm.errors import INSTALL_SUPPORTED, UnsupportedVllmError
from vllm_dllm.state.kv import KvStep


class DllmScheduler(Scheduler):
    """Gives requests the pages that their K/V need, each step its rows, and each request its drafts.

    A bidirectional model stores K/V for the masked positions of its whole sequence, so a request takes all its pages
    when it is admitted; with a horizon, and of a block-causal model, which stores finished blocks alone, it takes pages
    as its blocks begin. The latter's are cached for others once all their positions are stored, as the worker reports.

    What vLLM counts is tokens of a request, by position: its prompt and its block in the step that admits it, then its
    block, and one more for each draft, which is how the worker learns their number. What a forward has is rows
    (`engine.plan`): of refreshes, prefills, commits and drafts too. They are what `max_num_batched_tokens` bounds here,
    and what vLLM is told as the step's total. The worker reports what became of a step (`engine.report`).
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        fit_max_model_len(vllm_config, kv_cache_config.num_blocks)
        super().__init__(vllm_config, kv_cache_config, *args, **kwargs)
        end_with_parent()
        self.settings = settings_of(self.vllm_config)
        self.block_length = self.settings.block_length
        self.is_causal = self.settings.is_block_causal
        family = served_family(self.vllm_config.model_config)
        self.rows = StepRows(self.settings, self.max_model_len, self.max_num_scheduled_tokens, **family.kv_facts)
        self._placeholders = [-1] * self.num_spec_tokens
        self._num_held = 0  # requests, since the last report
        compilation = self.vllm_config.compilation_config
        has_graphs = compilation.cudagraph_mode != CUDAGraphMode.NONE
        self._largest_graph = (compilation.max_cudagraph_capture_size or 0) if has_graphs else 0
        self.pages = DllmPages.take_over(self.kv_cache_manager, self._paged_end, self._admits)
        self._exactness = exactness_of(self.vllm_config)
        self._level = check_level()
        self._check = StateCheck(self.rows, self.pages) if self._level else None
        stats_way.check_way()
        drafter, spiffy = make_drafter(self.vllm_config), spiffy_of(self.vllm_config)
        self.rule = BudgetRule(drafter.prior(), self.block_length, spiffy.budget) if drafter and spiffy else None
        self.acceptance = RequestAcceptance()
        self._totals: defaultdict[str, RequestTotals] = defaultdict(RequestTotals)
        self._stats: StepStats | None = None
        self._scheduled_at_s = 0.0
        self._updated_at_s: float | None = None  # None: the engine had no work then
        self._host_ms: float | None = None

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
        reports = self._reports_of(scheduler_output, model_runner_output)
        if self._check:
            self._check.account(self.requests, reports, model_runner_output)
        if reports:
            self._take_reports(scheduler_output, reports, updated_at_s)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        end_failed(self, outputs, reports)
        if scheduler_output.aux_output_connector_metadata.shows_canvas:
            show_canvases(outputs, reports, self.requests, self._totals, self.rows.kv)
        for of_client in outputs.values():
            for output in of_client.outputs:
                if output.request_id in self._totals:  # else it finished, see _free_request
                    output.kv_transfer_params = self._totals[output.request_id].as_output(self._exactness)
        self._updated_at_s = updated_at_s if self.running else None
        self._host_ms = None
        if self._check:
            self._compare(self._check)
        return outputs

    def _reports_of(self, output: SchedulerOutput, model_output: ModelRunnerOutput) -> dict[str, RequestReport]:
        """Take the reports of the requests that took a denoising step."""
        report = take_report(model_output, self.block_length * output.aux_output_connector_metadata.shows_canvas)
        if report is None:
            if output.scheduled_spec_decode_tokens:
                raise UnsupportedVllmError(
                    "A step came back without its report: the installed vLLM's runner does not ask its connector for "
                    f"auxiliary outputs for one; {INSTALL_SUPPORTED}"
                )
            return {}
        if report.costs is not None and self.rule is not None:
            self.rule.curve = report.costs
        return {req_id: report.requests[req_id] for req_id in output.scheduled_spec_decode_tokens}

    def _compare(self, check: StateCheck) -> None:
        """Compare the accounts with what the scheduler knows behind a step, as far as the level of checks asks."""
        if self._level == CheckLevel.STEP:
            check.compare_totals(self._totals)
            check.compare_pages(self.running)
        if self.requests:
            return
        rows = self.rows.known | self.acceptance.known
        check.compare_idle({"the counts": self._totals, "the rows": rows, "the pages": self.pages.owners})

    def make_spec_decoding_stats(
        self, spec_decoding_stats: SpecDecodingStats | None, num_draft_tokens: int, num_accepted_tokens: int, **_: Any
    ) -> SpecDecodingStats | None:
        """Count as vLLM does, but not by draft position, which says nothing here."""
        if not self.log_stats:
            return None
        stats = spec_decoding_stats or SpecDecodingStats(self.num_spec_tokens)
        num_steps, num_positions = self._counted(num_draft_tokens, num_accepted_tokens)
        stats.num_drafts += num_steps
        stats.num_draft_tokens += num_positions
        stats.num_accepted_tokens += num_accepted_tokens
        return stats

    def _counted(self, num_draft_tokens: int, num_accepted_tokens: int) -> tuple[int, int]:
        """Return what a step counts as: steps, and canvas positions, which are those of the root, not of drafts.

        vLLM's diffusion models commit a canvas in a step of its own, and `vllm bench serve` takes it off; so one that
        is emitted counts as a step more.
        """
        num_steps = 1 + bool(num_accepted_tokens)
        return num_steps, num_steps * self.block_length

    def make_stats(
        self, spec_decoding_stats: SpecDecodingStats | None = None, *args: Any, **kwargs: Any
    ) -> SchedulerStats | None:
        """Make vLLM's statistics; those of a step with a report carry ours."""
        if self._stats is not None and spec_decoding_stats is not None:
            stats_way.put(self._stats, spec_decoding_stats)
        self._stats = None
        return super().make_stats(spec_decoding_stats, *args, **kwargs)

    def _choose_rows(self) -> None:
        """Give running requests their rows, blocks before refreshes of any length, both oldest first.

        Those for whose refresh there are not enough wait for the next step. What is then left, but for the longest
        prompt if any waits, is for drafts.
        """
        self.rows.begin_step()
        denoising = self._denoising()
        needed = zip(denoising, *self._needed_rows(denoising), strict=True)
        longest = self.block_length * (1 + self.is_causal)  # with its commit; beside all blocks any refresh has room
        drafting: list[tuple[Request, int]] = []  # with the rows of a canvas
        num_begins = num_others = 0
        for request, num_rows, is_undrafted, num_span_rows in sorted(needed, key=lambda each: each[1] > longest):
            request.spec_token_ids = self._placeholders[: self.block_length]
            if not self.rows.give(request, num_rows):
                leave_out(request, self.current_step)
                self._num_held += 1
            elif is_undrafted:
                num_begins += self.is_causal and num_rows > self.block_length
                num_others += self.is_causal and num_rows == self.block_length
            elif most_drafts(request):
                drafting.append((request, num_span_rows))
            else:
                num_others += 1
        worth, budget = self._choose_budget(drafting, num_others, num_begins)
        for request, num_span_rows in worth:
            most = self.rows.drafts_within(request, min(budget, most_drafts(request)))
            if most > 0 and self.rows.give(request, self._canvases_of_drafts(most) * num_span_rows):
                request.spec_token_ids = self._placeholders[: self.block_length + most]

    def _choose_budget(
        self, drafting: list[tuple[Request, int]], num_others: int, num_begins: int = 0
    ) -> tuple[list[tuple[Request, int]], int]:
        """Return whose drafts are worth their rows, and how many the step evaluates for each of them.

        Args:
            drafting: who may have drafts, with the rows of a canvas.
            num_others: requests besides, of one canvas each.
            num_begins: others, of two.
        """
        if self.rule is None or not drafting:
            return [], 0
        pays = self.acceptance.pay([request.request_id for request, _ in drafting], self.rule.break_even)
        worth = list(compress(drafting, pays))
        num_rows = sum(canvas_rows for _, canvas_rows in worth)
        limit = max(0, self.rows.for_drafts(is_waiting=bool(self.waiting)) // num_rows)
        num_without = num_others + len(drafting) - len(worth)
        return worth, self.rule.choose(len(worth), limit, num_begins, num_without, num_rows)

    def _denoising(self) -> list[Request]:
        """Return the running requests that take a denoising step."""
        return [request for request in self.running if request.spec_token_ids]

    def _needed_rows(self, requests: list[Request]) -> tuple[list[int], list[bool], list[int]]:
        """Return what `StepRows.needed` does."""
        return self.rows.needed(requests)

    def _canvases_of_drafts(self, num_drafts: int) -> int:
        """Return how many canvases a request needs rows for besides those."""
        return num_drafts

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Say what the step's forward really has, before vLLM counts it.

        A request's prompt is computed in its first denoising step, so it has its block from the start.
        """
        scheduled = scheduler_output.num_scheduled_tokens
        for admitted in scheduler_output.scheduled_new_reqs:
            block = self._placeholders[: self.rows.num_first(self.requests[admitted.req_id])]
            scheduler_output.scheduled_spec_decode_tokens[admitted.req_id] = block
            scheduled[admitted.req_id] += len(block)
            self.rows.admit(self.requests[admitted.req_id], admitted.num_computed_tokens)
            if self._check:
                self._check.admit(admitted.req_id, admitted.num_computed_tokens)
        kv, is_long = self._decide_kv(scheduler_output)
        # No captured graph has the shape of a refresh, a prefill or a short block: the step counts as larger than all.
        total = self.rows.total(scheduled, self._largest_graph + 1 if is_long else 0)
        scheduler_output.total_num_scheduled_tokens = total
        has_roster = self._check and (self._level == CheckLevel.STEP or not total)
        roster = frozenset(request.request_id for request in self.running) if has_roster else None
        shown, rows, ended = watched(self.running), self.rows.given_to(scheduled), scheduler_output.finished_req_ids
        order = StepOrder(tuple(scheduled), kv, is_long, roster, num_rows=rows, shows_canvas=shown, ended=ended)
        scheduler_output.aux_output_connector_metadata = order
        super()._update_after_schedule(scheduler_output)

    def _decide_kv(self, output: SchedulerOutput) -> tuple[KvStep | None, bool]:
        """Decide what a step stores, and tell whether it may refresh, prefill or have a short block."""
        kv = self.rows.step([self.requests[req_id] for req_id in output.num_scheduled_tokens])
        return kv, bool(kv.is_long.any())

    def _take_reports(self, output: SchedulerOutput, reports: dict[str, RequestReport], updated_at_s: float) -> None:
        """Add up what the step did and tell the rule.

        A step's time counts only if it did nothing but denoise: no refresh, prefill or short block, nobody new, resumed
        or preempted.
        """
        num_drafts, order = self._num_drafts(output, reports), output.aux_output_connector_metadata
        budget = max(num_drafts.values())
        self._stats = StepStats.of_step(budget, self._num_held, order.num_rows, list(reports.values()))
        self._num_held = 0
        for req_id in reports.keys() & self.requests.keys():  # others were aborted meanwhile
            self._totals[req_id].add(reports[req_id])
        self._note_stored(reports)
        if self.rule is None:
            return
        for req_id in reports.keys() & self.requests.keys():
            own = self.rule.expected(num_drafts[req_id])
            self.acceptance.observe(req_id, reports[req_id].accepted, own, self.rule.break_even)
        in_block = {req_id: report for req_id, report in reports.items() if not report.commits}
        drafting = [report for req_id, report in in_block.items() if num_drafts[req_id] == budget]
        forwards = sum(report.forwards for report in drafting)
        if forwards == 0:
            return
        is_pure = not (
            order.is_long
            or {*num_drafts.values()} - {0, budget}
            or output.scheduled_new_reqs
            or output.scheduled_cached_reqs.resumed_req_ids
            or output.preempted_req_ids
        )
        ms, host_ms = self._step_ms(updated_at_s) if is_pure else (None, None)
        num_begins = 0 if self.rows.kv.stores_alone else len(reports) - len(in_block)  # of two canvases
        num_without = len(reports) - num_begins - len(drafting)
        accepted = sum(report.accepted for report in drafting) / forwards
        self.rule.observe(len(drafting), budget, accepted, ms, host_ms, num_begins, num_without)

    def _num_drafts(self, output: SchedulerOutput, reports: dict[str, RequestReport]) -> dict[str, int]:
        """Return how many drafts the requests of a step had."""
        counted, undrafted = output.scheduled_spec_decode_tokens, self._undrafted(reports)
        return {name: max(0, len(counted[name]) - self.block_length) * (name not in undrafted) for name in reports}

    def _undrafted(self, reports: dict[str, RequestReport]) -> set[str]:
        """Return those of reported requests whose step had no drafts, whatever it was given: blocks begin with it."""
        return {req_id for req_id, report in reports.items() if report.commits}

    def _step_ms(self, updated_at_s: float) -> tuple[float | None, float | None]:
        """Return what the step took, and what passed between the step before and this one; None if unknown."""
        return (updated_at_s - self._scheduled_at_s) * 1e3, self._host_ms

    def _note_stored(self, reports: dict[str, RequestReport]) -> None:
        """Take note of the decided steps; offer a block-causal model's pages that are stored to other requests.

        That is before a finished one gives them back.
        """
        for req_id, report in reports.items():
            request = self.requests.get(req_id)
            if request is None or request.num_stale_output_tokens or report.failed:
                continue  # it was aborted or preempted: the pages are gone; or what is in them may be at fault
            self.rows.kv.note(req_id, report.stored)
            if self.is_causal:
                # A block that a look-ahead stored is cached a step later: its tokens are not the request's yet.
                self.pages.cache_stored(request, min(report.stored, request.num_tokens))

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """Preempt a request; when it comes back, all that it knows is its prompt."""
        self.rows.forget(request)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """Free a request; its last output says what it took."""
        kv_transfer_params, ec_transfer_params = super()._free_request(request, *args, **kwargs)
        self.rows.forget(request)
        self.acceptance.forget(request.request_id)
        if self._check:
            self._check.free(request.request_id)
        totals = self._totals.pop(request.request_id, None)
        if totals is not None:
            kv_transfer_params = totals.as_output(self._exactness)
        return kv_transfer_params, ec_transfer_params

    def _admits(self, request: Request, num_hit: int) -> bool:
        """Tell whether a request may take the step: a running one has its rows, a new one needs those of its first."""
        if request.request_id in self.rows.given:
            return True
        num_rows = self.rows.first(request, request.num_computed_tokens + num_hit)
        is_admitted = self.rows.give(request, num_rows)
        self._num_held += not is_admitted
        return is_admitted

    def _paged_end(self, request: Request) -> int:
        """Return up to where a request has pages: of its sequence, or of its block in a block-causal model."""
        if not self.is_causal:
            return self.rows.seq_end(request)
        return int(self.rows.kv.block_start(np.array(request.num_tokens))) + self.block_length
