"""What our scheduler adds to vLLM's: rows of a budget, pages of a row, reports; vLLM's own part is a stand-in."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.metrics.stats import SchedulerStats

from tests.engine.scheduler_rig import MAX_NODES, B, allocated, make, observed, request, row, stand_in, step
from vllm_dllm.engine import stats_way


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return stand_in(monkeypatch)


@pytest.mark.parametrize(
    ("budget", "requests", "waiting", "canvases"),
    [
        (2, [request()], 0, 3),
        (0, [request()], 0, 1),
        (3, [request(), request("b", 20)], 0, 3),  # 12 positions are left to b
        (3, [request(), request("b", 28)], 0, 1),
        (3, [request()] * 4, 0, 4),
        (3, [request()] * 6, 0, 2),  # 64 tokens, 10 for each
        (3, [request()] * 4, 1, 2),  # of them 32 for a prompt
        (3, [request()] * 16, 1, 1),  # vLLM's own business: the configuration leaves room for whole blocks
        (3, [request(), request("b", canvases=2)], 0, 2),  # b was trimmed for a step that then left it out
    ],
)
def test_requests_have_the_rows_of_one_budget(budget: int, requests: list[Any], waiting: int, canvases: int) -> None:
    scheduler = make(budget, [SimpleNamespace(**vars(each)) for each in requests])
    scheduler.waiting = [None] * waiting
    assert [len(rows) for rows in scheduler.schedule()] == [B * canvases] * len(requests)


def test_a_request_at_its_prompt_is_left_alone() -> None:
    scheduler = make(1, [request(), request("b", canvases=0)])
    assert [len(rows) for rows in scheduler.schedule()] == [2 * B, 0]


def test_without_speculation_nothing_is_trimmed() -> None:
    scheduler = make(running=[request(canvases=1)], spiffy=False)
    assert [len(rows) for rows in scheduler.schedule()] == [B]


def test_reports_are_taken_from_vllm(stock: SimpleNamespace) -> None:
    stock.left = "unseen"
    step(make(running=[request()]), {"a": row()})
    assert stock.left is None


def test_an_emitted_block_tells_what_its_request_took(stock: SimpleNamespace) -> None:
    scheduler = make(running=[request(), request("b")])
    assert step(scheduler, {"a": row(refreshes=1, accepted=2), "b": row()}) == []
    stock.emits, stock.finishes = ["b"], ["a"]
    emitted, finished = step(scheduler, {"a": row(accepted=1), "b": row()})
    assert emitted.kv_transfer_params["dllm"] == {
        "exactness": "exact",
        "nfe": 2,
        "nfe_refresh": 0,
        "proposed": 6,
        "accepted": 0,
    }
    assert finished.kv_transfer_params["dllm"] == {
        "exactness": "exact",
        "nfe": 3,
        "nfe_refresh": 1,
        "proposed": 6,
        "accepted": 3,
    }
    assert scheduler._totals.keys() == {"b"}


def test_without_speculation_no_exactness_is_claimed(stock: SimpleNamespace) -> None:
    scheduler = make(running=[request()], spiffy=False)
    stock.finishes = ["a"]
    (finished,) = step(scheduler, {"a": row(refreshes=1, proposed=0)})
    assert finished.kv_transfer_params["dllm"] == {
        "exactness": None,
        "nfe": 2,
        "nfe_refresh": 1,
        "proposed": 0,
        "accepted": 0,
    }


def test_an_aborted_request_leaves_nothing() -> None:
    scheduler = make(running=[request()])
    step(scheduler, {"a": row()})
    scheduler._free_request(scheduler.requests["a"])
    step(scheduler, {"a": row()})
    assert not scheduler._totals


def test_the_rule_learns_acceptance_step_time_and_what_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(None, [request(), request("b")])
    seen = observed(monkeypatch, scheduler)
    for _ in range(2):
        step(scheduler, {"a": row(accepted=2), "b": row(accepted=1)})
    # The clock ticks once per question: a step ends one tick after it was scheduled, the next is scheduled one later.
    assert seen[0] == (2, MAX_NODES, 1.5, pytest.approx(1.0), None, 0)
    assert seen[1] == (2, MAX_NODES, 1.5, pytest.approx(1.0), pytest.approx(1.0), 0)


def test_an_idle_engine_is_not_measured(monkeypatch: pytest.MonkeyPatch, stock: SimpleNamespace) -> None:
    scheduler = make(None, [request()])
    seen = observed(monkeypatch, scheduler)
    stock.finishes = ["a"]
    step(scheduler, {"a": row()})
    stock.finishes = []
    scheduler.running = [request("b")]
    step(scheduler, {"b": row()})
    assert seen[1][4] is None


@pytest.mark.parametrize(
    ("report", "extra"),
    [
        (row(refreshes=1), {}),
        (row(), {"scheduled_new_reqs": ["c"]}),
        (row(), {"scheduled_cached_reqs": SimpleNamespace(resumed_req_ids={"c"})}),
        (row(), {"preempted_req_ids": {"c"}}),
    ],
)
def test_a_step_that_did_more_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, report: list[int], extra: dict[str, Any]
) -> None:
    scheduler = make(None, [request()])
    seen = observed(monkeypatch, scheduler)
    step(scheduler, {"a": report}, **extra)
    assert seen == [(1, MAX_NODES, 0.0, None, None, 0)]


def test_statistics_keep_vllm_s_sums_and_carry_our_step() -> None:
    scheduler = make(running=[request()])
    step(scheduler, {"a": row(accepted=1)})
    spec = None
    for accepted in (0, B):
        spec = scheduler.make_spec_decoding_stats(
            spec, num_draft_tokens=16, num_accepted_tokens=accepted, num_invalid_spec_tokens=None, request_id="a"
        )
    stats = scheduler.make_stats(spec)
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (
        2,
        2 * B,
        B,
    )  # canvas positions: no drafts
    decoded = stats_way.take(SchedulerStats(spec_decoding_stats=stats))
    assert decoded is not None
    assert (decoded.budgets, decoded.forwards, decoded.total_accepted) == ({MAX_NODES: 1}, 1, 1)
    assert scheduler.make_stats(None) is None


def test_without_statistics_none_are_made() -> None:
    scheduler = make()
    scheduler.log_stats = False
    assert scheduler.make_spec_decoding_stats(None, 16, 0, None, "a") is None


@pytest.mark.parametrize(("num_computed_tokens", "num_new_tokens"), [(0, 8), (8, B), (8, 4 * B), (12, 4 * B)])
def test_pages_are_those_of_the_row_whatever_is_drafted(num_computed_tokens: int, num_new_tokens: int) -> None:
    assert allocated(make(), request("a", num_computed_tokens), num_new_tokens) == 16
