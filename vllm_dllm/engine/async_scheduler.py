"""Scheduling a step of a block-causal model while the step before runs."""

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_dllm.engine.report import RequestReport
from vllm_dllm.engine.scheduler import DllmScheduler, leave_out
from vllm_dllm.state.kv import KvStep


class DllmAsyncScheduler(DllmScheduler, AsyncScheduler):
    """Schedules a step of a block-causal model while the step before is under way.

    It does not know which requests begin a block in the step, so all have room for a block to commit. vLLM's counts
    take what is under way for accepted until it is known.
    """

    def _denoising(self) -> list[Request]:
        """Leave a request out of the step where its count comes too near to `max_model_len`, until it is known."""
        denoising = super()._denoising()
        last = self.max_model_len - self.block_length
        for request in denoising:
            if request.num_computed_tokens > last:
                leave_out(request, self.current_step)
        return [request for request in denoising if request.num_computed_tokens <= last]

    def _needed_rows(self, requests: list[Request]) -> tuple[list[int], list[bool]]:
        num_blocks = 1 if self.rows.kv.stores_alone else 2  # a block that is stored alone has no other beside it
        return [num_blocks * self.block_length] * len(requests), [False] * len(requests)

    def _decide_kv(self, output: SchedulerOutput) -> tuple[KvStep | None, bool]:
        """Leave it to the workers; only a new request may have a prefill, and only one near its end a short block."""
        is_short = any(self.rows.may_be_short(self.requests[req_id]) for req_id in output.num_scheduled_tokens)
        return None, bool(output.scheduled_new_reqs) or is_short

    def _rows_of_drafts(self, num_drafts: int) -> int:
        return self.block_length * (num_drafts if self.rows.kv.stores_alone else max(0, num_drafts - 1))

    def _undrafted(self, reports: dict[str, RequestReport]) -> set[str]:
        """Ask, before the reports are noted, what could have been asked before the step if it had been known."""
        known = self.rows.kv.known
        asked = [self.requests[req_id] for req_id in reports if req_id in self.requests and req_id in known]
        step = self.rows.step(asked)
        return {request.request_id for request, none in zip(asked, step.is_undrafted, strict=True) if none}

    def _paged_end(self, request: Request) -> int:
        """Add a block to what is known, if the step before may end one."""
        return super()._paged_end(request) + (self.block_length if request.num_output_placeholders else 0)

    def _step_ms(self, updated_at_s: float) -> tuple[float | None, float | None]:
        """Return the time from one step's end to the next, in which the host does its part meanwhile."""
        return None if self._updated_at_s is None else (updated_at_s - self._updated_at_s) * 1e3, None
