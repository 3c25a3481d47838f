"""What a step's report has of canvases arrives as it was, and is shown to whom it is for."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from vllm_dllm.engine.canvas_stream import show_canvases
from vllm_dllm.engine.report import RequestReport
from vllm_dllm.engine.telemetry import RequestTotals
from vllm_dllm.state.records import LogprobRecords
from vllm_dllm.state.report import REPORT_LEN, Column, with_canvases

CANVAS = torch.tensor([[7, -1, 8, 9]])
LOG_PROBS = torch.tensor([[-0.25, -5.0, torch.nan, -torch.inf]])


def arrived(num_pages: int | None = None) -> RequestReport:
    """The report of a request whose step did what `CANVAS` says, behind it its pages where there are any."""
    counts = torch.arange(REPORT_LEN, dtype=torch.int32)[None]
    row = with_canvases(counts, CANVAS, LOG_PROBS)[0].tolist()
    return RequestReport.of_row(row if num_pages is None else [*row, num_pages, *range(num_pages), 0, 0], 4)


def test_canvases_and_log_probabilities_arrive_behind_the_counts() -> None:
    for num_pages in (None, 2):
        report = arrived(num_pages)
        assert all(getattr(report, column.name.lower()) == column for column in Column if column < Column.PROPOSED)
        assert report.proposed[0] == Column.PROPOSED
        assert report.canvas == [7, -1, 8, 9]
        assert np.array_equal(report.logprobs, LOG_PROBS[0].tolist(), equal_nan=True)
        assert report.pages == (None if num_pages is None else [0, 1])
    assert RequestReport.of_row(list(range(REPORT_LEN))).logprobs == []


def shown(logprobs: int | None, num_prompt: int = 0, max_tokens: int = 9) -> dict[str, Any]:
    """What the output of a request has of that canvas."""
    params = SimpleNamespace(extra_args={"dllm_stream": "denoising"}, logprobs=logprobs)
    request = SimpleNamespace(
        sampling_params=params, num_tokens=num_prompt, num_output_tokens=0, max_tokens=max_tokens, client_index=0
    )
    request.take_prefill_stats, request.take_events = lambda: None, lambda: None
    totals, kv = {"a": RequestTotals(forwards=2)}, SimpleNamespace(block_start=lambda known: known // 4 * 4)
    show_canvases({}, {"a": arrived()}, {"a": request}, totals, kv)  # type: ignore[arg-type, dict-item]
    return totals["a"].as_output("exact")["dllm"]


def test_who_asks_for_log_probabilities_sees_them_in_the_canvas() -> None:
    assert shown(None).keys().isdisjoint({"canvas_logprobs"})
    assert shown(0)["canvas_logprobs"] == [-0.25, None, None, -9999.0]
    assert shown(0)["canvas"] == [7, None, 8, 9]
    behind_a_prompt = shown(2, num_prompt=2, max_tokens=1)
    assert (behind_a_prompt["canvas"], behind_a_prompt["canvas_logprobs"]) == ([8], [None])


def test_nothing_is_kept_where_nobody_asked() -> None:
    kept = LogprobRecords(2, 3, torch.device("cpu")).kept(torch.tensor([1, 0]))
    assert kept.shape == (2, 3)
    assert all(map(math.isnan, kept.flatten().tolist()))
