"""`vllm serve` of a block-causal model: the same tokens over HTTP, and a conversation that finds what it stored."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.http import MODEL, assert_streamed, cache_counts, complete, counted, server
from tests.e2e.rig import Case
from tests.e2e.sdar import SdarOracle, sdar_cases

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server"), pytest.mark.slow("servers")]

PAGE, BLOCK = 16, 4
SETTINGS = {"block_length": BLOCK}


@pytest.fixture(scope="module")
def client(wild_sdar: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    log = tmp_path_factory.mktemp("server") / "log"
    with server(log, SETTINGS, "--block-size", str(PAGE), checkpoint=wild_sdar) as client:
        yield client


@pytest.fixture(scope="module")
def oracle(wild_sdar: Path) -> SdarOracle:
    return SdarOracle(wild_sdar)


def test_sixteen_mixed_requests_at_once_equal_reference(client: openai.OpenAI, oracle: SdarOracle) -> None:
    cases = sdar_cases(BLOCK, seed=1)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda case: complete(client, case), cases))
    assert [reply.choices[0].token_ids for reply in replies] == [oracle.tokens(case, SETTINGS) for case in cases]
    took = [reply.kv_transfer_params["dllm"]["nfe"] for reply in replies]
    assert took == [oracle.generation(case, SETTINGS).nfe for case in cases]


def test_streams_a_first_block_without_the_prompts_end(client: openai.OpenAI, oracle: SdarOracle) -> None:
    case = Case(prompt=(5, 6, 7, 8, 9, 10), max_tokens=61)
    tokens = oracle.tokens(case, SETTINGS)
    assert_streamed(client, case, [tokens[0:2], *(tokens[i : i + BLOCK] for i in range(2, 61, BLOCK))])


def test_a_conversation_of_five_turns_reuses_blocks(client: openai.OpenAI, oracle: SdarOracle) -> None:
    prompt, before, asked, expected = tuple(range(205, 217)), cache_counts(client), 0, 0
    for turn in range(5):
        case = Case(prompt=prompt, max_tokens=14, policy="dynamic", threshold=0.3, temperature=0.7, seed=turn)
        reply = complete(client, case)
        answer = tuple(reply.choices[0].token_ids)
        assert list(answer) == oracle.tokens(case, SETTINGS)
        asked += len(prompt)
        if turn < 4:  # all but the last block is stored, and found where it fills a page
            expected += (len(prompt) + len(answer) - 1) // BLOCK * BLOCK // PAGE * PAGE
        prompt += (*answer, 5, 6, 7)
    queries, hits = counted(client, before, lambda queries: queries >= asked)
    assert (queries, hits) == (asked, expected)
    assert hits / queries > 0.4


def test_a_chat_of_five_turns_reuses_blocks(client: openai.OpenAI) -> None:
    """As a user has one: by a template, with published defaults, and answers that are tokenized again."""
    before = cache_counts(client)
    messages: list[Any] = [{"role": "system", "content": "Sort 3 1 7 2, and 9 8 5 4."}]
    asked = 0
    for turn in range(5):
        messages.append({"role": "user", "content": f"Count {turn}"})
        reply = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3, seed=turn)
        messages.append({"role": "assistant", "content": reply.choices[0].message.content})
        assert reply.usage is not None
        asked += reply.usage.prompt_tokens
    queries, hits = counted(client, before, lambda queries: queries >= asked)
    assert queries == asked
    assert hits / queries > 0.3


def test_the_mask_token_in_a_partial_block_is_a_400(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the mask token 3 at position 4"):
        complete(client, Case(prompt=(5, 6, 7, 8, 3), max_tokens=8))
