"""Scheduling of windows: each running request has one, which it drafts and verifies in turn, or which slides."""

from dataclasses import replace
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_dllm.engine.report import RequestReport
from vllm_dllm.engine.rows import leave_out
from vllm_dllm.engine.scheduler import DllmScheduler
from vllm_dllm.engine.telemetry import RequestTotals
from vllm_dllm.state.sliding import SlidingSchedule
from vllm_dllm.state.windows import WindowSchedule


class WindowScheduler(DllmScheduler):
    """Schedules windows of self-speculation (`state.windows`).

    What vLLM counts of a running request is its window, in both steps. One that is drafted emits nothing, one that is
    verified what was accepted and one token more, so that vLLM's count is that of an autoregressive model.
    """

    @property
    def windows(self) -> WindowSchedule | SlidingSchedule:
        """What is known of the requests' windows."""
        assert isinstance(self.rows.kv, WindowSchedule | SlidingSchedule), "made by the same settings"
        return self.rows.kv

    def _counted(self, num_draft_tokens: int, num_accepted_tokens: int) -> tuple[int, int]:
        """Count as vLLM does for diffusion models, whose commits of what was denoised are steps, too."""
        return 1, num_draft_tokens

    def _choose_rows(self) -> None:
        """Give running requests the rows of their windows and of what they have to store, oldest first."""
        self.rows.begin_step()
        running = self._denoising()
        names = [request.request_id for request in running]
        num_known = np.array([request.num_tokens for request in running], dtype=np.int64)
        seq_len = np.array([self.rows.row_end(request) for request in running], dtype=np.int64)
        lengths = self.windows.lengths(names, num_known, seq_len)
        num_rows = lengths + self.windows.num_unstored(names, num_known)
        for request, length, needed in zip(running, lengths.tolist(), num_rows.tolist(), strict=True):
            request.spec_token_ids = self._placeholders[:length]
            if not self.rows.give(request, needed):
                leave_out(request, self.current_step)
                self._num_held += 1

    def _as_output(self, totals: RequestTotals) -> dict[str, Any]:
        return totals.as_output("exact")

    def _paged_end(self, request: Request) -> int:
        """Return up to where a request has pages: to the end of the longest window that it may have."""
        return min(request.num_tokens - 1 + self.block_length, self.rows.row_end(request))


class SlidingScheduler(WindowScheduler):
    """Schedules windows that slide (`state.sliding`).

    Reports bring the windows, so that a request that was preempted goes on with its own: another one would have other
    tokens.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._canvases: dict[str, list[int]] = {}  # of requests, behind their last step; -1 for masked

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Say what the step's forward really has, and what windows begin with."""
        super()._update_after_schedule(scheduler_output)
        admitted = [request.req_id for request in scheduler_output.scheduled_new_reqs]
        resumed = {req_id: self._canvases[req_id] for req_id in admitted if req_id in self._canvases}
        if self._check:
            for req_id, canvas in resumed.items():
                self._check.resume(req_id, sum(token >= 0 for token in canvas))
        order = scheduler_output.aux_output_connector_metadata
        order = replace(order, shows_canvas=True, canvases=resumed)
        scheduler_output.aux_output_connector_metadata = order

    def _note_stored(self, reports: dict[str, RequestReport]) -> None:
        super()._note_stored(reports)
        self._canvases.update({req_id: reports[req_id].canvas for req_id in reports.keys() & self.requests.keys()})

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._canvases.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _as_output(self, totals: RequestTotals) -> dict[str, Any]:
        return totals.as_output(None)

    def _paged_end(self, request: Request) -> int:
        """Return up to where a request has pages: windows are in flight alone."""
        return request.num_tokens
