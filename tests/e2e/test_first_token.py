"""Nemotron and Fast-dLLM v2 in the engine == their reference decoders, token for token, in fp32."""

import dataclasses
from typing import Any

import pytest
import torch

from tests.e2e.ahead import scheduled_ahead
from tests.e2e.constrained import check_beside_edited
from tests.e2e.ended import check_ended, check_forwards
from tests.e2e.first_token import FirstTokenOracle, make_wild
from tests.e2e.interference import check_interference
from tests.e2e.logprobs import check_logprobs, run_asking
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
from tests.e2e.test_graphs import EagerGraphs
from tests.suite.order import configurations
from vllm_dllm.reference.block_causal import generate_causally

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]

BUDGET = 6
USUAL = [("nemotron", BUDGET), ("fast_dllm", BUDGET)]
SLOW = [("nemotron", None), ("fast_dllm", None)]
"""Family, and drafts of a step."""


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FirstTokenOracle]:
    """The reference decoders, and the checkpoints: of models that can be foreseen a little."""
    made = {}
    for family in ("nemotron", "fast_dllm"):
        path = tmp_path_factory.mktemp(family) / "checkpoint"
        make_wild(family, path, mixing=0.3)
        made[family] = FirstTokenOracle(path, family)
    return made


@pytest.fixture(params=configurations("first token", USUAL, slow=SLOW))
def served(request: pytest.FixtureRequest, oracles: dict[str, FirstTokenOracle]) -> Any:
    family, budget = request.param
    oracle = oracles[family]
    graph = random_graph(3, 12, oracle.model.config.block_size)
    changes = {} if budget is None else {"speculative_config": speculation(graph, budget)}
    return shared_engine(oracle.checkpoint, {}, **changes), oracle, budget


@pytest.mark.always
def test_mixed_batch_equals_reference(served: Any) -> None:
    llm, oracle, budget = served
    cases = oracle.cases(seed=1)
    outputs = run_asking(llm, cases)
    check_logprobs(outputs, [oracle.generation(case, {}).log_probs for case in cases])
    assert [list(o.outputs[0].token_ids) for o in outputs] == [oracle.tokens(case, {}) for case in cases]
    assert len({token for o in outputs for token in o.outputs[0].token_ids}) > 50, "equality says little of such tokens"
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    check_forwards(oracle, cases, {}, took)
    assert budget is None or sum(numbers["accepted"] for numbers in took) >= 8, "too few drafts come true"


def test_an_answer_ends_before_its_block(served: Any) -> None:
    llm, oracle, _ = served
    check_ended(llm, oracle, oracle.cases(seed=21), {})


def test_order_and_neighbours_do_not_matter(served: Any) -> None:
    llm, oracle, _ = served
    cases = oracle.cases(seed=4)[:5]
    expected = [oracle.tokens(case, {}) for case in cases]
    assert run(llm, cases[::-1])[::-1] == expected
    assert [run(llm, [case])[0] for case in cases[:2]] == expected[:2]


def test_preemption_and_aborts_leave_the_others_alone(served: Any) -> None:
    llm, oracle, _ = served
    cases, every = oracle.cases(seed=6)[:8], oracle.model.config.block_size + 5
    check_interference(llm, cases, lambda case: oracle.tokens(case, {}), lambda number: number % every == 5)


def test_constraints_and_edits_beside_free_requests(served: Any) -> None:
    """A block's first position is decided under the constraint, too, in a step of its own."""
    llm, oracle, _ = served
    check_beside_edited(llm, oracle, {}, oracle.cases(seed=9), seed=4)


def test_counts_of_runner_and_scheduler_agree(served: Any) -> None:
    llm, oracle, _ = served
    check_counts_while_running(llm, oracle.cases(seed=5))


@pytest.mark.parametrize("more", [0, 1, 5])
def test_generation_ends_with_the_blocks_that_fit(served: Any, more: int) -> None:
    llm, oracle, _ = served
    length = oracle.model.config.block_size
    case = Case(prompt=tuple(range(5, 5 + 128 - 3 * length - more)), max_tokens=128, policy="threshold", threshold=0.1)
    [tokens] = run(llm, [case])
    assert tokens == oracle.tokens(case, {})
    assert len(tokens) >= 2 * length


@pytest.mark.parametrize("prompt_len", [15, 17, 33, 48])
def test_a_cached_prompt_gives_the_same_tokens(served: Any, prompt_len: int) -> None:
    """Nemotron's pages are found wherever its blocks begin, what was generated among them."""
    llm, oracle, _ = served
    assert llm.llm_engine.reset_prefix_cache()
    prompt = tuple(5 + (7 * i) % 90 for i in range(prompt_len))
    case = Case(prompt=prompt, max_tokens=40, policy="threshold", threshold=0.3)
    [first] = run_outputs(llm, [case])
    tokens = list(first.outputs[0].token_ids)
    assert (tokens, first.num_cached_tokens) == (oracle.tokens(case, {}), 0)
    longer = dataclasses.replace(case, prompt=prompt + tuple(tokens[:-1]), max_tokens=5)
    for again in (case, longer):
        [output] = run_outputs(llm, [again])
        assert list(output.outputs[0].token_ids) == oracle.tokens(again, {})
        assert output.num_cached_tokens >= (len(prompt) - 1) // 16 * 16
    if oracle.rules.attention == "causal":
        stored = prompt_len + (40 - 1) // 8 * 8  # all blocks but the last
        assert output.num_cached_tokens == min(stored, len(longer.prompt) - 1) // 16 * 16


def test_steps_that_are_scheduled_ahead_and_replayed(oracles: dict[str, FirstTokenOracle]) -> None:
    """Causal commits in a captured shape, short blocks out of it, and the host a step behind."""
    oracle = oracles["nemotron"]
    graph = speculation(random_graph(3, 12, oracle.model.config.block_size), 3)
    with scheduled_ahead(), engine(oracle.checkpoint, {}, speculative_config=graph, async_scheduling=True) as llm:
        assert llm.llm_engine.vllm_config.max_concurrent_batches == 2
        graphs = EagerGraphs(llm, [1, 3, 7, 12, 24, 48, 80], is_mixed=True)
        cases = oracle.cases(seed=3)
        # Row and reply end within the first block's length: a step is under way behind its only block.
        cases.insert(1, dataclasses.replace(cases[0], prompt=cases[0].prompt[:3], max_tokens=5))
        assert run(llm, cases) == [oracle.tokens(case, {}) for case in cases]
        assert graphs.num_replays >= 8  # where no block may be short


def test_ar_mode_is_vllms_own(oracles: dict[str, FirstTokenOracle]) -> None:
    """The same weights, autoregressively: the tokens of the reference, with and without cached prompts."""
    oracle = oracles["nemotron"]
    llm = shared_engine(oracle.checkpoint, {"mode": "ar"}, enforce_eager=True, block_size=32)
    config = llm.llm_engine.vllm_config
    assert config.model_config.architectures == ["NemotronLabsDiffusionForCausalLM"]
    assert not config.scheduler_config.scheduler_cls
    from vllm import SamplingParams

    prompts = [case.prompt for case in oracle.cases(seed=2)]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    expected = [generate_causally(oracle.model, torch.tensor(prompt), 24).tolist() for prompt in prompts]
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    for _ in range(2):
        outputs = llm.generate(given, params, use_tqdm=False)
        assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert sum(output.num_cached_tokens for output in outputs) > 0
