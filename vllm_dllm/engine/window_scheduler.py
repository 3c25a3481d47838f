"""Scheduling of self-speculation: each running request has a window, which it drafts and verifies in turn."""

from typing import Any

import numpy as np
from vllm.v1.request import Request

from vllm_dllm.engine.rows import leave_out
from vllm_dllm.engine.scheduler import DllmScheduler
from vllm_dllm.engine.telemetry import RequestTotals
from vllm_dllm.state.windows import WindowSchedule


class WindowScheduler(DllmScheduler):
    """Schedules windows (`state.windows`).

    What vLLM counts of a running request is its window, in both steps. One that is drafted emits nothing, one that is
    verified what was accepted and one token more, so that vLLM's count is that of an autoregressive model.
    """

    @property
    def windows(self) -> WindowSchedule:
        """What is known of the requests' windows."""
        assert isinstance(self.rows.kv, WindowSchedule), "made by the same settings"
        return self.rows.kv

    def _counted(self, num_draft_tokens: int, num_accepted_tokens: int) -> tuple[int, int]:
        """Count as vLLM does for diffusion models, whose commits of what was denoised are steps, too."""
        return 1, num_draft_tokens

    def _choose_rows(self) -> None:
        """Give running requests the rows of their windows, oldest first."""
        self.rows.begin_step()
        running = self._denoising()
        num_known = np.array([request.num_tokens for request in running], dtype=np.int64)
        seq_len = np.array([self.rows.row_end(request) for request in running], dtype=np.int64)
        lengths = self.windows.lengths([request.request_id for request in running], num_known, seq_len)
        for request, length in zip(running, lengths.tolist(), strict=True):
            request.spec_token_ids = self._placeholders[:length]
            if not self.rows.give(request, length):
                leave_out(request, self.current_step)
                self._num_held += 1

    def _as_output(self, totals: RequestTotals) -> dict[str, Any]:
        return totals.as_output("exact")

    def _paged_end(self, request: Request) -> int:
        """Return up to where a request has pages: to the end of the longest window that it may have."""
        return min(request.num_tokens - 1 + self.block_length, self.rows.row_end(request))
