"""Drafts of a block-causal model change forwards and no token: engine with drafts == without == reference, in fp32."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.edited import with_edits
from tests.e2e.rig import (
    Case,
    check_counts_while_running,
    engine,
    random_graph,
    run,
    run_outputs,
    shared_engine,
    speculation,
)
from tests.e2e.sdar import SdarOracle, check_preemption_and_aborts, sdar_cases
from tests.e2e.triton_arguments import check_arguments
from tests.suite.order import configurations

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

MAX_MODEL_LEN = 256
ALWAYS = [(8, 12, 5, 1, "csrc")]
USUAL = [(4, 8, 1, None, "csrc"), (16, 12, 6, None, "torch")]
SLOW = [(8, 12, "auto", 2, "csrc"), (16, 12, 6, None, "csrc")]
"""Block length, nodes, budget, tokens per step, attention. A budget of 1 makes drafts and commits look alike to vLLM;
with 5 and more, blocks of 4 and 8 look ahead."""


@pytest.fixture(params=configurations("sdar spiffy", ALWAYS, USUAL, SLOW))
def served(request: pytest.FixtureRequest, mild_sdar: Path) -> Any:
    block_length, num_nodes, budget, tokens_per_step, attention = request.param
    graph = random_graph(num_nodes, num_nodes, block_length, tokens_per_step)
    settings = {"block_length": block_length, "attention": attention}
    config = speculation(graph, budget)
    llm = shared_engine(mild_sdar, settings, speculative_config=config, max_model_len=MAX_MODEL_LEN)
    return llm, settings, graph, budget


@pytest.fixture(scope="session")
def oracle(mild_sdar: Path) -> SdarOracle:
    return SdarOracle(mild_sdar, MAX_MODEL_LEN)


@pytest.mark.always
def test_mixed_batch_equals_reference(served: Any, oracle: SdarOracle) -> None:
    llm, settings, graph, budget = served
    cases = sdar_cases(settings["block_length"], seed=settings["block_length"])
    outputs = run_outputs(llm, cases)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [
        oracle.tokens(case, settings) for case in cases
    ]
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    assert {numbers["exactness"] for numbers in took} == {"exact"}
    if budget == "auto":
        return
    expected = [oracle.speculative(case, settings, graph, budget) for case in cases]
    assert [(n["nfe"], n["nfe_refresh"], n["accepted"], n["proposed"]) for n in took] == [
        (e.nfe, 0, e.num_accepted, e.num_proposed) for e in expected
    ]
    assert sum(e.num_accepted for e in expected) >= 8, "too few drafts come true for the test to mean much"


def test_edits_of_logits_equal_reference(served: Any, oracle: SdarOracle) -> None:
    llm, settings, _, _ = served
    cases = with_edits(sdar_cases(settings["block_length"], seed=9)[:10], seed=2)
    assert run(llm, cases) == [oracle.tokens(case, settings) for case in cases]


@pytest.mark.always
def test_preemption_and_aborts_leave_the_others_alone(served: Any, oracle: SdarOracle) -> None:
    llm, settings, _, _ = served
    check_preemption_and_aborts(llm, oracle, settings)


def test_counts_of_runner_and_scheduler_agree(served: Any) -> None:
    llm, settings, _, _ = served
    check_counts_while_running(llm, sdar_cases(settings["block_length"], seed=5))


def test_vllms_kernels_get_what_they_rely_on(served: Any) -> None:
    llm, settings, _, _ = served
    check_arguments(lambda: run_outputs(llm, sdar_cases(settings["block_length"], seed=5)[:5]))


def test_near_the_end_of_max_model_len_drafts_are_left_out(served: Any, oracle: SdarOracle) -> None:
    """Rows behind max_model_len would be cut."""
    llm, settings, _, _ = served
    lefts = (2 * settings["block_length"] + 1, 37, 64, 109)
    cases = [
        Case(tuple(range(5, 5 + MAX_MODEL_LEN - left)), max_tokens=left, policy="sequential", temperature=0.7)
        for left in lefts
    ]
    outputs = run_outputs(llm, cases)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [
        oracle.tokens(case, settings) for case in cases
    ]


@pytest.mark.slow("ranks")
@pytest.mark.xdist_group("both cores")
def test_two_ranks_equal_reference(mild_sdar: Path, oracle: SdarOracle, monkeypatch: pytest.MonkeyPatch) -> None:
    settings, graph = {"block_length": 4}, random_graph(4, 6, 4)
    cases = sdar_cases(4, seed=8)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_model_len": MAX_MODEL_LEN}
    with engine(mild_sdar, settings, speculative_config=speculation(graph, 3), **options) as llm:
        outputs = run_outputs(llm, cases)
    expected = [oracle.speculative(case, settings, graph, 3) for case in cases]
    assert [list(o.outputs[0].token_ids) for o in outputs] == [oracle.tokens(case, settings) for case in cases]
    assert [o.kv_transfer_params["dllm"]["accepted"] for o in outputs] == [e.num_accepted for e in expected]
