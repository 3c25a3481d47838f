"""Scheduling a step while the step before runs."""

from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.spec_decode.metrics import SpecDecodingStats

from vllm_dllm.engine.configs import rules_of
from vllm_dllm.engine.report import RequestReport
from vllm_dllm.engine.rows import leave_out
from vllm_dllm.engine.run_ahead import RunAhead
from vllm_dllm.engine.scheduler import DllmScheduler
from vllm_dllm.engine.state_check import StateCheck
from vllm_dllm.state.kv import KvStep


class DllmAsyncScheduler(DllmScheduler, AsyncScheduler):
    """Schedules a step while the step before is under way.

    vLLM's counts take what is under way for accepted until it is known.
    """

    def _denoising(self) -> list[Request]:
        """Leave out of the step who may not run ahead, until it is known what the step under way came to."""
        denoising = super()._denoising()
        ahead = [request for request in denoising if self._may_run_ahead(request)]
        for request in denoising:
            if request not in ahead:
                leave_out(request, self.current_step)
        return ahead

    def _may_run_ahead(self, request: Request) -> bool:
        """Tell whether vLLM's count is not too near to `max_model_len`."""
        return request.num_computed_tokens <= self.max_model_len - self.block_length

    def _step_ms(self, updated_at_s: float) -> tuple[float | None, float | None]:
        """Return the time from one step's end to the next, in which the host does its part meanwhile."""
        return None if self._updated_at_s is None else (updated_at_s - self._updated_at_s) * 1e3, None


class CausalAsyncScheduler(DllmAsyncScheduler):
    """Of a block-causal model: the workers wait for the step under way, to know who begins a block.

    The scheduler does not, so all have room for a block to commit.
    """

    def _needed_rows(self, requests: list[Request]) -> tuple[list[int], list[bool], list[int]]:
        num_blocks = 1 if self.rows.kv.stores_alone else 2  # a block that is stored alone has no other beside it
        num_reqs = len(requests)
        return [num_blocks * self.block_length] * num_reqs, [False] * num_reqs, [self.block_length] * num_reqs

    def _decide_kv(self, output: SchedulerOutput) -> tuple[KvStep | None, bool]:
        """Leave it to the workers; only a new request may have a prefill, and only one near its end a short block."""
        is_short = any(self.rows.may_be_short(self.requests[req_id]) for req_id in output.num_scheduled_tokens)
        return None, bool(output.scheduled_new_reqs) or is_short

    def _canvases_of_drafts(self, num_drafts: int) -> int:
        return num_drafts if self.rows.kv.stores_alone else max(0, num_drafts - 1)

    def _undrafted(self, reports: dict[str, RequestReport]) -> set[str]:
        """Ask, before the reports are noted, what could have been asked before the step if it had been known."""
        known = self.rows.kv.known
        asked = [self.requests[req_id] for req_id in reports if req_id in self.requests and req_id in known]
        step = self.rows.step(asked)
        return {request.request_id for request, none in zip(asked, step.is_undrafted, strict=True) if none}

    def _paged_end(self, request: Request) -> int:
        """Add a block to what is known, if the step before may end one."""
        return super()._paged_end(request) + (self.block_length if request.num_output_placeholders else 0)


class BidirectionalAsyncScheduler(DllmAsyncScheduler):
    """Of a bidirectional model: who has hardly ended its block runs ahead, and nobody waits for the device.

    A step is decided here as ever, and takes the CUDA graph that it would take: a request is in it as one whose block
    goes on. Where it had ended after all, its part of the step is void.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.ahead = RunAhead(self.settings, rules_of(self.vllm_config), self.max_model_len)
        self._void: set[str] = set()  # who had a void part of the step that is reported

    def _may_run_ahead(self, request: Request) -> bool:
        return super()._may_run_ahead(request) and self.ahead.may_go_on(request)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Tell the workers, too, whether they must look for blocks that have ended."""
        requests = [self.requests[req_id] for req_id in scheduler_output.num_scheduled_tokens]
        may_be_void = any(self.ahead.is_ahead(request) for request in requests)
        super()._update_after_schedule(scheduler_output)
        order = scheduler_output.aux_output_connector_metadata
        scheduler_output.aux_output_connector_metadata = replace(order, may_be_void=may_be_void)

    def _decide_kv(self, output: SchedulerOutput) -> tuple[KvStep | None, bool]:
        """Decide by what the steps under way will have left: they are noted here, not when their reports come."""
        decided = super()._decide_kv(output)
        for req_id in output.num_scheduled_tokens:
            request = self.requests[req_id]
            self.rows.kv.note(req_id, request.num_tokens)
            self.ahead.scheduled(request, len(output.scheduled_spec_decode_tokens[req_id]) - self.block_length)
        return decided

    def _reports_of(self, output: SchedulerOutput, model_output: ModelRunnerOutput) -> dict[str, RequestReport]:
        """Leave out the void ones."""
        reports = super()._reports_of(output, model_output)
        counted = {req_id: each for req_id, each in reports.items() if self.ahead.reported(req_id, each)}
        self._void = reports.keys() - counted.keys()
        return counted

    def make_spec_decoding_stats(
        self, spec_decoding_stats: SpecDecodingStats | None, *args: Any, **kwargs: Any
    ) -> SpecDecodingStats | None:
        """Count no step that was void."""
        if kwargs["request_id"] in self._void:
            return spec_decoding_stats
        return super().make_spec_decoding_stats(spec_decoding_stats, *args, **kwargs)

    def _compare(self, check: StateCheck) -> None:
        super()._compare(check)
        if not self.requests:
            check.compare_idle({"the steps under way": self.ahead.known})

    def _note_stored(self, reports: dict[str, RequestReport]) -> None:
        """Do nothing: the steps are noted, and no pages are shared."""

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self.ahead.preempted(request.request_id)
        super()._preempt_request(request, *args, **kwargs)

    def _free_request(
        self, request: Request, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        self.ahead.freed(request.request_id)
        return super()._free_request(request, *args, **kwargs)
