"""Classifier-free guidance through the engine equals the reference, in fp32, with drafts and without."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.dream import PUBLISHED, dream_oracle
from tests.e2e.interference import check_interference
from tests.e2e.rig import (
    LLADA_POLICIES,
    Case,
    Oracle,
    mixed_cases,
    random_graph,
    run_outputs,
    shared_engine,
    speculation,
)
from tests.suite.order import configurations
from vllm_dllm.state.edits import LogitEdits

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

SETTINGS = {"block_length": 8, "refresh_every": 1, "cfg_scale": 0.75}
BUDGET = 3
GRAPH = random_graph(12, 12, 8)
SCALES = (None, 0.0, 2.5, 0.3)


@pytest.fixture(params=configurations("guidance", ["llada"], slow=["dream"]))
def served(
    request: pytest.FixtureRequest, mild: Path, mild_dream: Path, mild_oracle: Oracle
) -> tuple[Any, Oracle, Any]:
    config = speculation(GRAPH, BUDGET)
    options = {"max_model_len": 1024, "max_num_batched_tokens": 16384, "speculative_config": config}
    if request.param == "llada":
        return shared_engine(mild, SETTINGS, **options), mild_oracle, LLADA_POLICIES
    return shared_engine(mild_dream, SETTINGS, **options), dream_oracle(mild_dream), PUBLISHED


def guided(seed: int, policies: Any) -> list[Case]:
    """Requests of several scales, some of them with edits, which come behind guidance."""
    edits = LogitEdits(bias=((17, 3.0), (40, -2.0)), presence=0.5)
    return [
        dataclasses.replace(case, cfg_scale=SCALES[i % 4], edits=edits if i % 5 == 1 else case.edits)
        for i, case in enumerate(mixed_cases(8, seed=seed, policies=policies))
    ]


def test_guidance_equals_the_reference_with_drafts_and_without(served: Any) -> None:
    llm, oracle, policies = served
    cases = guided(9, policies)
    expected = [oracle.tokens(case, SETTINGS) for case in cases]
    outputs = run_outputs(llm, cases)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    assert {numbers["exactness"] for numbers in took} == {"exact"}
    assert sum(numbers["accepted"] for numbers in took) >= 8, "too few drafts come true for the test to mean much"
    unguided = [oracle.tokens(dataclasses.replace(case, cfg_scale=0.0), SETTINGS) for case in cases]
    assert sum(a != b for a, b in zip(expected, unguided, strict=True)) >= 6, "guidance changes too little"
    params = [case.sampling_params() for case in cases]
    for each in params:
        each.extra_args["dllm_speculation"] = False
    alone = llm.generate([{"prompt_token_ids": list(case.prompt)} for case in cases], params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in alone] == expected
    forwards = [1 if case.cfg_scale == 0 else 2 for case in cases]
    nfe = [output.kv_transfer_params["dllm"]["nfe"] for output in alone]
    assert [n * f for n, f in zip(nfe, forwards, strict=True)] == [oracle.generation(c, SETTINGS).nfe for c in cases]


def test_calls_are_those_of_the_plain_statement(served: Any) -> None:
    llm, oracle, policies = served
    cases = [dataclasses.replace(case, edits=Case.edits) for case in guided(10, policies)][:8]
    took = [output.kv_transfer_params["dllm"] for output in run_outputs(llm, cases)]
    expected = [oracle.speculative(case, SETTINGS, GRAPH, BUDGET) for case in cases]
    assert [(n["nfe"], n["accepted"], n["proposed"]) for n in took] == [
        (e.nfe, e.num_accepted, e.num_proposed) for e in expected
    ]


def test_preemption_and_aborts_leave_the_others_alone(served: Any) -> None:
    llm, oracle, policies = served
    check_interference(llm, guided(6, policies)[:8], lambda case: oracle.tokens(case, SETTINGS), lambda n: n % 12 == 3)
