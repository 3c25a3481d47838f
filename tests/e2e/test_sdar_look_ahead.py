"""Drafts across the end of SDAR's blocks change forwards and no token: engine with == without == reference, in fp32.

`test_sdar_spiffy` runs budgets that look ahead, too; here the model is one whose blocks often end as foreseen, and yet
whose logits tell wrong K/V from right ones.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.ended import check_ended, ending
from tests.e2e.logprobs import check_logprobs, run_asking
from tests.e2e.rig import Case, engine, model_state, random_graph, run_outputs, shared_engine, speculation, step_all
from tests.e2e.sdar import SdarOracle, make_wild_sdar, sdar_cases
from tests.e2e.test_sdar_cache import run_one_late
from tests.suite.order import configurations
from vllm_dllm.denoiser import Denoiser

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

MAX_MODEL_LEN = 256
BUDGET = 6
LONG = tuple(5 + (7 * i) % 90 for i in range(70))


@pytest.fixture(scope="session")
def moody(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a random model that can be foreseen a little, and sees what is stored."""
    path = tmp_path_factory.mktemp("moody_sdar") / "checkpoint"
    make_wild_sdar(path, mixing=0.15)
    return path


@pytest.fixture(scope="session")
def oracle(moody: Path) -> SdarOracle:
    return SdarOracle(moody, MAX_MODEL_LEN)


@pytest.fixture(params=configurations("sdar look-ahead", [4], slow=[8]))
def served(request: pytest.FixtureRequest, moody: Path) -> Any:
    graph = random_graph(request.param, 12, request.param, 1 if request.param == 4 else None)
    settings = {"block_length": request.param}
    config = speculation(graph, BUDGET)
    return shared_engine(moody, settings, speculative_config=config, max_model_len=MAX_MODEL_LEN), settings, graph


@pytest.fixture
def came_over(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What each forward's look-aheads came to."""
    seen: list[torch.Tensor] = []
    advance = Denoiser.advance

    def watched(*args: Any) -> Any:
        done = advance(*args)
        seen.append(done.came_over)
        return done

    monkeypatch.setattr(Denoiser, "advance", watched)
    return seen


def count(came_over: list[torch.Tensor]) -> int:
    return sum(int(requests.sum()) for requests in came_over)


def test_look_aheads_come_true_in_a_mixed_batch(served: Any, oracle: SdarOracle, came_over: list[torch.Tensor]) -> None:
    llm, settings, graph = served
    cases = sdar_cases(settings["block_length"], seed=1)
    outputs = run_asking(llm, cases)
    assert [list(o.outputs[0].token_ids) for o in outputs] == [oracle.tokens(case, settings) for case in cases]
    check_logprobs(outputs, [oracle.generation(case, settings).log_probs for case in cases])
    expected = [oracle.speculative(case, settings, graph, BUDGET) for case in cases]
    took = [o.kv_transfer_params["dllm"] for o in outputs]
    assert [(n["nfe"], n["accepted"], n["proposed"]) for n in took] == [
        (e.nfe, e.num_accepted, e.num_proposed) for e in expected
    ]
    assert count(came_over) >= 8, "too few blocks ended as foreseen for the test to mean much"


def test_an_answer_ends_before_its_block(served: Any, oracle: SdarOracle) -> None:
    llm, settings, graph = served
    cases = sdar_cases(settings["block_length"], seed=21)
    check_ended(llm, oracle, cases, settings)
    cases = ending(oracle, cases, settings, seed=3)
    took = [output.kv_transfer_params["dllm"] for output in run_outputs(llm, cases)]
    expected = [oracle.speculative(case, settings, graph, BUDGET) for case in cases]
    assert [(n["nfe"], n["accepted"]) for n in took] == [(e.nfe, e.num_accepted) for e in expected]


def test_pages_that_look_aheads_stored_are_found_by_others(
    served: Any, oracle: SdarOracle, came_over: list[torch.Tensor]
) -> None:
    """A second request begins after each number of steps: what it finds are the first one's true blocks alone."""
    llm, settings, _ = served
    first = Case(prompt=LONG[:21], max_tokens=60, temperature=0.7, seed=5)
    answer = tuple(oracle.tokens(first, settings))
    second = Case(prompt=first.prompt + answer, max_tokens=9)
    expected = [list(answer), oracle.tokens(second, settings)]
    cached = []
    for delay in (3, 7, 11, 15, 19, 23, 80):
        assert llm.llm_engine.reset_prefix_cache()
        outputs = run_one_late(llm, [first, second], delay)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
        cached.append(outputs[1].num_cached_tokens)
    assert cached == sorted(cached)
    assert len(set(cached)) >= 3, "the second request always finds the same"
    assert cached[-1] == 80, "81 positions are known, and the block before the last one is stored"
    assert count(came_over) >= 8


def test_preemption_at_random_steps(served: Any, oracle: SdarOracle, came_over: list[torch.Tensor]) -> None:
    llm, settings, _ = served
    rng = random.Random(1)
    cases = sdar_cases(settings["block_length"], seed=9)[:9]

    def interfere(_number: int, llm: Any) -> None:
        if rng.random() < 0.15:
            assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)

    tokens = step_all(llm, cases, interfere)
    assert tokens == {str(i): oracle.tokens(case, settings) for i, case in enumerate(cases)}
    assert count(came_over) > 0


def test_more_requests_than_pages(moody: Path, oracle: SdarOracle, came_over: list[torch.Tensor]) -> None:
    settings, cases = {"block_length": 4}, sdar_cases(4, seed=7)
    options = {"speculative_config": speculation(random_graph(4, 12, 4), BUDGET), "max_model_len": MAX_MODEL_LEN}
    with engine(moody, settings, num_gpu_blocks_override=18, **options) as llm:
        outputs = run_outputs(llm, cases)
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert not scheduler.rows.known
        assert model_state(llm)._look_ahead_from is not None
    assert [list(o.outputs[0].token_ids) for o in outputs] == [oracle.tokens(case, settings) for case in cases]
    assert count(came_over) > 0
