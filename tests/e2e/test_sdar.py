"""SDAR in the engine == its reference decoder, token for token, in fp32, whatever happens around a request."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.ended import check_ended
from tests.e2e.rig import MAX_MODEL_LEN, Case, check_counts_while_running, run, run_outputs, shared_engine
from tests.e2e.sdar import SdarOracle, check_preemption_and_aborts, sdar_cases
from tests.suite.order import configurations

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines")]


USUAL: list[dict[str, Any]] = [{"block_length": 4}]
SLOW: list[dict[str, Any]] = [{"block_length": 8}, {"block_length": 32}, {"block_length": 32, "attention": "torch"}]


@pytest.fixture(params=configurations("sdar", USUAL, slow=SLOW))
def served(request: pytest.FixtureRequest, wild_sdar: Path, sdar_oracle: SdarOracle) -> Any:
    settings = request.param
    return shared_engine(wild_sdar, settings, block_size=max(settings["block_length"], 16)), settings, sdar_oracle


def test_mixed_batch_equals_reference(served: Any) -> None:
    llm, settings, oracle = served
    cases = sdar_cases(settings["block_length"], seed=settings["block_length"])
    outputs = run_outputs(llm, cases)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    assert tokens == [oracle.tokens(case, settings) for case in cases]
    assert len({token for row in tokens for token in row}) > 50, "the model says too little for equality to mean much"
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    expected = [oracle.generation(case, settings) for case in cases]
    assert [(n["nfe"], n["nfe_refresh"]) for n in took] == [(e.nfe, 0) for e in expected]
    assert {(n["exactness"], n["proposed"], n["accepted"]) for n in took} == {(None, 0, 0)}


def test_an_answer_ends_before_its_block(served: Any) -> None:
    llm, settings, oracle = served
    check_ended(llm, oracle, sdar_cases(settings["block_length"], seed=21), settings)


def test_order_and_neighbours_do_not_matter(served: Any) -> None:
    llm, settings, oracle = served
    cases = sdar_cases(settings["block_length"], seed=4)[:5]
    expected = [oracle.tokens(case, settings) for case in cases]
    assert run(llm, cases[::-1])[::-1] == expected
    assert [run(llm, [case])[0] for case in cases] == expected


def test_preemption_and_aborts_leave_the_others_alone(served: Any) -> None:
    llm, settings, oracle = served
    check_preemption_and_aborts(llm, oracle, settings)


def test_counts_of_runner_and_scheduler_agree(served: Any) -> None:
    llm, settings, _ = served
    check_counts_while_running(llm, sdar_cases(settings["block_length"], seed=5))


@pytest.mark.parametrize("more", [0, 1, 3])
def test_generation_ends_with_the_blocks_that_fit(served: Any, more: int) -> None:
    """Behind the last block there is room for another, which is where vLLM would cut rows."""
    llm, settings, oracle = served
    block_length = settings["block_length"]
    case = Case(prompt=tuple(range(5, 5 + MAX_MODEL_LEN - 3 * block_length - more)), max_tokens=MAX_MODEL_LEN)
    tokens = run(llm, [case])[0]
    assert len(tokens) == 2 * block_length + more
    assert tokens == oracle.tokens(case, settings)


def test_stop_tokens_and_lengths_trim_inside_a_block(served: Any) -> None:
    llm, settings, oracle = served
    case = Case(prompt=(5, 6, 7), max_tokens=24, temperature=1.0, seed=1)
    tokens = oracle.tokens(case, settings)
    stop = tokens[10]
    prompt = [{"prompt_token_ids": list(case.prompt)}]
    output = llm.generate(prompt, case.sampling_params(stop_token_ids=[stop]), use_tqdm=False)[0].outputs[0]
    assert list(output.token_ids) == tokens[: tokens.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_the_mask_token_is_refused_in_a_partial_block_alone(served: Any) -> None:
    llm, settings, oracle = served
    mask, block_length = oracle.model.config.mask_token_id, settings["block_length"]
    case = Case(prompt=(mask, 9) * (block_length // 2) + (7,), max_tokens=9)
    assert run(llm, [case]) == [oracle.tokens(case, settings)]
    with pytest.raises(ValueError, match="the prompt has the mask token 3 at position 1 "):
        run(llm, [Case(prompt=(9, mask), max_tokens=9)])


FEW_PAGES: dict[str, Any] = {"num_gpu_blocks_override": 12}


@pytest.mark.xdist_group("sdar with few pages")
def test_the_checkpoint_says_the_block_length_and_its_family_the_policy(
    wild_sdar: Path, sdar_oracle: SdarOracle
) -> None:
    llm = shared_engine(wild_sdar, {}, **FEW_PAGES)
    case = Case(prompt=tuple(range(5, 18)), max_tokens=30, policy="dynamic", threshold=0.85)
    params = case.sampling_params(extra_args=None)
    outputs = llm.generate([{"prompt_token_ids": list(case.prompt)}], params, use_tqdm=False)
    expected = sdar_oracle.generation(case, {})
    assert list(outputs[0].outputs[0].token_ids) == expected.tokens.tolist()[: case.max_tokens]
    assert outputs[0].kv_transfer_params["dllm"]["nfe"] == expected.nfe


@pytest.mark.xdist_group("sdar with few pages")
def test_more_requests_than_pages(wild_sdar: Path, sdar_oracle: SdarOracle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests take pages as their blocks begin, so that some run out of them and are preempted."""
    cases = [dataclasses.replace(case, max_tokens=30 + i, steps=None) for i, case in enumerate(sdar_cases(4, seed=7))]
    llm = shared_engine(wild_sdar, {}, **FEW_PAGES)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted = []
    original = scheduler._preempt_request
    counting = lambda *args, **kwargs: (preempted.append(1), original(*args, **kwargs))  # noqa: E731
    monkeypatch.setattr(scheduler, "_preempt_request", counting)
    assert run(llm, cases) == [sdar_oracle.tokens(case, {}) for case in cases]
    assert preempted, "nobody ran out of pages"
    num_pages = FEW_PAGES["num_gpu_blocks_override"]
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == num_pages - 1
    assert not scheduler.rows.known


@pytest.mark.xdist_group("sdar with few pages")
def test_evicted_pages_are_stored_again(wild_sdar: Path, sdar_oracle: SdarOracle) -> None:
    llm = shared_engine(wild_sdar, {}, **FEW_PAGES)
    assert llm.llm_engine.reset_prefix_cache()
    cases = [Case(tuple(5 + (7 * (i + j)) % 90 for j in range(40)), max_tokens=20, seed=i) for i in range(6)]

    def found(case: Case) -> int:
        [output] = run_outputs(llm, [case])
        assert list(output.outputs[0].token_ids) == sdar_oracle.tokens(case, {})
        return int(output.num_cached_tokens)

    for _ in range(2):
        assert [found(case) for case in cases] == [0] * 6
    assert found(cases[-1]) == 32
