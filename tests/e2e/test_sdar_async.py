"""Async scheduling changes when the host learns of tokens, and no token: async == sync == reference, in fp32.

vLLM turns it off on a CPU, where a step is done when the call that starts it returns; here it is left on.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ahead import check_canvases, scheduled_ahead, scheduler_of
from tests.e2e.constrained import beside_edited, expected
from tests.e2e.ended import check_ended, check_forwards
from tests.e2e.pinned import with_given
from tests.e2e.rig import MAX_MODEL_LEN, Case, engine, random_graph, run_outputs, shared_engine, speculation, step_all
from tests.e2e.sdar import SdarOracle, check_preemption_and_aborts, sdar_cases
from tests.suite.order import configurations

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

USUAL = [(8, "auto"), (4, 5)]
SLOW = [(8, None)]
"""Block length, budget."""


@pytest.fixture(autouse=True)
def _cpu_schedules_ahead() -> Iterator[None]:
    with scheduled_ahead():
        yield


@pytest.fixture(params=configurations("sdar async", USUAL, slow=SLOW))
def served(request: pytest.FixtureRequest, mild_sdar: Path) -> Any:
    block_length, budget = request.param
    settings = {"block_length": block_length}
    config = None if budget is None else speculation(random_graph(3, 8, block_length), budget)
    options = {"speculative_config": config, "async_scheduling": True, "max_num_seqs": 7}
    return shared_engine(mild_sdar, settings, **options), settings


@pytest.fixture
def oracle(mild_sdar_oracle: SdarOracle) -> SdarOracle:
    return mild_sdar_oracle


@pytest.mark.always
def test_mixed_batch_equals_reference(served: Any, oracle: SdarOracle) -> None:
    llm, settings = served
    assert llm.llm_engine.vllm_config.max_concurrent_batches == 2
    cases = sdar_cases(settings["block_length"], seed=settings["block_length"])
    for _ in range(2):  # the second time prompts are found in the cache
        outputs = run_outputs(llm, cases)
        assert [list(o.outputs[0].token_ids) for o in outputs] == [oracle.tokens(case, settings) for case in cases]
        check_forwards(oracle, cases, settings, [output.kv_transfer_params["dllm"] for output in outputs])
    assert any(output.num_cached_tokens for output in outputs)
    assert not scheduler_of(llm).rows.known


def test_an_answer_ends_before_its_block(served: Any, oracle: SdarOracle) -> None:
    llm, settings = served
    check_ended(llm, oracle, sdar_cases(settings["block_length"], seed=21), settings)


def test_given_tokens_of_answers(served: Any, oracle: SdarOracle) -> None:
    llm, settings = served
    cases = with_given(sdar_cases(settings["block_length"], seed=31), settings["block_length"], 31, has_suffixes=False)
    outputs = run_outputs(llm, cases)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [oracle.tokens(case, settings) for case in cases]
    check_forwards(oracle, cases, settings, [output.kv_transfer_params["dllm"] for output in outputs])
    assert not scheduler_of(llm).rows.known


def test_preemption_and_aborts_leave_the_others_alone(served: Any, oracle: SdarOracle) -> None:
    llm, settings = served
    # A block's steps do not overlap where vLLM sees that it may be the last one.
    check_preemption_and_aborts(llm, oracle, settings, every=2 * settings["block_length"] + 9)


def test_constraints_and_edits_beside_free_requests(served: Any, oracle: SdarOracle) -> None:
    llm, settings = served
    mixed = beside_edited(sdar_cases(settings["block_length"], seed=9), seed=4)
    tokens = step_all(llm, mixed)
    for i, each in enumerate(mixed):
        assert tokens[str(i)] == expected(oracle, each.case, settings, each.asked), each


def test_canvases_are_shown_though_steps_behind_them_are_under_way(served: Any, oracle: SdarOracle) -> None:
    llm, settings = served
    cases = sdar_cases(settings["block_length"], seed=14)[:8]
    check_canvases(llm, cases, [oracle.tokens(case, settings) for case in cases])


def test_near_the_end_of_max_model_len(served: Any, oracle: SdarOracle) -> None:
    """The host counts what is under way: there a request waits until it knows."""
    llm, settings = served
    room = 2 * settings["block_length"]
    lefts = (room, room + 1, 37, 64, 109)
    cases = [
        Case(tuple(range(5, 5 + MAX_MODEL_LEN - left)), max_tokens=left, policy="sequential", temperature=0.7)
        for left in lefts
    ]
    outputs = run_outputs(llm, cases)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [oracle.tokens(case, settings) for case in cases]
    with pytest.raises(ValueError, match=f"shorten the prompt to at most {MAX_MODEL_LEN - room} tokens"):
        run_outputs(llm, [Case(tuple(range(5, 6 + MAX_MODEL_LEN - room)), max_tokens=1)])  # it would wait forever


def test_stop_tokens_trim_inside_a_block(served: Any, oracle: SdarOracle) -> None:
    llm, settings = served
    case = Case(prompt=(5, 6, 7), max_tokens=24, temperature=1.0, seed=1)
    tokens = oracle.tokens(case, settings)
    prompt = [{"prompt_token_ids": list(case.prompt)}]
    for stop in tokens[9:12]:
        output = llm.generate(prompt, case.sampling_params(stop_token_ids=[stop]), use_tqdm=False)[0].outputs[0]
        assert list(output.token_ids) == tokens[: tokens.index(stop) + 1]


def test_a_conversation_finds_its_own_answers(served: Any, oracle: SdarOracle) -> None:
    llm, settings = served
    block_length = settings["block_length"]
    prompt, cached, expected = tuple(range(105, 115)), [], [0]
    for turn in range(4):
        case = Case(prompt=prompt, max_tokens=15, temperature=0.7, seed=turn)
        (output,) = run_outputs(llm, [case])
        answer = tuple(output.outputs[0].token_ids)
        assert list(answer) == oracle.tokens(case, settings)
        cached.append(output.num_cached_tokens)
        expected.append((len(prompt) + len(answer) - 1) // block_length * block_length // 16 * 16)
        prompt += (*answer, 5, 6, 7)
    assert cached == expected[:-1]


def test_more_requests_than_pages(mild_sdar: Path, oracle: SdarOracle) -> None:
    """Requests are preempted while a step of theirs is under way."""
    settings, num_pages = {"block_length": 8}, 12
    cases = [dataclasses.replace(case, max_tokens=30 + i, steps=None) for i, case in enumerate(sdar_cases(8, seed=7))]
    with engine(mild_sdar, settings, async_scheduling=True, num_gpu_blocks_override=num_pages) as llm:
        scheduler = scheduler_of(llm)
        under_way = []
        original = scheduler._preempt_request

        def preempt(request: Any, *args: Any, **kwargs: Any) -> None:
            under_way.append(request.num_in_flight_tokens)
            original(request, *args, **kwargs)

        scheduler._preempt_request = preempt
        for _ in range(2):
            outputs = run_outputs(llm, cases)
            assert [list(o.outputs[0].token_ids) for o in outputs] == [oracle.tokens(case, settings) for case in cases]
        assert any(under_way), "nobody was preempted while a step was under way"
        assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == num_pages - 1
        assert not scheduler.rows.known
