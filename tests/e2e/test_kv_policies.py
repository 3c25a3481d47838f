"""FreeCache, dKV-Cache and dInfer's vicinity refresh through the engine equal the reference, in fp32."""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.dream import PUBLISHED, dream_oracle
from tests.e2e.interference import check_interference
from tests.e2e.rig import (
    LLADA_POLICIES,
    Case,
    Oracle,
    check_counts_while_running,
    mixed_cases,
    random_graph,
    run_outputs,
    shared_engine,
    speculation,
)
from tests.suite.order import configurations

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

FREECACHE = {"block_length": 8, "kv_policy": "freecache"}
VICINITY = {"block_length": 8, "kv_policy": "vicinity", "prefix_look": 5, "after_look": 11, "warmup_steps": 2}
DKV = {"block_length": 8, "kv_policy": "dkv", "refresh_every": 5}
USUAL = [("llada", VICINITY), ("dream", FREECACHE)]
DKV_PD = DKV | {"kv_policy": "dkv_pd"}
DELAYED = [("dream", DKV)]
SLOW_DELAYED = [
    ("llada", DKV),
    ("llada", {"block_length": 32, "kv_policy": "dkv"}),
    ("llada", DKV_PD),
    ("dream", DKV_PD),
]
SLOW = [("llada", FREECACHE), ("dream", VICINITY), ("llada", {"block_length": 32, "kv_policy": "vicinity"})]
BUDGET = 3


@pytest.fixture(params=configurations("kv policies", USUAL, slow=SLOW))
def served(request: pytest.FixtureRequest, mild: Path, mild_dream: Path) -> tuple[Any, str, dict[str, Any]]:
    family, settings = request.param
    config = speculation(graph(settings), BUDGET)
    options = {"max_model_len": 1024, "max_num_batched_tokens": 8192}
    checkpoint = {"llada": mild, "dream": mild_dream}[family]
    return shared_engine(checkpoint, settings, speculative_config=config, **options), family, settings


@pytest.fixture(scope="session")
def dreams(mild_dream: Path) -> Oracle:
    return dream_oracle(mild_dream)


@pytest.fixture
def oracle_of(served: Any, mild_oracle: Oracle, dreams: Oracle) -> Oracle:
    return {"llada": mild_oracle, "dream": dreams}[served[1]]


def graph(settings: dict[str, Any]) -> Any:
    return random_graph(12, 12, settings["block_length"])


def cases_of(family: str, settings: dict[str, Any], seed: int) -> list[Case]:
    policies = {"llada": LLADA_POLICIES, "dream": PUBLISHED}[family]
    return mixed_cases(settings["block_length"], seed=seed, policies=policies)


def steady(cases: list[Case]) -> list[Case]:
    """Return those, twice, whose first block takes as many steps as it has positions."""
    policies = {"static", "random", "margin", "entropy"}
    return [case for case in cases if case.policy in policies and case.steps is None] * 2


def check(outputs: list[Any], cases: list[Case], oracle: Oracle, settings: dict[str, Any]) -> None:
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens == [oracle.tokens(case, settings) for case in cases]
    assert len({token for row in tokens for token in row}) > 50, "the model says too little for equality to mean much"


@pytest.mark.always
def test_drafts_change_forwards_and_no_token(served: Any, oracle_of: Oracle) -> None:
    llm, family, settings = served
    cases = cases_of(family, settings, seed=4)
    outputs = run_outputs(llm, cases)
    check(outputs, cases, oracle_of, settings)
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    assert {numbers["exactness"] for numbers in took} == {"exact"}
    expected = [oracle_of.speculative(case, settings, graph(settings), BUDGET) for case in cases]
    assert [(n["nfe"], n["nfe_refresh"], n["accepted"], n["proposed"]) for n in took] == [
        (e.nfe, e.nfe_refresh, e.num_accepted, e.num_proposed) for e in expected
    ]
    assert sum(e.num_accepted for e in expected) >= 8, "too few drafts come true for the test to mean much"


def test_without_drafts_each_forward_is_the_references(served: Any, oracle_of: Oracle) -> None:
    llm, family, settings = served
    cases = cases_of(family, settings, seed=5)
    extra = [{"extra_args": case.sampling_params().extra_args | {"dllm_speculation": False}} for case in cases]
    params = [case.sampling_params(**changes) for case, changes in zip(cases, extra, strict=True)]
    outputs = llm.generate([{"prompt_token_ids": list(case.prompt)} for case in cases], params, use_tqdm=False)
    check(outputs, cases, oracle_of, settings)
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    expected = [oracle_of.generation(case, settings) for case in cases]
    assert [(n["nfe"], n["nfe_refresh"], n["proposed"]) for n in took] == [(e.nfe, e.nfe_refresh, 0) for e in expected]


def test_preemption_and_aborts_leave_the_others_alone(served: Any, oracle_of: Oracle) -> None:
    """What FreeCache kept is lost with the pages, as `rows.admit` says: a request's first block alone is sure."""
    llm, family, settings = served
    cases, every = cases_of(family, settings, seed=6)[:8], settings["block_length"] + 3
    if settings["kv_policy"] == "freecache":
        cases, every = steady(cases), 1000
    check_interference(llm, cases, lambda case: oracle_of.tokens(case, settings), lambda n: n % every in {1, 2})


def test_counts_of_runner_and_scheduler_agree(served: Any) -> None:
    llm, family, settings = served
    check_counts_while_running(llm, cases_of(family, settings, seed=5))


@pytest.fixture(params=configurations("dkv", DELAYED, slow=SLOW_DELAYED))
def delayed(
    request: pytest.FixtureRequest, wild: Path, mild_dream: Path, oracle: Oracle, dreams: Oracle
) -> tuple[Any, Oracle, str, dict[str, Any]]:
    family, settings = request.param
    checkpoint, its = {"llada": (wild, oracle), "dream": (mild_dream, dreams)}[family]
    return shared_engine(checkpoint, settings), its, family, settings


@pytest.mark.always
def test_what_is_delayed_equals_the_reference(delayed: Any) -> None:
    llm, its, family, settings = delayed
    cases = cases_of(family, settings, seed=7)
    outputs = run_outputs(llm, cases)
    check(outputs, cases, its, settings)
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    expected = [its.generation(case, settings) for case in cases]
    assert [(n["nfe"], n["nfe_refresh"]) for n in took] == [(e.nfe, e.nfe_refresh) for e in expected]
    dual = {"block_length": settings["block_length"], "refresh_every": settings.get("refresh_every", 8)}
    assert any(its.tokens(case, settings) != its.tokens(case, dual) for case in cases), "as if nothing were delayed"


def test_preemption_and_aborts_leave_what_is_delayed_alone(delayed: Any) -> None:
    llm, its, family, settings = delayed
    cases, every = cases_of(family, settings, seed=6)[:8], settings["block_length"] + 5
    times = {number for number in range(200) if number % every == 4}
    if settings["kv_policy"] == "dkv_pd":  # as of FreeCache
        cases, times = steady(cases), {1, 2, 5}
    check_interference(llm, cases, lambda case: its.tokens(case, settings), lambda number: number in times)
    check_counts_while_running(llm, cases)
