"""Scheduling of windows: each running request has one, which it drafts and verifies in turn, or which slides."""

from dataclasses import replace
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from vllm_dllm.draft.windows import draft_fronts
from vllm_dllm.engine.report import RequestReport
from vllm_dllm.engine.rows import leave_out, most_drafts
from vllm_dllm.engine.scheduler import DllmScheduler
from vllm_dllm.state.kv import KvStep
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

    def _paged_end(self, request: Request) -> int:
        """Return up to where a request has pages: to the end of the longest window that it may have."""
        return min(request.num_tokens - 1 + self.block_length, self.rows.row_end(request))


class SlidingScheduler(WindowScheduler):
    """Schedules windows that slide (`state.sliding`), and their drafts (`draft.windows`).

    Reports bring the windows, so that a request that was preempted goes on with its own: another one would have other
    tokens. They say in which order drafts know the masked positions, too, and so what rows drafts need.

    What vLLM counts of a request with drafts is two windows, as many tokens as its step may emit.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._canvases: dict[str, list[int]] = {}  # of requests, behind their last step; negative for masked
        self._drafts: dict[str, tuple[int, ...]] = {}  # rows of each draft of the requests of the next step
        self._offered: dict[str, int] = {}  # how many of the budget each of these may have

    def _choose_rows(self) -> None:
        """Give running requests the rows of their windows; what is left, but for the longest prompt, is for drafts."""
        super()._choose_rows()
        self._drafts, self._offered = {}, {}
        given = [request for request in self._denoising() if request.request_id in self.rows.given]
        drafting = [(request, len(request.spec_token_ids)) for request in given if self._may_draft(request)]
        worth, budget = self._choose_budget(drafting, len(given) - len(drafting))
        for request, _ in worth if budget else ():
            offered = min(budget, most_drafts(request))
            room = self.rows.for_drafts(is_waiting=bool(self.waiting))
            rows = self._rows_of_drafts(request)[:offered]
            while rows and sum(rows) > room:  # drafts have more rows than the window
                rows.pop()
                offered = len(rows)
            if rows and self.rows.give(request, sum(rows)):
                self._drafts[request.request_id], self._offered[request.request_id] = tuple(rows), offered
                request.spec_token_ids = self._placeholders[: min(2 * self.block_length, self._room(request))]

    def _counted(self, num_draft_tokens: int, num_accepted_tokens: int) -> tuple[int, int]:
        """Count a step with its root's window, also where it may emit two."""
        return 1, min(num_draft_tokens, self.block_length)

    def _may_draft(self, request: Request) -> bool:
        """Tell whether a request lets drafts be made, and a masked position of its window has a turn in them."""
        return most_drafts(request) > 0 and min(self._canvases.get(request.request_id, ()), default=0) < -1

    def _room(self, request: Request) -> int:
        return self.rows.row_end(request) - request.num_tokens

    def _rows_of_drafts(self, request: Request) -> list[int]:
        """Return the rows of each draft that means something: of what it knows at its front, and of its window."""
        room = self._room(request)
        fronts = draft_fronts(
            self._canvases[request.request_id], min(room, request.max_tokens - request.num_output_tokens)
        )
        return [min(front + self.block_length, room) for front in fronts]

    def _decide_kv(self, output: SchedulerOutput) -> tuple[KvStep | None, bool]:
        """Take a step for a long one where it begins a request; all others store what was emitted, and no more."""
        kv, _ = super()._decide_kv(output)
        return kv, kv is not None and bool(kv.is_new.any())

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        """Say what the step's forward really has, what windows begin with, and what drafts they have."""
        super()._update_after_schedule(scheduler_output)
        admitted = [request.req_id for request in scheduler_output.scheduled_new_reqs]
        resumed = {req_id: self._canvases[req_id] for req_id in admitted if req_id in self._canvases}
        if self._check:
            for req_id, canvas in resumed.items():
                self._check.resume(req_id, sum(token >= 0 for token in canvas))
        taking = scheduler_output.num_scheduled_tokens.keys() - set(admitted)
        drafts = {req_id: rows for req_id, rows in self._drafts.items() if req_id in taking}
        order = scheduler_output.aux_output_connector_metadata
        order = replace(order, shows_canvas=True, canvases=resumed, drafts=drafts)
        scheduler_output.aux_output_connector_metadata = order

    def _num_drafts(self, output: SchedulerOutput, reports: dict[str, RequestReport]) -> dict[str, int]:
        """Return how many drafts the requests of a step were offered, 0 of whom there was none to make."""
        return {req_id: self._offered.get(req_id, 0) for req_id in reports}

    def _note_stored(self, reports: dict[str, RequestReport]) -> None:
        super()._note_stored(reports)
        self._canvases.update({req_id: reports[req_id].canvas for req_id in reports.keys() & self.requests.keys()})

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._canvases.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def _paged_end(self, request: Request) -> int:
        """Return up to where a request has pages: windows are in flight alone."""
        return request.num_tokens
