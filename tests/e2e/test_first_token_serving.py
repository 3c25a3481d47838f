"""Nemotron and Fast-dLLM v2 over HTTP, by two tensor-parallel ranks and with drafts: the reference's tokens."""

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.e2e.ended import check_forwards
from tests.e2e.first_token import FirstTokenOracle, make_wild
from tests.e2e.http import MODEL, assert_streamed, cache_counts, complete, counted, server
from tests.e2e.rig import Case, random_graph, speculation

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server"), pytest.mark.slow("servers")]

PAGE, BUDGET = 16, 4
Served = tuple[openai.OpenAI, FirstTokenOracle]


@pytest.fixture(scope="module", params=["nemotron", "fast_dllm"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A client of a server, and the reference decoder."""
    folder = tmp_path_factory.mktemp("server")
    make_wild(request.param, folder / "checkpoint", mixing=0.3)
    oracle = FirstTokenOracle(folder / "checkpoint", request.param)
    drafts = speculation(random_graph(3, 12, oracle.model.config.block_size), BUDGET)
    options = ("--tensor-parallel-size", "2", "--speculative-config", json.dumps(drafts), "--block-size", str(PAGE))
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with server(folder / "log", {}, *options, checkpoint=oracle.checkpoint, **binding) as client:
        yield client, oracle


def test_sixteen_mixed_requests_at_once_equal_reference(served: Served) -> None:
    client, oracle = served
    cases = oracle.cases(seed=1)
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda case: complete(client, case), cases))
    assert [reply.choices[0].token_ids for reply in replies] == [oracle.tokens(case, {}) for case in cases]
    took = [reply.kv_transfer_params["dllm"] for reply in replies]
    check_forwards(oracle, cases, {}, took)
    assert sum(n["accepted"] for n in took) >= 4, "too few drafts come true"


def test_streams_block_by_block(served: Served) -> None:
    """Nemotron's blocks begin behind the prompt, Fast-dLLM's at multiples of their length."""
    client, oracle = served
    case = Case(prompt=tuple(range(5, 16)), max_tokens=99, policy="threshold", threshold=0.3)
    tokens = oracle.tokens(case, {})
    ends = [*range(0, 99, 8), 99] if oracle.rules.attention == "causal" else [0, *range(5, 99, 16), 99]
    assert_streamed(client, case, [tokens[i:j] for i, j in itertools.pairwise(ends)])


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_finds_what_it_stored(served: Served, *, stream: bool) -> None:
    """With the published decoding; each turn's prompt is the last one's and what came of it."""
    client, oracle = served
    before, asked = cache_counts(client), 0
    content = "Sort 3 1 7 2" if stream else "Reverse cat dog"
    messages: list[Any] = [{"role": "user", "content": content}]
    for _ in range(3):
        extra = {"return_token_ids": True, "ignore_eos": True}
        values: dict[str, Any] = {"model": MODEL, "messages": messages, "max_tokens": 10, "extra_body": extra}
        prompt, tokens = chat(client, values, stream=stream)
        policy: Any = oracle.family.decoding_defaults["policy"]
        assert tokens == oracle.tokens(Case(prompt=prompt, max_tokens=10, policy=policy, threshold=0.9), {})
        asked += len(prompt)
        messages += [{"role": "assistant", "content": "cat dog"}, {"role": "user", "content": "Reverse dog cat"}]
    queries, hits = counted(client, before, lambda queries: queries >= asked)
    assert queries == asked
    assert hits >= PAGE


def chat(client: openai.OpenAI, values: dict[str, Any], *, stream: bool) -> tuple[tuple[int, ...], list[int]]:
    """Return the ids of the prompt, and those of the reply."""
    reply: Any = client.chat.completions.create(**values, stream=stream)
    if not stream:
        return tuple(reply.prompt_token_ids), reply.choices[0].token_ids
    chunks = list(reply)
    prompt = next(chunk.prompt_token_ids for chunk in chunks if getattr(chunk, "prompt_token_ids", None))
    given = [getattr(chunk.choices[0], "token_ids", None) or [] for chunk in chunks if chunk.choices]
    return tuple(prompt), [token for ids in given for token in ids]
