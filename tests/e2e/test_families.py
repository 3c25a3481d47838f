"""SDAR-MoE, Stable-DiffCoder and LLaDA-MoE in the engine == their reference, token for token, in fp32, with drafts.

What their loops share with SDAR's and LLaDA's is tested there; here is what layers, experts and recognition may break.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.families import LLADA_MOE, SDAR_MOE, STABLE_DIFFCODER_8B, make_random, oracle_of
from tests.e2e.rig import (
    LLADA_POLICIES,
    Case,
    Oracle,
    engine,
    mixed_cases,
    random_graph,
    run,
    run_outputs,
    shared_engine,
    speculation,
)
from tests.e2e.sdar import check_preemption_and_aborts, sdar_cases
from tests.suite.order import configurations

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

BLOCK, BUDGET, PAGE = 4, 3, 16
GRAPH = random_graph(8, 8, BLOCK)
CONFIGS = {"sdar-moe": SDAR_MOE, "stable-diffcoder": STABLE_DIFFCODER_8B, "llada-moe": LLADA_MOE}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each, which can be foreseen a little."""
    folder = tmp_path_factory.mktemp("families")
    return {name: make_random(folder / name, config, mixing=0.2) for name, config in CONFIGS.items()}


@pytest.fixture(scope="session")
def oracles(checkpoints: dict[str, Path]) -> dict[str, Oracle]:
    """The reference decoder on each."""
    return {name: oracle_of(path, CONFIGS[name]) for name, path in checkpoints.items()}


def check_outputs(outputs: list[Any], oracle: Oracle, cases: list[Case], settings: dict[str, Any]) -> None:
    """Compare tokens with those without drafts, and numbers of forwards and drafts with those with them."""
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens == [oracle.tokens(case, settings) for case in cases]
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    expected = [oracle.speculative(case, settings, GRAPH, BUDGET) for case in cases]
    assert [(n["exactness"], n["nfe"], n["accepted"], n["proposed"]) for n in took] == [
        ("exact", e.nfe, e.num_accepted, e.num_proposed) for e in expected
    ]
    assert sum(e.num_accepted for e in expected) >= 4, "too few drafts come true for the test to mean much"


@pytest.fixture(params=configurations("families", ["sdar-moe", "stable-diffcoder"]))
def served(request: pytest.FixtureRequest, checkpoints: dict[str, Path], oracles: dict[str, Oracle]) -> Any:
    """A block-causal family, served with what its checkpoint and its row of the table say."""
    checkpoint = checkpoints[request.param]
    llm = shared_engine(checkpoint, {}, speculative_config=speculation(GRAPH, BUDGET), block_size=PAGE)
    return request.param, llm, oracles[request.param]


@pytest.mark.always
def test_mixed_batch_equals_reference(served: Any) -> None:
    _, llm, oracle = served
    cases = sdar_cases(BLOCK, seed=11)
    outputs = run_outputs(llm, cases)
    check_outputs(outputs, oracle, cases, {"block_length": BLOCK})
    assert len({token for output in outputs for token in output.outputs[0].token_ids}) > 50


def test_the_family_says_the_settings(served: Any) -> None:
    name, llm, oracle = served
    published: dict[str, Any] = {"policy": "dynamic", "threshold": 0.85} if name == "sdar-moe" else {}
    case = Case(prompt=tuple(range(5, 18)), max_tokens=30, **published)
    temperature = llm.get_default_sampling_params().temperature
    assert temperature == (1.0 if name == "sdar-moe" else 0.0)
    [output] = llm.generate(
        [{"prompt_token_ids": list(case.prompt)}], case.sampling_params(extra_args={}), use_tqdm=False
    )
    assert list(output.outputs[0].token_ids) == oracle.tokens(case, {"block_length": BLOCK})


def test_a_request_alone_is_routed_as_in_any_batch(served: Any) -> None:
    _, llm, oracle = served
    cases = sdar_cases(BLOCK, seed=12)[:4]
    expected = [oracle.tokens(case, {"block_length": BLOCK}) for case in cases]
    assert [run(llm, [case])[0] for case in cases] == expected
    assert run(llm, [*cases, *cases][::-1]) == [*expected, *expected][::-1]


def test_what_the_prefix_cache_has_changes_no_token(served: Any) -> None:
    _, llm, oracle = served
    case = Case(prompt=tuple(5 + (7 * i) % 90 for i in range(45)), max_tokens=21, policy="dynamic", threshold=0.3)
    assert llm.llm_engine.reset_prefix_cache()
    outputs = [run_outputs(llm, [case])[0] for _ in range(2)]
    assert [list(o.outputs[0].token_ids) for o in outputs] == [oracle.tokens(case, {"block_length": BLOCK})] * 2
    assert [output.num_cached_tokens for output in outputs] == [0, 44 // PAGE * PAGE]


def test_preemption_and_aborts_leave_the_others_alone(served: Any) -> None:
    _, llm, oracle = served
    check_preemption_and_aborts(llm, oracle, {"block_length": BLOCK}, every=6)


@pytest.mark.slow("ranks")
@pytest.mark.xdist_group("both cores")
def test_two_ranks_with_half_of_the_experts_each_equal_reference(
    checkpoints: dict[str, Path], oracles: dict[str, Oracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    """LLaDA-MoE in LLaDA's loop, whose `model_type` it has; sixteen requests at once and one alone."""
    settings: dict[str, Any] = {"block_length": BLOCK}
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    cases, oracle = mixed_cases(BLOCK, seed=13, policies=LLADA_POLICIES), oracles["llada-moe"]
    ranks = {"tensor_parallel_size": 2, "enable_expert_parallel": True, "distributed_executor_backend": "mp"}
    drafts = speculation(GRAPH, BUDGET)
    with engine(checkpoints["llada-moe"], settings, speculative_config=drafts, **ranks) as llm:
        check_outputs(run_outputs(llm, cases), oracle, cases, settings)
        assert run(llm, cases[-1:]) == [oracle.tokens(cases[-1], settings)]
