"""Every token of the engine equals the reference's, in fp32: policies x KV policies x block lengths x odd lengths.

The usual configurations have each KV policy, short and long blocks, and both implementations of attention.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ended import check_ended
from tests.e2e.growing import check_growing
from tests.e2e.rig import Case, check_counts_while_running, mixed_cases, run, run_outputs, shared_engine, step_all
from tests.suite.order import configurations
from vllm_dllm.unmask.head import WeightHead

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

ALWAYS: list[dict[str, Any]] = [{"block_length": 8}]
USUAL: list[dict[str, Any]] = [
    {"block_length": 32, "refresh_every": 4},
    {"block_length": 8, "kv_policy": "prefix", "attention": "torch"},  # elsewhere it is csrc
]
SLOW: list[dict[str, Any]] = [
    {"block_length": 32},
    {"block_length": 8, "refresh_every": 1},
    {"block_length": 32, "refresh_every": 1, "attention": "torch"},
    {"block_length": 8, "refresh_every": 4},
    {"block_length": 32, "kv_policy": "prefix"},
    {"block_length": 8, "kv_policy": "prefix"},
]


@pytest.fixture(params=configurations("llada", ALWAYS, USUAL, SLOW))
def served(request: pytest.FixtureRequest, wild: Path) -> Any:
    return shared_engine(wild, request.param), request.param


@pytest.mark.always
def test_mixed_batch_equals_reference(served: Any, oracle: Any) -> None:
    llm, settings = served
    cases = mixed_cases(settings["block_length"], seed=settings["block_length"])
    tokens = run(llm, cases)
    assert tokens == [oracle.tokens(case, settings) for case in cases]
    assert len({token for row in tokens for token in row}) > 50, "the model says too little for equality to mean much"


@pytest.mark.always
def test_an_answer_ends_before_its_block(served: Any, oracle: Any) -> None:
    llm, settings = served
    check_ended(llm, oracle, mixed_cases(settings["block_length"], seed=21), settings)


@pytest.mark.always
def test_a_sequence_may_grow(served: Any, oracle: Any) -> None:
    llm, settings = served
    check_growing(llm, oracle, mixed_cases(settings["block_length"], seed=22), settings)


@pytest.mark.always
def test_rows_are_reduced_from_the_heads_weight(served: Any) -> None:
    """The same tokens come from whole logits, which any other head gives; only time and memory would tell."""
    runner = served[0].llm_engine.model_executor.driver_worker.worker.model_runner
    assert isinstance(runner.model_state.denoiser.head.own, WeightHead)


@pytest.mark.always
def test_nfe_equals_reference(served: Any, oracle: Any) -> None:
    llm, settings = served
    cases = mixed_cases(settings["block_length"], seed=99)
    took = [output.kv_transfer_params["dllm"] for output in run_outputs(llm, cases)]
    expected = [oracle.generation(case, settings) for case in cases]
    assert [n["nfe"] for n in took] == [generation.nfe for generation in expected]
    if settings.get("kv_policy") != "prefix":  # whose suffix forwards the reference counts apart from refreshes
        assert [n["nfe_refresh"] for n in took] == [generation.nfe_refresh for generation in expected]
    assert {(n["exactness"], n["proposed"], n["accepted"]) for n in took} == {(None, 0, 0)}


@pytest.mark.always
def test_preemption_restarts_the_block_alone(served: Any, oracle: Any) -> None:
    llm, settings = served
    cases = mixed_cases(settings["block_length"], seed=6)[:8]
    preempted = []

    def preempt(number: int, llm: Any) -> None:
        # A block of one token per step takes block_length steps, and must end some time.
        if number % (settings["block_length"] + 2) == 2:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            preempted.append(len(scheduler.running))
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    tokens = step_all(llm, cases, preempt)
    assert sum(preempted) > len(cases), "too few were preempted"
    assert tokens == {str(i): oracle.tokens(case, settings) for i, case in enumerate(cases)}


@pytest.mark.always
def test_counts_of_runner_and_scheduler_agree(served: Any) -> None:
    llm, settings = served
    check_counts_while_running(llm, mixed_cases(settings["block_length"], seed=5))


@pytest.mark.always
def test_the_cache_is_given_back(served: Any) -> None:
    llm, settings = served
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    before = pool.get_num_free_blocks()
    run(llm, [Case(prompt=(5, 6, 7), max_tokens=settings["block_length"])] * 20)
    assert pool.get_num_free_blocks() == before
