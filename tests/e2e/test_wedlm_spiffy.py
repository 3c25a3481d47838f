"""WeDLM with drafts in the engine == its decoder, token for token, in as many forwards as the reference with drafts."""

import dataclasses
from typing import Any

import pytest

from tests.e2e.interference import check_interference
from tests.e2e.rig import MAX_MODEL_LEN, check_counts_while_running, engine, run, run_outputs, shared_engine
from tests.e2e.wedlm import SlidingOracle, WindowCase, make_wild, mixed
from vllm_dllm.draft.budget import CostCurve
from vllm_dllm.reference.wedlm_spiffy import SpiffySliding

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines"), pytest.mark.xdist_group("wedlm_spiffy")]

NUM_DRAFTS = 5
SPIFFY = {"method": "spiffy", "budget": NUM_DRAFTS}
FREE = CostCurve(((1, 1.0), (1 << 20, 1.001)))
"""Of a machine that takes drafts for nothing; on this one it depends on what else runs whether one pays."""

Served = tuple[Any, SlidingOracle]


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> SlidingOracle:
    path = tmp_path_factory.mktemp("drafted") / "checkpoint"
    make_wild(path, has_biases=False)
    return SlidingOracle(path)


@pytest.fixture
def served(oracle: SlidingOracle) -> Served:
    return shared_engine(oracle.checkpoint, {}, speculative_config=SPIFFY), oracle


def greedy(cases: list[WindowCase]) -> list[WindowCase]:
    return [dataclasses.replace(case, temperature=0.0) for case in cases]


def told(outputs: list[Any], name: str) -> list[int]:
    return [output.kv_transfer_params["dllm"][name] for output in outputs]


def check_forwards(llm: Any, oracle: SlidingOracle, cases: list[WindowCase]) -> list[SpiffySliding]:
    """Run cases at temperature 0; returns what the reference made of them."""
    outputs = run_outputs(llm, cases)
    made = [oracle.drafted(case, NUM_DRAFTS) for case in cases]
    assert [list(output.outputs[0].token_ids) for output in outputs] == [oracle.tokens(case) for case in cases]
    assert [each.tokens.tolist() for each in made] == [oracle.tokens(case) for case in cases]
    assert [told(outputs, name) for name in ("nfe", "accepted")] == counts(made)
    return made


def counts(made: list[SpiffySliding]) -> list[list[int]]:
    return [[each.nfe for each in made], [each.num_accepted for each in made]]


@pytest.mark.always
def test_a_mixed_batch_takes_the_forwards_of_the_reference(served: Served) -> None:
    llm, oracle = served
    cases = greedy(mixed(seed=1))
    made = check_forwards(llm, oracle, cases)
    plain = sum(oracle.made(case).nfe for case in cases)
    assert sum(each.nfe for each in made) < 0.9 * plain, "hardly a draft came true"
    assert {output.kv_transfer_params["dllm"]["exactness"] for output in run_outputs(llm, cases[:2])} == {"exact"}


def test_sampled_replies_are_those_without_drafts(served: Served) -> None:
    """And drafts come true, since they are drawn as the decoder will."""
    llm, oracle = served
    cases = [dataclasses.replace(case, temperature=1.2, max_tokens=40) for case in mixed(seed=3)]
    outputs = run_outputs(llm, cases)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [oracle.tokens(case) for case in cases]
    assert sum(told(outputs, "accepted")) >= 5
    plain = [oracle.made(case).nfe for case in cases]
    assert all(nfe <= most for nfe, most in zip(told(outputs, "nfe"), plain, strict=True))
    assert sum(told(outputs, "nfe")) < sum(plain)


def test_neighbours_do_not_matter_and_any_may_go_without(served: Served) -> None:
    """Beside requests with drafts there are some without, and with fewer."""
    llm, oracle = served
    cases = [dataclasses.replace(case, max_tokens=33) for case in mixed(seed=4, num=7)]
    options = [{}, {"dllm_speculation": False}, {"dllm_budget": 1}]
    params = [
        case.sampling_params(extra_args=case.sampling_params().extra_args | options[i % 3])
        for i, case in enumerate(cases)
    ]
    prompts = [{"prompt_token_ids": list(case.prompt)} for case in cases]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [oracle.tokens(case) for case in cases]
    assert set(told(outputs[1::3], "proposed")) == {0}
    assert told(outputs[1::3], "nfe") == [oracle.made(case).nfe for case in cases[1::3]]
    assert sum(told(outputs[2::3], "proposed")) > 0
    for i in (0, 2):
        [alone] = llm.generate(prompts[i], params[i], use_tqdm=False)
        assert alone.kv_transfer_params == outputs[i].kv_transfer_params


@pytest.mark.parametrize("prompt_len", [MAX_MODEL_LEN - 1, MAX_MODEL_LEN - 9, MAX_MODEL_LEN - 40])
def test_a_reply_may_fill_the_model_length(served: Served, prompt_len: int) -> None:
    llm, oracle = served
    prompt = tuple(5 + (7 * i) % 90 for i in range(prompt_len))
    bounds = (1e-9, 0.4, 3.0)
    cases = [WindowCase(prompt=prompt, max_tokens=MAX_MODEL_LEN, entropy_bound=bound) for bound in bounds]
    made = check_forwards(llm, oracle, cases)
    assert {len(each.tokens) for each in made} == {MAX_MODEL_LEN - prompt_len}


def test_a_stop_token_ends_the_reply(served: Served) -> None:
    llm, oracle = served
    cases = greedy([dataclasses.replace(case, max_tokens=40) for case in mixed(seed=8, num=6)])
    replies = [oracle.tokens(case) for case in cases]
    stops = [reply[len(reply) // 2] for reply in replies]
    params = [case.sampling_params(stop_token_ids=[stop]) for case, stop in zip(cases, stops, strict=True)]
    outputs = llm.generate([{"prompt_token_ids": list(c.prompt)} for c in cases], params, use_tqdm=False)
    found = [list(output.outputs[0].token_ids) for output in outputs]
    assert found == [reply[: reply.index(stop) + 1] for reply, stop in zip(replies, stops, strict=True)]
    made = [oracle.drafted(case, NUM_DRAFTS, (stop,)) for case, stop in zip(cases, stops, strict=True)]
    assert [told(outputs, name) for name in ("nfe", "accepted")] == counts(made)


@pytest.mark.always
def test_preemption_and_aborts_leave_the_others_alone(served: Served) -> None:
    llm, oracle = served
    cases = [dataclasses.replace(case, max_tokens=50) for case in mixed(seed=6, num=8)]
    check_interference(llm, cases, oracle.tokens, lambda number: number in (3, 5, 7))
    check_counts_while_running(llm, mixed(seed=5))


@pytest.mark.parametrize("prompt_len", [15, 17, 48])
def test_a_cached_prompt_gives_the_same_tokens(served: Served, prompt_len: int) -> None:
    llm, oracle = served
    assert llm.llm_engine.reset_prefix_cache()
    prompt = tuple(5 + (7 * i) % 90 for i in range(prompt_len))
    case = WindowCase(prompt=prompt, max_tokens=40, entropy_bound=1.5)
    check_forwards(llm, oracle, [case])
    longer = dataclasses.replace(case, prompt=case.prompt + tuple(oracle.tokens(case)[:-1]), max_tokens=9)
    for again in (case, longer):
        [output] = run_outputs(llm, [again])
        assert list(output.outputs[0].token_ids) == oracle.tokens(again)
        assert told([output], "nfe") == [oracle.drafted(again, NUM_DRAFTS).nfe]
        assert output.num_cached_tokens >= (prompt_len - 1) // 16 * 16
    assert output.num_cached_tokens > prompt_len, "nothing that was generated is cached"


def test_a_budget_by_the_step_changes_no_token(oracle: SlidingOracle) -> None:
    """With few pages besides, for which requests are preempted, and few rows, so that drafts are cut."""
    cases = [dataclasses.replace(case, max_tokens=61) for case in mixed(seed=2)]
    changes = {"speculative_config": {"method": "spiffy", "max_nodes": 15}, "num_gpu_blocks_override": 16}
    with engine(oracle.checkpoint, {}, **changes) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        budgets, choose = set(), scheduler.rule.choose

        def note(*given: Any) -> int:
            scheduler.rule.curve = FREE
            budget: int = choose(*given)
            budgets.add(budget)
            return budget

        scheduler.rule.choose = note
        assert run(llm, cases) == [oracle.tokens(case) for case in cases]
        assert run(llm, cases[:1]) == [oracle.tokens(cases[0])]
        assert len(budgets) > 1, "all steps had one budget"
