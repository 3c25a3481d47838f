"""Rows, pages and the cache of block-causal requests; vLLM's own part is a stand-in."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from tests.engine.scheduler_rig import MAX_NODES, B, allocated, make, observed, request, row, stand_in, step
from vllm_dllm.engine.async_scheduler import CausalAsyncScheduler
from vllm_dllm.engine.state_check import StateCheck
from vllm_dllm.engine.worker_check import CheckLevel
from vllm_dllm.errors import StateError
from vllm_dllm.state.report import Failed


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return stand_in(monkeypatch)


def causal(*requests: Any, budget: int | None = MAX_NODES, **stored: int) -> Any:
    scheduler = make(budget, list(requests), causal=True, spiffy=budget is not None)
    for name, start in stored.items():
        scheduler.rows.kv.note(name, start)
    scheduler.pages.cache_stored = lambda request, num_stored: cached.append((request.request_id, num_stored))
    cached: list[tuple[str, int]] = []
    scheduler.cached = cached
    return scheduler


@pytest.mark.parametrize(
    ("budget", "known", "blocks", "counted"),
    [
        (2, {"a": 8, "b": 9}, [3, 3], [2, 2]),  # both at a block that they began before
        (2, {"a": 12, "b": 9}, [2, 3], [0, 2]),  # a begins a block, and the one before is not stored
        (3, {"a": 12, "b": 12}, [2, 2], [0, 0]),
        (3, {"a": 12, "b": 26}, [2, 3], [0, 2]),  # what vLLM counts behind 32 would be cut
        (None, {"a": 12, "b": 8}, [2, 1], [0, 0]),
        (3, {"a": 12, **dict.fromkeys("bcdef", 8)}, [2] * 6, [0, 1, 1, 1, 1, 1]),  # 64 rows, 8 of them for a
    ],
)
def test_who_begins_a_block_has_the_rows_of_two(
    budget: int | None, known: dict[str, int], blocks: list[int], counted: list[int]
) -> None:
    begun = {name: 24 if n == 26 else 8 for name, n in known.items()}
    scheduler = causal(*(request(name, n) for name, n in known.items()), budget=budget, **begun)
    assert [len(rows) - B for rows in scheduler.schedule()] == counted
    assert [rows // B for rows in scheduler.rows.given.values()] == blocks


@pytest.mark.parametrize(("hit", "rows"), [(0, 10 + B), (4, 6 + B), (8, 2 + B)])
def test_a_prompt_is_computed_behind_the_cache_hit(hit: int, rows: int) -> None:
    new = request("n", 0)
    new.num_tokens = 10
    scheduler = causal()
    allocated(scheduler, new, 10 - hit, hit=hit)
    assert scheduler.rows.given == {"n": rows}


def test_what_is_stored_is_cached_unless_the_pages_are_gone() -> None:
    """Or the request has to end: NaN in its pages, say, are for nobody else."""
    scheduler = causal(request("a"), request("b"), request("c"), request("d"), budget=2)
    scheduler.requests["b"].num_stale_output_tokens = 8
    scheduler._free_request(scheduler.requests["c"])
    faulty = dataclasses.replace(row(stored=8), faults=int(Failed.TOKEN))

    def finish(names: set[str], _: Any) -> list[Any]:
        assert names == {"d"}
        scheduler._free_request(scheduler.requests["d"])
        return []

    scheduler.finish_requests = finish
    step(scheduler, {"a": row(stored=8), "b": row(stored=12), "c": row(stored=16), "d": faulty})
    assert scheduler.cached == [("a", 8)]
    assert scheduler.rows.step([scheduler.requests["a"], scheduler.requests["b"]]).is_new.tolist() == [False, True]
    assert scheduler.rows.known == {"a", "b"}


def test_a_preempted_or_finished_request_has_nothing_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "_preempt_request", lambda self, request, *args: None)
    scheduler = causal(request("a"), request("b"), a=8, b=8)
    scheduler._preempt_request(scheduler.requests["a"], 0.0)
    scheduler._free_request(scheduler.requests["b"])
    assert not scheduler.rows.known


def test_the_rule_learns_from_those_that_may_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = causal(request("a"), request("b"), request("c"), a=8, b=8, c=8)
    seen = observed(monkeypatch, scheduler)
    rows = {"a": row(accepted=1), "b": row(commits=1, proposed=0), "c": row(accepted=2)}
    step(scheduler, rows)
    assert seen == [(2, MAX_NODES, 1.5, pytest.approx(1.0), None, 1)]


@pytest.mark.parametrize(("budget", "blocks"), [(None, 2), (1, 2), (3, 4)])
def test_ahead_of_reports_all_have_room_for_a_commit(budget: int | None, blocks: int) -> None:
    running = [request("a"), request("b", 16)]
    scheduler = make(budget, running, spiffy=budget is not None, causal=True, scheduler=CausalAsyncScheduler)
    assert [len(rows) - B for rows in scheduler.schedule()] == [budget or 0] * 2
    assert scheduler.rows.given == dict.fromkeys("ab", B * blocks)


def test_ahead_of_reports_only_steps_with_drafts_are_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a block begins with a step that stores alone, its second step has no drafts either, though it has room."""
    running = [request("a"), request("b"), request("c")]
    scheduler = make(MAX_NODES, running, causal=True, scheduler=CausalAsyncScheduler)
    scheduler.rows.kv.stores_alone, scheduler.pages.cache_stored = True, lambda *_: None
    scheduler.rows.kv.note("b", 8)
    for _ in range(2):
        scheduler.rows.kv.note("c", 8)
    seen = observed(monkeypatch, scheduler)
    own: list[tuple[Any, ...]] = []
    monkeypatch.setattr(scheduler.acceptance, "observe", lambda *of: own.append((of[0], of[1], of[2] > 0)))
    step(scheduler, {"a": row(proposed=0, commits=1), "b": row(proposed=0), "c": row(accepted=2)})
    assert [(n, mean, begins) for n, _, mean, _, _, begins in seen] == [(1, 2.0, 0)]
    assert sorted(own) == [("a", 0, False), ("b", 0, False), ("c", 2, True)]
    step(scheduler, {"a": row(proposed=0), "b": row(accepted=1), "c": row(accepted=2)})
    assert [(n, mean) for n, _, mean, *_ in seen[1:]] == [(2, 1.5)]


def test_ahead_of_reports_a_request_waits_where_its_block_would_be_cut() -> None:
    running = [request("a"), request("b", 29)]
    scheduler = make(2, running, causal=True, scheduler=CausalAsyncScheduler)
    scheduler.schedule()
    assert [len(each.spec_token_ids) for each in running] == [B + 2, B + MAX_NODES]
    assert running[1].next_decode_eligible_step == scheduler.current_step + 2


@pytest.mark.parametrize(
    ("known", "computed", "hit", "new", "end"),
    [(7, 0, 0, 7, 8), (8, 0, 0, 8, 12), (8, 0, 4, 4, 12), (9, 9, 0, B, 12), (12, 12, 0, B + 3, 16)],
)
def test_pages_of_a_block_causal_model_end_with_the_block(
    known: int, computed: int, hit: int, new: int, end: int
) -> None:
    each = request("a", computed)
    each.num_tokens = known
    assert allocated(make(causal=True), each, new, hit=hit) == end


def test_pages_leave_room_for_a_block_that_ends_under_way() -> None:
    each = request("a", 8 + B + 2)
    each.num_tokens, each.num_output_placeholders = 8, B + 2
    assert allocated(make(causal=True, scheduler=CausalAsyncScheduler), each, B + 2) == 16


def test_pages_found_in_the_cache_are_shared_before_the_first_report() -> None:
    """With async scheduling other steps are compared while a request's first one is under way."""
    new, other = request("n", 0), request("o")
    new.num_tokens = 12
    scheduler = make(None, [other], spiffy=False, causal=True)
    page = SimpleNamespace(block_id=3, block_hash="h", is_null=False)
    pages: Any = SimpleNamespace(page_size=8, owners={"o": [page], "n": [page]})
    scheduler._check, scheduler._level = StateCheck(scheduler.rows, pages), CheckLevel.STEP
    scheduler.schedule()
    scheduler.requests["n"] = new
    scheduler.rows.give(new, 16)
    scheduler.running.append(new)
    output: Any = SimpleNamespace(
        num_scheduled_tokens={"n": 4},
        scheduled_spec_decode_tokens={},
        scheduled_new_reqs=[SimpleNamespace(req_id="n", num_computed_tokens=8)],
        finished_req_ids=set(),
    )
    scheduler._update_after_schedule(output)
    assert output.aux_output_connector_metadata.roster == {"o", "n"}
    scheduler._check.compare_pages(scheduler.running)
    scheduler._check.admit("n", 0)
    with pytest.raises(StateError, match="request n has page 3, which is o's"):
        scheduler._check.compare_pages(scheduler.running)
