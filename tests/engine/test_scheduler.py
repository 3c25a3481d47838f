"""What our scheduler adds to vLLM's: rows of a budget, pages of a row, reports; vLLM's own part is a stand-in."""

import itertools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_dllm.config import DllmConfig
from vllm_dllm.draft.budget import BudgetRule
from vllm_dllm.draft.graph import DraftGraph
from vllm_dllm.engine import scheduler as module
from vllm_dllm.engine.scheduler import DllmScheduler
from vllm_dllm.engine.telemetry import RequestTotals, StepStats
from vllm_dllm.state.counters import REPORT_LEN, Column

B = 4
MAX_NODES = 3
GRAPH = DraftGraph((((0, 0),), ((0, 0), (1, 0)), ((0, 0), (1, 0), (2, 0))), 1)


def request(name: str = "a", num_computed_tokens: int = 8, canvases: int = 1 + MAX_NODES) -> Any:
    return SimpleNamespace(
        request_id=name,
        num_computed_tokens=num_computed_tokens,
        num_prompt_tokens=8,
        max_tokens=8,
        spec_token_ids=[-1] * (B * canvases),
    )


def make(budget: int | None = MAX_NODES, running: list[Any] | None = None, spiffy: bool = True) -> DllmScheduler:
    """Make a scheduler of 64 tokens per step and a `max_model_len` of 32, without vLLM's part."""
    made = object.__new__(DllmScheduler)
    made.settings = DllmConfig(block_length=B)
    made.block_length, made.max_model_len, made.max_num_scheduled_tokens = B, 32, 64
    made.running, made.waiting = running or [], []
    made.requests = {each.request_id: each for each in made.running}
    made.log_stats, made.num_spec_tokens = True, B
    made._spiffy = SimpleNamespace(exactness="exact", max_nodes=MAX_NODES) if spiffy else None
    made.rule = BudgetRule(GRAPH, B, budget) if spiffy else None
    made._totals = defaultdict(RequestTotals)
    made._stats = made._updated_at_s = made._host_ms = None
    made._scheduled_at_s = 0.0
    return made


def row(refreshes: int = 0, accepted: int = 0, proposed: int = MAX_NODES) -> list[int]:
    numbers = [0] * REPORT_LEN
    numbers[: Column.FINISHED] = [1, refreshes, 1 + accepted, accepted]
    numbers[Column.PROPOSED] = proposed
    return numbers


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for vLLM's scheduler; requests named in `emits` and `finishes` have an output."""
    stock = SimpleNamespace(emits=[], finishes=[], reports=None, clock=itertools.count())

    def update(self: DllmScheduler, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        stock.reports = model_runner_output.num_nans_in_logits
        outputs = []
        for name in stock.emits + stock.finishes:
            params = None
            if name in stock.finishes:
                params, _ = self._free_request(self.requests[name])
                self.running = [each for each in self.running if each.request_id != name]
            outputs.append(SimpleNamespace(request_id=name, kv_transfer_params=params))
        return {0: SimpleNamespace(outputs=outputs)}

    def free(self: DllmScheduler, freed: Any) -> tuple[None, None]:
        del self.requests[freed.request_id]
        return None, None

    monkeypatch.setattr(Scheduler, "schedule", lambda self: [each.spec_token_ids for each in self.running])
    monkeypatch.setattr(Scheduler, "update_from_output", update)
    monkeypatch.setattr(Scheduler, "_free_request", free)
    monkeypatch.setattr(Scheduler, "make_stats", lambda self, spec_decoding_stats: spec_decoding_stats)
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(stock.clock) / 1e3)
    return stock


def step(scheduler: DllmScheduler, reports: dict[str, list[int]], **kwargs: Any) -> Any:
    output = SimpleNamespace(
        scheduled_spec_decode_tokens={name: [-1] * (B * (1 + MAX_NODES)) for name in reports},
        scheduled_new_reqs=[],
        scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=set()),
        preempted_req_ids=None,
    )
    vars(output).update(kwargs)
    scheduler.schedule()
    return scheduler.update_from_output(output, SimpleNamespace(num_nans_in_logits=reports))[0].outputs


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
    assert not scheduler.wants_cost_curve


def test_who_wants_a_cost_curve() -> None:
    assert make(None).wants_cost_curve
    assert not make(0).wants_cost_curve


def test_reports_are_taken_from_vllm(stock: SimpleNamespace) -> None:
    stock.reports = "unseen"
    step(make(running=[request()]), {"a": row()})
    assert stock.reports is None


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


def observed(monkeypatch: pytest.MonkeyPatch, scheduler: DllmScheduler) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        scheduler.rule, "observe", lambda n, budget, mean, ms, host_ms: seen.append((n, budget, mean, ms, host_ms))
    )
    return seen


def test_the_rule_learns_acceptance_step_time_and_what_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = make(None, [request(), request("b")])
    seen = observed(monkeypatch, scheduler)
    for _ in range(2):
        step(scheduler, {"a": row(accepted=2), "b": row(accepted=1)})
    # The clock ticks once per question: a step ends one tick after it was scheduled, the next is scheduled one later.
    assert seen[0] == (2, MAX_NODES, 1.5, pytest.approx(1.0), None)
    assert seen[1] == (2, MAX_NODES, 1.5, pytest.approx(1.0), pytest.approx(1.0))


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
    assert seen == [(1, MAX_NODES, 0.0, None, None)]


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
    decoded = StepStats.decode(stats.num_accepted_tokens_per_pos)
    assert decoded is not None
    assert (decoded.budgets, decoded.forwards, decoded.total_accepted) == ({MAX_NODES: 1}, 1, 1)
    assert scheduler.make_stats(None) is None


def test_without_statistics_none_are_made() -> None:
    scheduler = make()
    scheduler.log_stats = False
    assert scheduler.make_spec_decoding_stats(None, 16, 0, None, "a") is None


@pytest.mark.parametrize(
    ("num_computed_tokens", "num_new_tokens", "expected"),
    [(0, 8, (8, 8)), (8, B, (B, 4)), (8, 4 * B, (8, 0)), (12, 4 * B, (B, 0))],
)
def test_pages_are_those_of_the_row_whatever_is_drafted(
    num_computed_tokens: int, num_new_tokens: int, expected: tuple[int, int]
) -> None:
    scheduler = make()
    scheduler._allocate_slots = lambda request, num_new_tokens, num_lookahead_tokens: (
        num_new_tokens,
        num_lookahead_tokens,
    )
    assert scheduler._allocate_row(request("a", num_computed_tokens), num_new_tokens) == expected
