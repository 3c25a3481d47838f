"""What our scheduler adds to vLLM's: rows of a budget, pages of a row, reports; vLLM's own part is a stand-in."""

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.metrics.stats import SchedulerStats

from tests.engine.scheduler_rig import MAX_NODES, B, allocated, make, observed, request, row, stand_in, step
from vllm_dllm.draft.acceptance import FIRST_WAIT
from vllm_dllm.engine import stats_way
from vllm_dllm.engine.report import StepOrder
from vllm_dllm.engine.window_scheduler import WindowScheduler


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    return stand_in(monkeypatch)


def begun(scheduler: Any) -> Any:
    """Let the running requests have taken the first step of their blocks."""
    for each in scheduler.running:
        scheduler.rows.kv.note(each.request_id, each.num_tokens)
    return scheduler


@pytest.mark.parametrize(
    ("budget", "requests", "waiting", "drafts"),
    [
        (2, [request()], 0, [2]),
        (0, [request()], 0, [0]),
        (3, [request(), request("b", 26)], 0, [3, 2]),  # 6 positions are left to b, of whom vLLM counts one a draft
        (3, [request(), request("b", 28)], 0, [3, 0]),
        (3, [request(name) for name in "abcd"], 0, [3] * 4),
        (3, [request(name) for name in "abcdef"], 0, [1] * 6),  # 64 rows, 24 of them for the blocks
        (3, [request(name) for name in "abcd"], 1, [1] * 4),  # of them 32 for a prompt
        (3, [request(name) for name in "abcdefghijklmnop"], 1, [0] * 16),
        (3, [request(), request("b", num_drafts=0)], 0, [3, 3]),  # b was left out of a step without drafts
    ],
)
def test_requests_have_a_budget_of_drafts(budget: int, requests: list[Any], waiting: int, drafts: list[int]) -> None:
    scheduler = begun(make(budget, [SimpleNamespace(**vars(each)) for each in requests]))
    scheduler.waiting = [None] * waiting
    assert [len(rows) - B for rows in scheduler.schedule()] == drafts
    assert list(scheduler.rows.given.values()) == [B * (1 + num) for num in drafts]
    assert scheduler.rows.free == 64 - sum(scheduler.rows.given.values()) >= 32 * waiting * (sum(drafts) > 0)


def test_a_request_may_have_fewer_drafts_or_none() -> None:
    """Of the room in a step, those that take none leave theirs to the others."""
    asked: list[dict[str, Any] | None] = [None, {"dllm_budget": 1}, {"dllm_speculation": 0}, {"dllm_budget": 0}, {}]
    running = [request(name) for name in "abcde"]
    for each, args in zip(running, asked, strict=True):
        each.sampling_params = SimpleNamespace(extra_args=args)
    scheduler = begun(make(MAX_NODES, running))
    assert [len(rows) - B for rows in scheduler.schedule()] == [3, 1, 0, 0, 3]
    for each in running:
        each.sampling_params = SimpleNamespace(extra_args={"dllm_speculation": False})
    assert [len(rows) - B for rows in begun(make(MAX_NODES, running)).schedule()] == [0] * 5


def test_a_request_without_a_block_is_left_alone() -> None:
    idle = request("b")
    idle.spec_token_ids = []
    scheduler = begun(make(1, [request(), idle]))
    assert [len(rows) for rows in scheduler.schedule()] == [B + 1, 0]


def test_without_speculation_there_is_the_block_alone() -> None:
    scheduler = begun(make(running=[request()], spiffy=False))
    assert [len(rows) for rows in scheduler.schedule()] == [B]


def test_blocks_that_begin_are_refreshed_oldest_first_and_the_others_wait() -> None:
    scheduler = begun(make(3, [request(name) for name in "abcdefg"]))
    for each in scheduler.running[:6]:
        each.num_computed_tokens = each.num_tokens = 12
    scheduler.schedule()
    # The block of g, then rows of 16 each: three fit into 64, a fourth does not; what is left is for drafts of g.
    assert scheduler.rows.given == {"g": 4 * B, "a": 16, "b": 16, "c": 16}
    assert scheduler._num_held == 3
    assert [each.next_decode_eligible_step for each in scheduler.running] == [0] * 3 + [9] * 3 + [0]
    assert len(scheduler.running[0].spec_token_ids) == B, "nothing is known to draft from"
    for each in scheduler.running[:3]:
        scheduler.rows.kv.note(each.request_id, 12)
    scheduler.schedule()
    assert scheduler.rows.given == {**dict.fromkeys("abcg", B), **dict.fromkeys("def", 16)}


def test_an_old_request_s_long_refresh_goes_before_short_ones() -> None:
    """However many young requests refresh rows of two blocks in each step."""
    scheduler = make(3, [request(name) for name in "abcdefgh"])
    for each in scheduler.running[1:]:
        each.num_computed_tokens = each.num_tokens = each.num_prompt_tokens = each.max_tokens = B
    scheduler.running[0].max_tokens = 20
    scheduler.schedule()
    assert scheduler.rows.given == {"a": 28, **dict.fromkeys("bcde", 2 * B)}


def test_what_vllm_counts_is_told_in_rows() -> None:
    scheduler = begun(make(2, [request()]))
    scheduler.schedule()
    output = SimpleNamespace(
        num_scheduled_tokens={"a": B + 2, "n": 8},
        scheduled_spec_decode_tokens={"a": [-1] * (B + 2)},
        scheduled_new_reqs=[SimpleNamespace(req_id="n", num_computed_tokens=0, prompt_len=0, sampling_params=None)],
        finished_req_ids={"gone"},
    )
    new = request("n", 0)
    new.num_tokens, scheduler.requests["n"] = 8, new
    allocated(scheduler, new, 8)
    scheduler._update_after_schedule(output)
    assert output.num_scheduled_tokens == {"a": B + 2, "n": 8 + B}
    assert output.scheduled_spec_decode_tokens["n"] == [-1] * B
    assert output.total_num_scheduled_tokens == 3 * B + 16
    order = output.aux_output_connector_metadata
    assert (order.requests, order.kv.end.tolist(), order.roster) == (("a", "n"), [0, 16], None)
    assert order.ended == {"gone"}
    assert order.num_rows == 3 * B + 16
    output.scheduled_new_reqs = []
    for graph, total in ((40, 41), (20, 3 * B + 16)):
        scheduler._largest_graph = graph
        scheduler._update_after_schedule(output)
        assert output.total_num_scheduled_tokens == total
        assert output.aux_output_connector_metadata.num_rows == 3 * B + 16, "without the padding"
    scheduler._largest_graph = 64
    with pytest.raises(RuntimeError, match="a step has 65 rows, max_num_batched_tokens is 64"):
        scheduler._update_after_schedule(output)
    output.num_scheduled_tokens = {"a": B + 2}
    scheduler._update_after_schedule(output)
    assert output.total_num_scheduled_tokens == output.aux_output_connector_metadata.num_rows == 3 * B


def test_a_request_is_admitted_once_there_are_rows_for_its_first_step() -> None:
    scheduler = begun(make(0, [request(name) for name in "abcdefghijklm"]))
    scheduler.schedule()
    new = request("n", 0)
    new.num_tokens = 8
    assert scheduler.rows.free == 12
    assert allocated(scheduler, new, 8) is None
    assert scheduler._num_held == 1
    assert "n" not in scheduler.rows.given
    assert allocated(scheduler, scheduler.running[0], B) == 16, "a running one has its rows"


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


def drafted(scheduler: Any, accepted: dict[str, int]) -> list[int]:
    """Take a step; return how many drafts each request had."""
    begun(scheduler).schedule()
    counted = {each.request_id: each.spec_token_ids for each in scheduler.running}
    had = [len(counted[name]) - B for name in accepted]
    rows = {name: row(accepted=min(n, num)) for (name, n), num in zip(accepted.items(), had, strict=True)}
    step(scheduler, rows, scheduled_spec_decode_tokens=counted)
    return had


def test_a_request_whose_drafts_never_come_true_takes_none_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for a probe now and then; what it does not take is told to the rule."""
    scheduler = make(None, [request(name) for name in "abcdef"])
    scheduler.rule.break_even = 0.5
    monkeypatch.setattr(scheduler.rule, "choose", lambda n, limit, *beside: min(limit, 1))
    seen = []
    monkeypatch.setattr(scheduler.rule, "observe", lambda *args: seen.append(args))
    had = [drafted(scheduler, {"a": 0, **dict.fromkeys("bcdef", 2)}) for _ in range(60)]
    assert had[0] == [1] * 6
    first = [num for num, *_ in had].index(0)
    assert 5 < first < 40
    assert had[first : first + FIRST_WAIT] == [[0, *[1] * 5]] * FIRST_WAIT
    assert had[first + FIRST_WAIT] == [1] * 6, "a probe"
    assert had[-1] == [0, *[1] * 5]
    (without,) = {(n, budget, mean, num) for n, budget, mean, *_, num in seen if num}
    assert without == (5, 1, 1.0, 1)


@pytest.mark.parametrize(("names", "had"), [("ab", [3, 3]), ("abc", [1, 1, 1])])
def test_drafts_with_neighbours_have_their_rows(names: str, had: list[int]) -> None:
    """Of 64 rows, eight of each canvas: the block of four and what follows."""
    scheduler = make(MAX_NODES, [request(name) for name in names], kv_policy="freecache")
    assert drafted(scheduler, dict.fromkeys(names, 0)) == had
    assert scheduler.rows.free == 64 - 8 * (len(had) + sum(had))


def test_a_fixed_budget_is_every_request_s() -> None:
    scheduler = make(2, [request(), request("b")])
    assert {tuple(drafted(scheduler, {"a": 0, "b": 2})) for _ in range(100)} == {(2, 2)}


def test_nothing_is_known_of_a_request_that_ended() -> None:
    scheduler = make(None, [request()])
    step(scheduler, {"a": row()})
    assert scheduler.acceptance.known == {"a"}
    scheduler._free_request(scheduler.requests["a"])
    step(scheduler, {"a": row()})
    assert not scheduler.acceptance.known


def test_an_idle_engine_is_not_measured(monkeypatch: pytest.MonkeyPatch, stock: SimpleNamespace) -> None:
    scheduler = make(None, [request()])
    seen = observed(monkeypatch, scheduler)
    stock.finishes = ["a"]
    step(scheduler, {"a": row()})
    stock.finishes = []
    scheduler.running = [request("b")]
    scheduler.rows.kv.add("b", 0)
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
    step(scheduler, {"a": row(accepted=1)}, aux_output_connector_metadata=StepOrder((), None, num_rows=21))
    spec = None
    for accepted in (0, B):
        spec = scheduler.make_spec_decoding_stats(
            spec, num_draft_tokens=16, num_accepted_tokens=accepted, num_invalid_spec_tokens=None, request_id="a"
        )
    stats = scheduler.make_stats(spec)
    # The emitted block's commit is a step; canvas positions are no drafts.
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (3, 3 * B, B)
    decoded = stats_way.take(SchedulerStats(spec_decoding_stats=stats))
    assert decoded is not None
    assert (decoded.budgets, decoded.forwards, decoded.total_accepted) == ({MAX_NODES: 1}, 1, 1)
    assert decoded.rows == 21
    assert scheduler.make_stats(None) is None


def test_a_window_is_a_step_that_commits_itself() -> None:
    scheduler, stats = make(scheduler=WindowScheduler), None
    for accepted in (0, 5):
        stats = scheduler.make_spec_decoding_stats(
            stats, num_draft_tokens=7, num_accepted_tokens=accepted, num_invalid_spec_tokens=None, request_id="a"
        )
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (2, 14, 5)


def test_without_statistics_none_are_made() -> None:
    scheduler = make()
    scheduler.log_stats = False
    assert scheduler.make_spec_decoding_stats(None, num_draft_tokens=16, num_accepted_tokens=0, request_id="a") is None


@pytest.mark.parametrize(("num_computed_tokens", "num_new_tokens"), [(0, 8), (8, B), (8, B + 3), (12, B + 3)])
def test_pages_are_those_of_the_row_whatever_is_drafted(num_computed_tokens: int, num_new_tokens: int) -> None:
    assert allocated(make(), request("a", num_computed_tokens), num_new_tokens) == 16


@pytest.mark.parametrize(("horizon", "num_tokens", "end"), [(1, 8, 8 + B), (1, 8 + B, 8 + 2 * B), (9, 8, 16)])
def test_who_has_a_horizon_has_rows_and_pages_up_to_it(horizon: int, num_tokens: int, end: int) -> None:
    growing = request("a", num_tokens)
    growing.num_tokens, growing.sampling_params = num_tokens, SimpleNamespace(extra_args={"dllm_horizon": horizon})
    scheduler = make(running=[growing])
    assert allocated(scheduler, growing, B) == end
    assert scheduler.rows.needed([growing])[0] == [end], "the refresh that a block begins with"
    assert scheduler.rows.first(growing, 0) == end
