"""Self-speculation in the engine == autoregression, token for token, in fp32, and in as many forwards as published."""

import dataclasses
from typing import Any

import pytest

from tests.e2e.interference import check_interference
from tests.e2e.logprobs import check_logprobs, run_asking
from tests.e2e.rig import MAX_MODEL_LEN, check_counts_while_running, engine, run, run_outputs, shared_engine
from tests.e2e.triton_arguments import check_arguments
from tests.e2e.windows import MODE, Plain, WindowOracle, greedy, make_checkpoint, mixed

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines"), pytest.mark.xdist_group("self speculation")]


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WindowOracle]:
    """By whether the checkpoint has an adapter for drafts."""
    made = {}
    for name in ("adapter", "none"):
        path = tmp_path_factory.mktemp(name) / "checkpoint"
        make_checkpoint(path, has_adapter=name == "adapter")
        made[name] = WindowOracle(path)
    return made


@pytest.fixture
def served(oracles: dict[str, WindowOracle]) -> tuple[Any, WindowOracle]:
    oracle = oracles["adapter"]
    return shared_engine(oracle.checkpoint, MODE), oracle


@pytest.mark.always
def test_mixed_batch_equals_autoregression(served: tuple[Any, WindowOracle]) -> None:
    """In as many forwards as the reference takes alone: windows know nothing of their neighbours."""
    llm, oracle = served
    cases = mixed(seed=1)
    outputs = run_asking(llm, cases)
    check_logprobs(outputs, [oracle.log_probs(case) for case in cases])
    assert [list(output.outputs[0].token_ids) for output in outputs] == [oracle.tokens(case) for case in cases]
    assert len({token for output in outputs for token in output.outputs[0].token_ids}) > 50
    took = [output.kv_transfer_params["dllm"] for output in outputs]
    expected = [oracle.speculative(case) for case in cases]
    assert [numbers["nfe"] for numbers in took] == [made.nfe for made in expected]
    drafted = [(numbers["proposed"], numbers["accepted"]) for numbers in took]
    assert drafted == [tuple(map(sum, zip(*made.windows, strict=True))) or (0, 0) for made in expected]
    assert {numbers["exactness"] for numbers in took} == {"exact"}
    lengths = {num for made in expected for num, _ in made.windows}
    assert {7, 15} < lengths, "too few drafts come true for windows to grow"
    assert max(lengths) > 15, "nor to grow twice"


def test_order_and_neighbours_do_not_matter(served: tuple[Any, WindowOracle]) -> None:
    llm, oracle = served
    cases = mixed(seed=4, num=5)
    expected = [oracle.tokens(case) for case in cases]
    assert run(llm, cases[::-1])[::-1] == expected
    assert [run(llm, [case])[0] for case in cases[:2]] == expected[:2]


def test_preemption_and_aborts_leave_the_others_alone(served: tuple[Any, WindowOracle]) -> None:
    llm, oracle = served
    # Behind a step that verified, and behind one that drafted.
    check_interference(llm, mixed(seed=6, num=8), oracle.tokens, lambda number: number in (4, 9))


def test_counts_of_runner_and_scheduler_agree(served: tuple[Any, WindowOracle]) -> None:
    llm, _ = served
    check_counts_while_running(llm, mixed(seed=5))


def test_vllms_kernels_get_what_they_rely_on(served: tuple[Any, WindowOracle]) -> None:
    llm, _ = served
    check_arguments(lambda: run_outputs(llm, mixed(seed=5, num=5)))


@pytest.mark.parametrize("prompt_len", [MAX_MODEL_LEN - 1, MAX_MODEL_LEN - 9, MAX_MODEL_LEN - 40])
def test_a_reply_may_fill_the_model_length(served: tuple[Any, WindowOracle], prompt_len: int) -> None:
    llm, oracle = served
    case = Plain(prompt=tuple(5 + (7 * i) % 90 for i in range(prompt_len)), max_tokens=MAX_MODEL_LEN)
    [tokens] = run(llm, [case])
    assert (tokens, len(tokens)) == (oracle.tokens(case), MAX_MODEL_LEN - prompt_len)


def test_a_stop_token_inside_a_window_ends_the_reply(served: tuple[Any, WindowOracle]) -> None:
    llm, oracle = served
    cases = [dataclasses.replace(case, max_tokens=40) for case in mixed(seed=8, num=6)]
    replies = [oracle.tokens(case) for case in cases]
    stops = [reply[len(reply) // 2] for reply in replies]
    params = [case.sampling_params(stop_token_ids=[stop]) for case, stop in zip(cases, stops, strict=True)]
    outputs = llm.generate([{"prompt_token_ids": list(c.prompt)} for c in cases], params, use_tqdm=False)
    found = [(list(output.outputs[0].token_ids), output.outputs[0].stop_reason) for output in outputs]
    cut = [(reply[: reply.index(stop) + 1], stop) for reply, stop in zip(replies, stops, strict=True)]
    assert found == cut


@pytest.mark.parametrize("prompt_len", [15, 17, 48])
def test_a_cached_prompt_gives_the_same_tokens(served: tuple[Any, WindowOracle], prompt_len: int) -> None:
    """Pages are found wherever they end; what was generated is stored but for the last window."""
    llm, oracle = served
    assert llm.llm_engine.reset_prefix_cache()
    case = Plain(prompt=tuple(5 + (7 * i) % 90 for i in range(prompt_len)), max_tokens=40, temperature=0.9, seed=3)
    [first] = run_outputs(llm, [case])
    tokens = list(first.outputs[0].token_ids)
    assert (tokens, first.num_cached_tokens) == (oracle.tokens(case), 0)
    longer = dataclasses.replace(case, prompt=case.prompt + tuple(tokens[:-1]), max_tokens=9)
    for again in (case, longer):
        [output] = run_outputs(llm, [again])
        assert list(output.outputs[0].token_ids) == oracle.tokens(again)
        assert output.num_cached_tokens >= (prompt_len - 1) // 16 * 16
    assert output.num_cached_tokens > prompt_len, "nothing that was generated is cached"


def test_few_pages_and_no_adapter(oracles: dict[str, WindowOracle]) -> None:
    """Requests wait for pages, and are preempted for others': 16 pages of 16, of which one needs up to 7."""
    oracle = oracles["none"]
    cases, preempted = [dataclasses.replace(case, max_tokens=61) for case in mixed(seed=2)], 0
    with engine(oracle.checkpoint, MODE, num_gpu_blocks_override=16) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        original = scheduler._preempt_request

        def count(*args: Any, **kwargs: Any) -> None:
            nonlocal preempted
            preempted += 1
            original(*args, **kwargs)

        scheduler._preempt_request = count
        assert run(llm, cases) == [oracle.tokens(case) for case in cases]
    assert preempted >= 2, "too few were preempted"


def test_two_hundred_prompts_as_in_mode_ar(oracles: dict[str, WindowOracle]) -> None:
    """vLLM's own Ministral on the same weights, greedily."""
    oracle = oracles["adapter"]
    cases = [greedy(dataclasses.replace(case, max_tokens=24)) for case in mixed(seed=9, num=200)]
    speculated = run(shared_engine(oracle.checkpoint, MODE), cases)
    ar = run(shared_engine(oracle.checkpoint, {"mode": "ar"}, enforce_eager=True, block_size=32), cases)
    assert speculated == ar
