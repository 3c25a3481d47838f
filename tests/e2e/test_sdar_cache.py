"""Pages that other requests find: the tokens are those without, and a page is found as soon as it is stored."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.rig import Case, engine, run, run_outputs, shared_engine, step_all
from tests.e2e.sdar import SdarOracle, sdar_cases

PAGE, BLOCK = 16, 4
SETTINGS = {"block_length": BLOCK}
pytestmark = [pytest.mark.engine, pytest.mark.slow("engines"), pytest.mark.xdist_group(f"sdar {SETTINGS}")]
LONG = tuple(5 + (7 * i) % 90 for i in range(70))


@pytest.fixture
def llm(wild_sdar: Path) -> Any:
    llm = shared_engine(wild_sdar, SETTINGS, block_size=PAGE)
    assert llm.llm_engine.reset_prefix_cache()
    return llm


@pytest.fixture
def oracle(sdar_oracle: SdarOracle) -> SdarOracle:
    return sdar_oracle


def found(llm: Any, case: Case, oracle: SdarOracle) -> int:
    """Run a request, compare its tokens, and return how many of its prompt's positions it found in the cache."""
    (output,) = run_outputs(llm, [case])
    assert list(output.outputs[0].token_ids) == oracle.tokens(case, SETTINGS)
    cached: int = output.num_cached_tokens
    return cached


def run_one_late(llm: Any, cases: list[Case], delay: int) -> list[Any]:
    """Run two requests, the second from a number of steps on."""
    finished: dict[str, Any] = {}
    number = 0
    while len(finished) < 2:
        for i in [i for i, first_step in enumerate((0, delay)) if first_step == number]:
            llm.llm_engine.add_request(str(i), {"prompt_token_ids": list(cases[i].prompt)}, cases[i].sampling_params())
        finished |= {output.request_id: output for output in llm.llm_engine.step() if output.finished}
        number += 1
    return [finished["0"], finished["1"]]


@pytest.mark.parametrize("prompt_len", [15, 16, 17, 33, 48])
def test_the_same_prompt_again(llm: Any, oracle: SdarOracle, prompt_len: int) -> None:
    case = Case(prompt=LONG[:prompt_len], max_tokens=11, policy="dynamic", threshold=0.3, temperature=0.7, seed=2)
    assert found(llm, case, oracle) == 0
    assert found(llm, case, oracle) == (prompt_len - 1) // PAGE * PAGE
    assert (
        found(llm, dataclasses.replace(case, max_tokens=30, temperature=0.0), oracle) == (prompt_len - 1) // PAGE * PAGE
    )


def test_a_shared_prefix_is_found_up_to_the_page_where_prompts_part(llm: Any, oracle: SdarOracle) -> None:
    first = Case(prompt=LONG[:50], max_tokens=9)
    other = Case(prompt=(*LONG[:37], 200, 201, 202), max_tokens=13, policy="margin")
    assert [found(llm, case, oracle) for case in (first, other, first, other)] == [0, 32, 48, 32]


def test_many_at_once_find_what_one_left(llm: Any, oracle: SdarOracle) -> None:
    cases = [
        dataclasses.replace(case, prompt=LONG[: 20 + i] + case.prompt[:9], steps=None)
        for i, case in enumerate(sdar_cases(BLOCK, 3))
    ]
    expected = [oracle.tokens(case, SETTINGS) for case in cases]
    assert run(llm, cases) == expected
    outputs = run_outputs(llm, cases)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    assert [output.num_cached_tokens for output in outputs] == [(len(case.prompt) - 1) // PAGE * PAGE for case in cases]


def test_a_conversation_finds_its_own_answers(llm: Any, oracle: SdarOracle) -> None:
    """All but an answer's last block, which is never stored, and what does not fill a page."""
    prompt, cached, expected = LONG[:10], [], [0]
    for turn in range(5):
        case = Case(prompt=prompt, max_tokens=15, policy="static", temperature=0.7, seed=turn)
        cached.append(found(llm, case, oracle))
        answer = tuple(oracle.tokens(case, SETTINGS))
        stored = (len(prompt) + len(answer) - 1) // BLOCK * BLOCK
        prompt += answer + LONG[turn : turn + 3]
        expected.append(stored // PAGE * PAGE)
    assert cached == expected[:-1]
    assert cached[-1] >= 64


def test_prompts_of_one_step_do_not_find_each_other(llm: Any, oracle: SdarOracle) -> None:
    case = Case(prompt=LONG[:40], max_tokens=12)
    outputs = run_outputs(llm, [case, case, case])
    assert [list(output.outputs[0].token_ids) for output in outputs] == [oracle.tokens(case, SETTINGS)] * 3
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 0]


def test_pages_are_found_while_their_request_still_runs(llm: Any, oracle: SdarOracle) -> None:
    """A second one begins after each number of steps; what it finds grows with what the first one has stored."""
    first = Case(prompt=LONG[:30], max_tokens=40, temperature=0.7, seed=5)
    answer = tuple(oracle.tokens(first, SETTINGS))
    second = Case(prompt=first.prompt + answer[:36], max_tokens=6)
    cached = []
    for delay in range(1, 42, 5):
        assert llm.llm_engine.reset_prefix_cache()
        outputs = run_one_late(llm, [first, second], delay)
        assert [list(output.outputs[0].token_ids) for output in outputs] == [
            list(answer),
            oracle.tokens(second, SETTINGS),
        ]
        cached.append(outputs[1].num_cached_tokens)
    assert cached == sorted(cached)
    assert cached[0] == 16, "the first step stores the prompt's 28 positions in whole blocks, which are one page"
    assert cached[-1] == 64, "66 positions are known, and the block before the last one is stored"


def test_an_aborted_request_leaves_what_it_stored(llm: Any, oracle: SdarOracle) -> None:
    first = Case(prompt=LONG[:14], max_tokens=40, temperature=0.7, seed=6)
    answer = tuple(oracle.tokens(first, SETTINGS))

    def abort(number: int, llm: Any) -> None:
        if number == 22:  # the prompt, two steps for the partial block, four for each of the next: 32 are stored
            llm.llm_engine.abort_request(["0"])

    step_all(llm, [first], abort)
    second = Case(prompt=first.prompt + answer[:38], max_tokens=10)
    assert found(llm, second, oracle) == 32


@pytest.mark.xdist_group("sdar without prefix caching")
def test_prefix_caching_can_be_turned_off(wild_sdar: Path, oracle: SdarOracle) -> None:
    case = Case(prompt=LONG[:40], max_tokens=12)
    with engine(wild_sdar, {"block_length": 4}, enable_prefix_caching=False, block_size=18) as llm:
        assert [found(llm, case, oracle) for _ in range(2)] == [0, 0]


def test_pages_of_whole_blocks_are_chosen_or_asked_for(wild_sdar: Path) -> None:
    from vllm import EngineArgs

    def page_size(block_length: int, **changes: Any) -> int:
        config = {"dllm": {"block_length": block_length}}
        values = {"model": str(wild_sdar), "max_model_len": 128, "load_format": "dummy", "additional_config": config}
        size: int = EngineArgs(**(values | changes)).create_engine_config().cache_config.block_size
        return size

    assert [page_size(block_length) % block_length for block_length in (4, 12, 24, 32)] == [0] * 4
    assert page_size(24, block_size=48) == 48
    with pytest.raises(
        ValueError, match="block_size is 32, but prefix caching needs pages of whole blocks of block_le"
    ):
        page_size(24, block_size=32)
    assert page_size(24, block_size=32, enable_prefix_caching=False) == 32
