"""Bidirectional models with async scheduling: async == sync == reference, in fp32, and steps that run ahead.

As in `test_sdar_async.py`, a CPU is kept from turning it off.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ahead import check_canvases, scheduled_ahead, scheduler_of
from tests.e2e.constrained import beside_edited, check_beside_edited
from tests.e2e.dream import PUBLISHED, dream_oracle
from tests.e2e.ended import check_ended, check_forwards
from tests.e2e.growing import check_growing
from tests.e2e.logprobs import check_logprobs, run_asking
from tests.e2e.pinned import with_given
from tests.e2e.rig import (
    LLADA_POLICIES,
    MAX_MODEL_LEN,
    Case,
    Oracle,
    mixed_cases,
    random_graph,
    run_outputs,
    shared_engine,
    speculation,
    step_all,
)
from tests.e2e.scores import check_scores
from tests.suite.order import configurations

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

FEW_PAGES = 14
USUAL = [("llada", {"block_length": 8}, 3, None), ("dream", {"block_length": 8, "refresh_every": 4}, None, FEW_PAGES)]
SLOW = [("llada", {"block_length": 8, "kv_policy": "prefix"}, None, None), ("dream", {"block_length": 8}, 5, None)]
"""Family, settings, budget, pages."""


@pytest.fixture(autouse=True)
def _cpu_schedules_ahead() -> Iterator[None]:
    with scheduled_ahead():
        yield


class Served:
    """An engine, and what decodes as it should."""

    def __init__(self, checkpoint: Path, oracle: Oracle, family: str, settings: Any, budget: Any, pages: Any) -> None:
        block_length = settings["block_length"]
        config = None if budget is None else speculation(random_graph(3, 8, block_length), budget)
        options: dict[str, Any] = {"speculative_config": config, "async_scheduling": True, "max_num_seqs": 7}
        if pages is not None:
            options["num_gpu_blocks_override"] = pages
        self.llm = shared_engine(checkpoint, settings, **options)
        self.oracle, self.settings, self.block_length = oracle, settings, block_length
        self.policies = PUBLISHED if family == "dream" else LLADA_POLICIES

    def expected(self, case: Case) -> list[int]:
        return self.oracle.tokens(case, self.settings)

    def check(self, cases: list[Case]) -> None:
        """Compare tokens, and counts of forwards."""
        outputs = run_asking(self.llm, cases)
        check_logprobs(outputs, [self.oracle.generation(case, self.settings).log_probs for case in cases])
        assert [list(output.outputs[0].token_ids) for output in outputs] == [self.expected(case) for case in cases]
        check_forwards(self.oracle, cases, self.settings, [o.kv_transfer_params["dllm"] for o in outputs])


@pytest.fixture(scope="module")
def oracles(mild: Path, mild_dream: Path, mild_oracle: Oracle) -> dict[str, tuple[Path, Oracle]]:
    return {"llada": (mild, mild_oracle), "dream": (mild_dream, dream_oracle(mild_dream))}


@pytest.fixture(params=configurations("async", USUAL, slow=SLOW))
def served(request: pytest.FixtureRequest, oracles: dict[str, tuple[Path, Oracle]]) -> Served:
    return Served(*oracles[request.param[0]], *request.param)


@pytest.fixture
def ahead(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each step that is scheduled of each request, whether the one before is under way."""
    scheduler, steps = scheduler_of(served.llm), []
    decide = scheduler._decide_kv

    def spy(output: Any) -> Any:
        requests = [scheduler.requests[req_id] for req_id in output.num_scheduled_tokens]
        steps.extend(request.num_output_placeholders > 0 for request in requests)
        return decide(output)

    monkeypatch.setattr(scheduler, "_decide_kv", spy)
    return steps


@pytest.mark.always
def test_mixed_batch_equals_reference(served: Served, ahead: list[bool]) -> None:
    assert served.llm.llm_engine.vllm_config.max_concurrent_batches == 2
    cases = mixed_cases(served.block_length, seed=12, policies=served.policies)
    served.check(cases)
    assert sum(ahead) > len(ahead) / 4, "too few steps ran ahead"
    assert not scheduler_of(served.llm).rows.known
    assert not scheduler_of(served.llm).ahead.known


def test_an_answer_ends_before_its_block(served: Served) -> None:
    cases = mixed_cases(served.block_length, seed=21, policies=served.policies)
    check_ended(served.llm, served.oracle, cases, served.settings)


def test_a_sequence_may_grow(served: Served) -> None:
    cases = mixed_cases(served.block_length, seed=22, policies=served.policies)
    check_growing(served.llm, served.oracle, cases, served.settings)


def test_blocks_are_scored_beside_steps_that_run_ahead(served: Served) -> None:
    cases = mixed_cases(served.block_length, seed=14, policies=served.policies)[:5]
    check_scores(served.llm, served.oracle, cases, [served.expected(case) for case in cases])


def test_where_the_steps_are_known_all_but_the_first_of_a_block_run_ahead(served: Served, ahead: list[bool]) -> None:
    case = Case(tuple(range(5, 25)), max_tokens=3 * served.block_length, policy="static")
    (output,) = run_outputs(served.llm, [case])
    assert list(output.outputs[0].token_ids) == served.expected(case)
    if scheduler_of(served.llm).rule is None:
        num_steps = served.oracle.generation(case, served.settings).nfe // 3
        assert ahead == ([False] + [True] * (num_steps - 1)) * 3


def test_a_step_behind_the_end_of_a_block_is_void(
    served: Served, ahead: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody runs ahead, whatever the steps under way come to: so each block has a step too many."""
    scheduler, reports = scheduler_of(served.llm), []
    reported = scheduler.ahead.reported

    def spy(name: str, report: Any) -> bool:
        counts = reported(name, report)
        reports.append((bool(report.finished), counts))
        return counts

    monkeypatch.setattr(scheduler.ahead, "may_go_on", lambda request: True)
    monkeypatch.setattr(scheduler.ahead, "reported", spy)
    cases = mixed_cases(served.block_length, seed=3, policies=served.policies)
    served.check(cases)
    assert sum(ahead) > len(ahead) / 2
    finished = [is_finished for is_finished, counts in reports if not counts]
    assert len(finished) > len(cases) / 2
    assert not any(finished)


def test_constraints_and_edits_beside_free_requests(
    served: Served, ahead: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps under a constraint are void, too, though its answer is kept on the host."""
    scheduler, voided = scheduler_of(served.llm), set()
    reported = scheduler.ahead.reported

    def spy(name: str, report: Any) -> bool:
        counts = reported(name, report)
        if not counts and name in scheduler.requests:
            voided.add(name.split("-")[0])
        return counts

    monkeypatch.setattr(scheduler.ahead, "may_go_on", lambda request: True)
    monkeypatch.setattr(scheduler.ahead, "reported", spy)
    cases = mixed_cases(served.block_length, seed=9, policies=served.policies)
    check_beside_edited(served.llm, served.oracle, served.settings, cases, seed=4)
    assert sum(ahead) > len(ahead) / 2, "too few steps ran ahead"
    mixed = beside_edited(cases, seed=4)
    assert sum(mixed[int(name)].asked is not None for name in voided) >= 4, "too few of theirs were void"


@pytest.mark.parametrize("is_forced", [False, True])
def test_given_tokens_of_answers(
    served: Served, ahead: list[bool], monkeypatch: pytest.MonkeyPatch, is_forced: bool
) -> None:
    """Where all run ahead, steps behind blocks that are given whole are void, too."""
    if is_forced:
        monkeypatch.setattr(scheduler_of(served.llm).ahead, "may_go_on", lambda request: True)
    cases = mixed_cases(served.block_length, seed=31, policies=served.policies)
    served.check(with_given(cases, served.block_length, seed=31))
    assert any(ahead)
    assert not scheduler_of(served.llm).ahead.known


def test_canvases_are_shown_of_steps_that_count(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has what the one before had and more, though steps behind it are under way."""
    monkeypatch.setattr(scheduler_of(served.llm).ahead, "may_go_on", lambda request: True)
    cases = mixed_cases(served.block_length, seed=14, policies=served.policies)[:8]
    check_canvases(served.llm, cases, [served.expected(case) for case in cases])


def test_preemption_and_aborts_leave_the_others_alone(served: Served) -> None:
    cases = mixed_cases(served.block_length, seed=6, policies=served.policies)[:8]
    under_way: list[bool] = []

    def interfere(number: int, llm: Any) -> None:
        if number % (served.block_length + 9) == 5:
            under_way.extend(request.num_in_flight_tokens > 0 for request in scheduler_of(llm).running)
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
        if number == 4:
            llm.llm_engine.abort_request(["1"])

    tokens = step_all(served.llm, cases, interfere)
    assert sum(under_way) >= 4, "too few were preempted while a step was under way"
    expected = {str(i): served.expected(case) for i, case in enumerate(cases) if i != 1}
    assert {name: ids for name, ids in tokens.items() if name != "1"} == expected
    assert not scheduler_of(served.llm).ahead.known


def test_near_the_end_of_max_model_len(served: Served) -> None:
    lefts = (served.block_length, served.block_length + 1, 37, 64)
    cases = [Case(tuple(range(5, 5 + MAX_MODEL_LEN - left)), max_tokens=left, temperature=0.7) for left in lefts]
    outputs = run_outputs(served.llm, cases)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [served.expected(case) for case in cases]
