"""WeDLM in the engine == its decoder, token for token and forward for forward, in fp32."""

import dataclasses
from typing import Any

import pytest

from tests.e2e.interference import check_interference
from tests.e2e.rig import MAX_MODEL_LEN, check_counts_while_running, engine, run, run_outputs, shared_engine
from tests.e2e.triton_arguments import check_arguments
from tests.e2e.wedlm import SlidingOracle, WindowCase, make_wild, mixed

pytestmark = [pytest.mark.engine, pytest.mark.slow("engines"), pytest.mark.xdist_group("wedlm")]


@pytest.fixture(scope="session")
def oracles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SlidingOracle]:
    """By the published model whose layers they have."""
    made = {}
    for name in ("7b", "8b"):
        path = tmp_path_factory.mktemp(name) / "checkpoint"
        make_wild(path, has_biases=name == "7b")
        made[name] = SlidingOracle(path)
    return made


@pytest.fixture
def served(oracles: dict[str, SlidingOracle]) -> tuple[Any, SlidingOracle]:
    oracle = oracles["8b"]
    return shared_engine(oracle.checkpoint, {}), oracle


def test_mixed_batch_equals_the_decoder(served: tuple[Any, SlidingOracle]) -> None:
    llm, oracle = served
    cases = mixed(seed=1)
    outputs = run_outputs(llm, cases)
    assert [list(output.outputs[0].token_ids) for output in outputs] == [oracle.tokens(case) for case in cases]
    made = [oracle.made(case) for case in cases]
    assert [output.kv_transfer_params["dllm"]["nfe"] for output in outputs] == [each.nfe for each in made]
    assert len({token for each in made for token in each.tokens.tolist()}) > 50
    steps = [step for each in made for step in each.steps]
    assert {0, 1, 2, 16} < {final for _, final in steps}, "windows slide by too few different numbers"
    assert any(final > unmasked for unmasked, final in steps), "nothing is unmasked out of order"


def test_order_and_neighbours_do_not_matter(served: tuple[Any, SlidingOracle]) -> None:
    llm, oracle = served
    cases = mixed(seed=4, num=5)
    expected = [oracle.tokens(case) for case in cases]
    assert run(llm, cases[::-1])[::-1] == expected
    assert [run(llm, [case])[0] for case in cases[:2]] == expected[:2]


def test_preemption_and_aborts_leave_the_others_alone(served: tuple[Any, SlidingOracle]) -> None:
    """What is known of a window behind its front is not lost: another window would have other tokens."""
    llm, oracle = served
    cases = [dataclasses.replace(case, max_tokens=50) for case in mixed(seed=6, num=8)]
    check_interference(llm, cases, oracle.tokens, lambda number: number in (4, 9, 10))


def test_counts_of_runner_and_scheduler_agree(served: tuple[Any, SlidingOracle]) -> None:
    llm, _ = served
    check_counts_while_running(llm, mixed(seed=5))


def test_vllms_kernels_get_what_they_rely_on(served: tuple[Any, SlidingOracle]) -> None:
    llm, _ = served
    check_arguments(lambda: run_outputs(llm, mixed(seed=5, num=5)))


@pytest.mark.parametrize("prompt_len", [MAX_MODEL_LEN - 1, MAX_MODEL_LEN - 9, MAX_MODEL_LEN - 40])
def test_a_reply_may_fill_the_model_length(served: tuple[Any, SlidingOracle], prompt_len: int) -> None:
    llm, oracle = served
    prompt = tuple(5 + (7 * i) % 90 for i in range(prompt_len))
    cases = [WindowCase(prompt=prompt, max_tokens=MAX_MODEL_LEN, entropy_bound=bound) for bound in (0.4, 3.0)]
    tokens = run(llm, cases)
    assert tokens == [oracle.tokens(case) for case in cases]
    assert {len(each) for each in tokens} == {MAX_MODEL_LEN - prompt_len}


def test_a_reply_is_the_begin_of_a_longer_one(served: tuple[Any, SlidingOracle]) -> None:
    llm, oracle = served
    case = WindowCase(prompt=tuple(range(5, 30)), max_tokens=60, entropy_bound=2.0)
    lengths = (1, 15, 16, 33, 60)
    replies = run(llm, [dataclasses.replace(case, max_tokens=length) for length in lengths])
    assert replies == [oracle.tokens(case)[:length] for length in lengths]


def test_a_stop_token_ends_the_reply(served: tuple[Any, SlidingOracle]) -> None:
    llm, oracle = served
    cases = [dataclasses.replace(case, max_tokens=40) for case in mixed(seed=8, num=6)]
    replies = [oracle.tokens(case) for case in cases]
    stops = [reply[len(reply) // 2] for reply in replies]
    params = [case.sampling_params(stop_token_ids=[stop]) for case, stop in zip(cases, stops, strict=True)]
    outputs = llm.generate([{"prompt_token_ids": list(c.prompt)} for c in cases], params, use_tqdm=False)
    found = [(list(output.outputs[0].token_ids), output.outputs[0].stop_reason) for output in outputs]
    assert found == [(reply[: reply.index(stop) + 1], stop) for reply, stop in zip(replies, stops, strict=True)]


@pytest.mark.parametrize("prompt_len", [15, 17, 48])
def test_a_cached_prompt_gives_the_same_tokens(served: tuple[Any, SlidingOracle], prompt_len: int) -> None:
    """Pages are found wherever they end, as an autoregressive model's are; what was generated is cached, too."""
    llm, oracle = served
    assert llm.llm_engine.reset_prefix_cache()
    prompt = tuple(5 + (7 * i) % 90 for i in range(prompt_len))
    case = WindowCase(prompt=prompt, max_tokens=40, temperature=0.9, seed=3, entropy_bound=1.5)
    [first] = run_outputs(llm, [case])
    tokens = list(first.outputs[0].token_ids)
    assert (tokens, first.num_cached_tokens) == (oracle.tokens(case), 0)
    longer = dataclasses.replace(case, prompt=case.prompt + tuple(tokens[:-1]), max_tokens=9)
    for again in (case, longer):
        [output] = run_outputs(llm, [again])
        assert list(output.outputs[0].token_ids) == oracle.tokens(again)
        assert output.num_cached_tokens >= (prompt_len - 1) // 16 * 16
    assert output.num_cached_tokens > prompt_len, "nothing that was generated is cached"


def test_few_pages_and_the_layers_of_the_7b(oracles: dict[str, SlidingOracle]) -> None:
    """Requests wait for pages, and are preempted for others'."""
    oracle, preempted = oracles["7b"], 0
    cases = [dataclasses.replace(case, max_tokens=61) for case in mixed(seed=2)]
    with engine(oracle.checkpoint, {}, num_gpu_blocks_override=16) as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        original = scheduler._preempt_request

        def count(*args: Any, **kwargs: Any) -> None:
            nonlocal preempted
            preempted += 1
            original(*args, **kwargs)

        scheduler._preempt_request = count
        assert run(llm, cases) == [oracle.tokens(case) for case in cases]
    assert preempted >= 2, "too few were preempted"
