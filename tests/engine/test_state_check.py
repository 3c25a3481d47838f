"""The check of state names the request whose numbers disagree; what is corrupted here is seen in no other way."""

from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.scheduler_rig import make
from vllm_dllm.engine.async_scheduler import BidirectionalAsyncScheduler
from vllm_dllm.engine.report import RequestReport
from vllm_dllm.engine.state_check import StateCheck
from vllm_dllm.engine.telemetry import RequestTotals
from vllm_dllm.engine.worker_check import CheckLevel, Fault, WorkerCheck, check_level
from vllm_dllm.errors import ConfigError, StateError
from vllm_dllm.state.kv import KvSchedule
from vllm_dllm.state.report import MAX_DEPTH, Failed

B = 4


def page(number: int, block_hash: object = None, is_null: bool = False) -> Any:
    return SimpleNamespace(block_id=number, block_hash=block_hash, is_null=is_null)


def check_of(is_causal: bool, pages: dict[str, list[Any]] | None = None) -> StateCheck:
    kv = KvSchedule("block_causal" if is_causal else "dual", None, B)
    rows: Any = SimpleNamespace(is_causal=is_causal, block_length=B, seq_end=lambda request: 16, kv=kv)
    owned: Any = SimpleNamespace(page_size=8, owners=pages or {})
    made = StateCheck(rows, owned)
    made.admit("a", 8 if is_causal else 0)
    return made


def request(num_tokens: int = 8, name: str = "a") -> Any:
    return SimpleNamespace(request_id=name, num_tokens=num_tokens, num_prompt_tokens=8, num_stale_output_tokens=0)


def report(**changes: Any) -> RequestReport:
    """Report the first step of a block-causal request with 8 tokens, all found in the cache."""
    values: dict[str, Any] = {"forwards": 1, "refreshes": 0, "unmasked": 1, "accepted": 0, "finished": 0, "stored": 8}
    values |= {"wrote": 0, "commits": 0, "left": 0, "faults": 0, "pages": [3]}
    values["proposed"] = [2, *[0] * (MAX_DEPTH - 1)]
    return RequestReport(**(values | changes))


PAGES = {"a": [page(3), page(4)]}


def test_a_request_whose_numbers_add_up_passes() -> None:
    check = check_of(True, PAGES)
    check.take(request(), report(), 0)
    check.take(request(9), report(unmasked=4, accepted=1, finished=1, stored=12, wrote=4, pages=[3, 4]), 4)
    check.take(request(13), report(stored=12, pages=[3, 4], unmasked=3), 0)
    check.compare_totals({"a": RequestTotals(3, 0, 6, 1)})
    check.compare_pages([request()])
    check.free("a")
    check.compare_idle({"the pages": {}})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wrote": 4}, "stored K/V of 12 positions in all, .* but 8 lie before its block"),
        ({"stored": 4}, "begins at 8 in the scheduler, .* but the worker is at 4"),
        ({"stored": 12}, "stored K/V of 8 positions in all, .* but 12 lie"),
        ({"unmasked": 5}, "5 positions were unmasked and 0 tokens emitted"),
        ({"finished": 1}, "0 tokens came with a report of 1 blocks"),
        ({"accepted": 3}, "3 of 2 drafts came true in 1 forwards"),
        ({"faults": int(Fault.UNKNOWN_ID | Fault.NO_MASK)}, "a canvas that cannot be: UNKNOWN_ID, NO_MASK"),
        ({"pages": [4]}, r"has the pages \[4\] in the worker, \[3, 4\] in the scheduler"),
        ({"pages": []}, "has 0 pages of 8 in the worker, but K/V of 8 positions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_disagreement_names_the_request(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(StateError, match=f"request a.*{said}"):
        check_of(True, PAGES).take(request(), report(**changes), 0)


def test_a_look_ahead_may_fill_the_next_block_at_once() -> None:
    full = {"faults": int(Fault.NO_MASK), "finished": 1, "unmasked": 8, "pages": [3, 4]}
    check_of(True, PAGES).take(request(), report(**full, stored=12, wrote=4), 4)
    with pytest.raises(StateError, match="request a: the worker has a canvas that cannot be: NO_MASK"):
        check_of(True, PAGES).take(request(), report(**full), 4)


def test_a_request_that_has_to_end_is_no_disagreement() -> None:
    check_of(True, PAGES).take(request(), report(faults=int(Failed.TOKEN)), 0)
    with pytest.raises(StateError, match=r"request a: the worker has a canvas that cannot be: UNKNOWN_ID$"):
        check_of(True, PAGES).take(request(), report(faults=int(Failed.CANVAS | Fault.UNKNOWN_ID)), 0)


def test_a_request_whose_worker_found_its_end_has_to_end() -> None:
    check = check_of(False)
    check.take(request(), report(finished=1, unmasked=2, left=2, wrote=16, pages=None), 4)
    with pytest.raises(StateError, match="request a goes on, but the worker found its end and left the block masked"):
        check.compare_totals({})
    check.free("a")
    check.compare_totals({})


@pytest.mark.parametrize(("wrote", "begins"), [(0, True), (8, True), (12, False)])
def test_a_refresh_stores_what_the_row_has(wrote: int, begins: bool) -> None:
    check = check_of(False, PAGES)
    steps = [report(wrote=16, pages=None)] * (not begins)
    for each in steps:
        check.take(request(), each, 0)
    with pytest.raises(StateError, match=f"request a: a step stored K/V of {wrote} positions, but .* a row of 16"):
        check.take(request(), report(wrote=wrote, pages=None), 0)


def test_what_a_preemption_made_stale_counts_for_totals_alone() -> None:
    check, stale = check_of(True), request()
    stale.num_stale_output_tokens = 8
    check.take(stale, report(stored=0, unmasked=9), 0)
    check.admit("a", 8)
    check.take(request(), report(pages=None), 0)
    check.compare_totals({"a": RequestTotals(2, 0, 4, 0)})
    with pytest.raises(StateError, match=r"request a is told .*forwards=3.* come to .*forwards=2"):
        check.compare_totals({"a": RequestTotals(3, 0, 4, 0)})


@pytest.mark.parametrize(
    ("theirs", "is_wrong"),
    [([page(3)], True), ([page(3, "hash")], False), ([page(5), page(3, "hash")], True), ([page(0, None, True)], True)],
    ids=["taken twice", "cached for both", "cached but not stored", "nobody's"],
)
def test_a_page_is_one_request_s(theirs: list[Any], is_wrong: bool) -> None:
    check = check_of(True, {"a": [page(3, "hash")], "b": theirs})
    check.admit("b", 8)
    running = [request(), request(name="b")]
    if not is_wrong:
        check.compare_pages(running)
        return
    with pytest.raises(StateError, match="request b has page"):
        check.compare_pages(running)


def test_what_is_left_of_a_request_is_named() -> None:
    with pytest.raises(StateError, match="request z is gone, but the pages still know of it"):
        check_of(True).compare_idle({"the counts": [], "the pages": ["z"]})
    with pytest.raises(StateError, match="request a is gone, but the accounts"):
        check_of(True).compare_idle({})
    with pytest.raises(StateError, match="request b took a step, but was never given a slot"):
        check_of(True).take(request(name="b"), report(), 0)


def test_an_idle_engine_has_no_steps_under_way() -> None:
    scheduler = make(scheduler=BidirectionalAsyncScheduler)
    scheduler._level, scheduler.pages = CheckLevel.IDLE, SimpleNamespace(owners={})
    check = StateCheck(scheduler.rows, scheduler.pages)
    scheduler.ahead = SimpleNamespace(known=set())
    scheduler._compare(check)
    scheduler.ahead.known.add("a")
    with pytest.raises(StateError, match="request a is gone, but the steps under way still know of it"):
        scheduler._compare(check)


def worker(held: dict[str, int], free: list[int]) -> WorkerCheck:
    states = SimpleNamespace(req_id_to_index=held, free_indices=free, max_num_reqs=3)
    return WorkerCheck(SimpleNamespace(req_states=states))


@pytest.mark.parametrize(
    ("held", "free", "said"),
    [
        ({"a": 0, "b": 1, "c": 2}, [], "request c is in slot 2 of the worker, but does not run in the scheduler"),
        ({"a": 0}, [1, 2], "request b runs in the scheduler, but is in no slot"),
        ({"a": 1, "b": 1}, [0], "requests a and b are in the same slot 1"),
        ({"a": 0, "b": 1}, [1], "slot 1 of the worker is free, but request b is in it"),
        ({"a": 0, "b": 1}, [], "0 slots of the worker are free and 2 taken, but it has 3"),
    ],
)
def test_slots_are_those_of_the_roster(held: dict[str, int], free: list[int], said: str) -> None:
    worker({"a": 0, "b": 1}, [2]).compare(frozenset("ab"))
    with pytest.raises(StateError, match=said):
        worker(held, free).compare(frozenset("ab"))


def test_the_variable_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, level in [
        ("0", CheckLevel.OFF),
        ("", CheckLevel.OFF),
        ("idle", CheckLevel.IDLE),
        ("1", CheckLevel.STEP),
    ]:
        monkeypatch.setenv("VLLM_DLLM_CHECK", given)
        assert check_level() == level
    monkeypatch.setenv("VLLM_DLLM_CHECK", "yes")
    with pytest.raises(ConfigError, match=r"VLLM_DLLM_CHECK is 'yes'; allowed are '0' .* set one of these or unset it"):
        check_level()
