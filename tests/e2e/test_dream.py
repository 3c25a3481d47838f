"""Dream through the engine equals the reference, in fp32: its policies and ours, its schedule and its logit shift."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.constrained import check_beside_edited
from tests.e2e.dream import OTHERS, PUBLISHED, dream_oracle, make_wild_dream
from tests.e2e.rig import (
    Case,
    Oracle,
    check_counts_while_running,
    engine,
    mixed_cases,
    random_graph,
    run,
    run_outputs,
    shared_engine,
    short,
    speculation,
    step_all,
)
from tests.suite.order import configurations
from vllm_dllm.reference.decode import KvPolicy, generate

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

ALWAYS: list[dict[str, Any]] = [{}]
USUAL: list[dict[str, Any]] = [{"block_length": 8, "kv_policy": "prefix"}]
SLOW: list[dict[str, Any]] = [{"block_length": 8}, *({"block_length": 8, "refresh_every": n} for n in (1, 4))]


@pytest.fixture(scope="session")
def dream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dream") / "checkpoint"
    make_wild_dream(path)
    return path


@pytest.fixture(scope="session")
def oracle(dream: Path) -> Oracle:
    return dream_oracle(dream)


@pytest.fixture(scope="session")
def mild_oracle(mild_dream: Path) -> Oracle:
    return dream_oracle(mild_dream)


@pytest.fixture(params=configurations("dream", ALWAYS, USUAL, SLOW))
def served(request: pytest.FixtureRequest, dream: Path) -> Any:
    return shared_engine(dream, request.param), request.param


def check_cases(llm: Any, oracle: Oracle, cases: list[Case], settings: dict[str, Any]) -> None:
    """Compare tokens and counts of forwards."""
    outputs = run_outputs(llm, cases)
    expected = [oracle.generation(case, settings) for case in cases]
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens == [e.tokens.tolist()[: case.max_tokens] for e, case in zip(expected, cases, strict=True)]
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    assert [n["nfe"] for n in took] == [e.nfe for e in expected]
    assert len({token for row in tokens for token in row}) > 50, "the model says too little for equality to mean much"


@pytest.mark.always
@pytest.mark.parametrize("policies", [PUBLISHED, OTHERS], ids=["published", "others"])
def test_mixed_batch_equals_reference(served: Any, oracle: Oracle, policies: Any) -> None:
    llm, settings = served
    check_cases(llm, oracle, mixed_cases(settings.get("block_length", 32), seed=12, policies=policies), settings)


def test_preemption_restarts_the_block_alone(served: Any, oracle: Oracle) -> None:
    llm, settings = served
    block_length = settings.get("block_length", 32)
    cases = mixed_cases(block_length, seed=6, policies=PUBLISHED)[:8]
    preempted = []

    def preempt(number: int, llm: Any) -> None:
        if number % (block_length + 5) == 5:
            preempted.append(len(llm.llm_engine.engine_core.engine_core.scheduler.running))
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    tokens = step_all(llm, cases, preempt)
    assert sum(preempted) >= len(cases), "too few were preempted"
    assert tokens == {str(i): oracle.tokens(case, settings) for i, case in enumerate(cases)}


def test_constraints_and_edits_beside_free_requests(served: Any, oracle: Oracle) -> None:
    llm, settings = served
    cases = mixed_cases(settings.get("block_length", 32), seed=9, policies=PUBLISHED)
    check_beside_edited(llm, oracle, settings, cases, seed=4)


def test_a_generation_of_one_block_without_cache_is_dreams_own(dream: Path, oracle: Oracle) -> None:
    """`diffusion_generate` knows no blocks."""
    settings = {"block_length": 61, "refresh_every": 1}
    cases = [dataclasses.replace(case, max_tokens=61) for case in mixed_cases(61, seed=3, policies=PUBLISHED[:-1])]
    with engine(dream, settings) as llm:
        tokens = run(llm, cases)
    assert tokens == [
        generate(
            oracle.model,
            torch.tensor(case.prompt),
            **oracle._options(case, settings) | {"gen_length": 61, "block_length": 61, "kv": KvPolicy("none")},
        ).tokens.tolist()
        for case in cases
    ]


@pytest.mark.always
@pytest.mark.xdist_group("dream {}")
def test_what_is_published_is_the_default(dream: Path, oracle: Oracle) -> None:
    llm = shared_engine(dream, {})
    case = Case(prompt=(5, 6, 7), max_tokens=40, policy="entropy", temperature=0.2, top_p=0.95, seed=4)
    default = llm.get_default_sampling_params()
    assert (default.temperature, default.top_p) == (0.2, 0.95)
    params = case.sampling_params(extra_args={})
    [output] = llm.generate([{"prompt_token_ids": list(case.prompt)}], params, use_tqdm=False)
    assert list(output.outputs[0].token_ids) == oracle.tokens(case, {})


@pytest.mark.parametrize(
    ("block_length", "num_nodes", "budget", "per_step"),
    [(8, 12, 5, None), pytest.param(32, 24, 3, 1, marks=pytest.mark.slow("configurations"))],
)
def test_drafts_change_forwards_and_no_token(
    mild_dream: Path, mild_oracle: Oracle, block_length: int, num_nodes: int, budget: int, per_step: int | None
) -> None:
    graph = random_graph(num_nodes, num_nodes, block_length, per_step)
    settings = {"block_length": block_length}
    cases = [case for policies in (PUBLISHED, OTHERS) for case in mixed_cases(block_length, seed=21, policies=policies)]
    options = {"speculative_config": speculation(graph, budget), "max_model_len": 1024}
    with engine(mild_dream, settings, **options) as llm:
        outputs = run_outputs(llm, cases)
        check_counts_while_running(llm, cases[:8])
        constrained = mixed_cases(block_length, seed=9, policies=(*PUBLISHED, *OTHERS))
        check_beside_edited(llm, mild_oracle, settings, constrained, seed=4)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens == [mild_oracle.tokens(case, settings) for case in cases]
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    assert {numbers["exactness"] for numbers in took} == {"exact"}
    expected = [mild_oracle.speculative(case, settings, graph, budget) for case in cases]
    assert [(n["nfe"], n["nfe_refresh"], n["accepted"], n["proposed"]) for n in took] == [
        (e.nfe, e.nfe_refresh, e.num_accepted, e.num_proposed) for e in expected
    ]
    assert sum(e.num_accepted for e in expected) >= 8, "too few drafts come true for the test to mean much"


@pytest.mark.slow("ranks")
@pytest.mark.xdist_group("both cores")
def test_two_ranks_with_drafts_equal_reference(
    mild_dream: Path, mild_oracle: Oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The K/V heads are split, and each rank keeps the left-context hidden rows."""
    settings: dict[str, Any] = {"block_length": 8}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    cases, graph = short(mixed_cases(8, seed=8, policies=PUBLISHED)), random_graph(4, 6, 8)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "max_model_len": 256}
    with engine(mild_dream, settings, speculative_config=speculation(graph, 6), **options) as llm:
        outputs = run_outputs(llm, cases)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [mild_oracle.tokens(case, settings) for case in cases]
    expected = [mild_oracle.speculative(case, settings, graph, 6) for case in cases]
    assert [o.kv_transfer_params["dllm"]["accepted"] for o in outputs] == [e.num_accepted for e in expected]
    assert any(e.num_accepted for e in expected)
